"""The generative deployment: turns on the device, cancelling between sampler steps, memory, a device that dies."""

import asyncio
import threading
import time

import pytest

from deployments import trellis as deployment
from deployments.artifacts import ArtifactStore
from deployments.messages import Done, Failed, Progress
from deployments.running import Unhealthy
from viewmesh.errors import OutOfMemory
from viewmesh.progress import check

Trellis = deployment.Trellis.func_or_class


class Engine:
    """A Generator that does as `script` says, once per call."""

    def __init__(self, *script):
        self.script, self.released, self.stopped, self.warmed = list(script), 0, threading.Event(), threading.Event()

    def warm(self):
        self.warmed.set()
        raise RuntimeError("no compiler")  # must cost nothing

    def generate(self, views, options, out, progress, cancelled):
        error = self.script.pop(0) if self.script else None
        progress("generate", 1, 3)
        if error == "long":
            try:
                for step in range(2000):
                    check(cancelled)
                    progress("generate", step, 2000)
                    time.sleep(0.005)
            finally:
                self.stopped.set()
        elif error is not None:
            raise error
        out.write_bytes(b"mesh of " + views.read_bytes())
        return {"device": "cpu"}

    def release(self):
        self.released += 1

    def memory(self):
        return {}


@pytest.fixture
def made(tmp_path, monkeypatch):
    def make(*script):
        engine = Engine(*script)
        monkeypatch.setattr(deployment, "make", lambda path, **kwargs: engine)
        return Trellis(f"file://{tmp_path}/store", "engine", {}), engine

    return make


def call_on(worker) -> dict:
    file = worker.store.spool()
    file.write_bytes(b"views")
    views = ArtifactStore(worker.store.url).put(file, "jobs/a/views", move=True)
    return {"job_id": "a", "options": {}, "views": views.json()}


async def last(worker, call):
    messages = [message async for message in worker.generate(call)]
    assert all(isinstance(message, Progress) for message in messages[:-1])
    return messages[-1]


async def test_a_call_ends_with_a_committed_result(made, tmp_path):
    worker, _ = made()
    done = await last(worker, call_on(worker))
    assert isinstance(done, Done)
    assert worker.store.fetch(done.value["result"], tmp_path).read_bytes() == b"mesh of views"
    assert done.value["facts"] == {"device": "cpu"}
    worker.check_health()


async def test_it_is_compiled_beside_its_calls_and_a_failure_of_that_costs_nothing(made):
    worker, engine = made()
    worker.reconfigure({"compile": False})
    assert worker.warming is None
    worker.reconfigure({})
    assert engine.warmed.wait(5)
    assert isinstance(await last(worker, call_on(worker)), Done)


async def test_out_of_memory_frees_the_cache_and_tries_once_more(made):
    full = OutOfMemory("The model", needed=9 << 30, free=1 << 30, device="cuda:0")
    worker, engine = made(full)
    assert isinstance(await last(worker, call_on(worker)), Done)
    assert engine.released == 1
    worker, engine = made(full, full)
    failed = await last(worker, call_on(worker))
    assert isinstance(failed, Failed)
    assert (failed.code, failed.details["needed_bytes"]) == ("out_of_memory", 9 << 30)
    worker.check_health()


async def test_a_lost_device_makes_the_replica_unhealthy_and_takes_no_more_work(made):
    worker, _ = made(RuntimeError("CUDA error: an illegal memory access was encountered"))
    failed = await last(worker, call_on(worker))
    assert isinstance(failed, Failed)
    assert (failed.code, failed.retry) == ("device_lost", True)
    with pytest.raises(Unhealthy):
        worker.check_health()
    refused = await last(worker, call_on(worker))
    assert isinstance(refused, Failed)
    assert refused.code == "worker_unfit"


async def test_a_caller_that_goes_away_stops_the_work_between_steps(made):
    worker, engine = made("long")
    messages = worker.generate(call_on(worker))
    assert isinstance(await anext(messages), Progress)
    await messages.aclose()
    assert engine.stopped.is_set()
    assert isinstance(await last(worker, call_on(worker)), Done)


async def test_calls_take_turns_on_the_device_and_texturing_does_not_wait(tmp_path, monkeypatch):
    from deployments.adapters import trellis as adapter
    from viewmesh.options import Options

    running, most, finishing = 0, 0, threading.Barrier(2, timeout=10)

    def draft(*args, **kwargs):
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.1)
        running -= 1

    class Made:
        mesh = gaussians = None
        warnings, seconds = (), {}

    def finish(*args, **kwargs):
        finishing.wait()  # both calls must be here at once
        return Made

    for name, value in {
        "draft": draft, "finish": finish, "load_model": lambda *a: None, "load_viewset": lambda path: None,
        "total_steps": lambda *a: 9, "save_mesh": lambda *a: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(adapter, name, value)
    engine = adapter.LibraryGenerator("trellis", "cpu")
    options = Options().model_dump(mode="json")

    def run():
        return engine.generate(tmp_path, options, tmp_path, lambda *a, **k: None, lambda: False)

    facts = await asyncio.gather(asyncio.to_thread(run), asyncio.to_thread(run))
    assert most == 1
    assert all(f["device"] == "cpu" for f in facts)
