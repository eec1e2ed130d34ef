"""The generative deployment: turns and batches on the device, cancelling, memory, a device that dies."""

import asyncio
import threading
import time
from pathlib import Path

import pytest
import torch

from deployments import trellis as deployment
from deployments.artifacts import ArtifactStore
from deployments.messages import Done, Failed, Progress
from deployments.running import Unhealthy
from viewmesh.errors import Cancelled, EmptyReconstruction, MissingModel, OptionError, OutOfMemory
from viewmesh.generate import Begun
from viewmesh.options import Options
from viewmesh.progress import check

Trellis = deployment.Trellis.func_or_class


class Engine:
    """A Generator that does as `script` says, once per call."""

    def __init__(self, *script):
        self.script, self.released, self.stopped, self.warmed = list(script), 0, threading.Event(), threading.Event()
        self.together, self.models, self.lacking = 4, [], {}

    def hold(self, models):
        self.models.append(tuple(models))

    def held(self):
        return {name: self.lacking.get(name) for name in self.models[-1]}

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
        return Trellis(f"file://{tmp_path}/store", "engine", {}, ["trellis", "reconviagen"]), engine

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
    await worker.reconfigure({"compile": False})
    assert worker.warming is None
    worker, engine = made()
    await worker.reconfigure({"together": 2})
    assert engine.together == 2
    assert engine.warmed.wait(5)
    assert isinstance(await last(worker, call_on(worker)), Done)


FULL = OutOfMemory("ReconViaGen", needed=9 << 30, free=1 << 30, device="cuda:0", hint="Stop what else uses it.")


async def test_its_user_config_says_which_models_it_holds(made):
    worker, engine = made()
    await worker.reconfigure({"compile": False})
    assert engine.models == [("trellis", "reconviagen")]  # all that the service runs
    assert await worker.held() == {"trellis": {}, "reconviagen": {}}
    await worker.reconfigure({"compile": False, "models": ["trellis"], "stall_s": 9})
    await worker.reconfigure({"compile": False, "models": ["trellis"], "stall_s": 10})
    assert engine.models[1:] == [("trellis",)]
    assert "user_config.models" in (await worker.held())["reconviagen"]["hint"]
    with pytest.raises(OptionError, match="names none of trellis, reconviagen"):
        await worker.reconfigure({"models": ["nvdiffrec"]})


async def test_a_model_that_does_not_fit_leaves_the_other_serving(made):
    worker, engine = made()
    engine.lacking = {"reconviagen": FULL}
    await worker.reconfigure({})
    said = (await worker.held())["reconviagen"]
    assert "needs about 9.0 GiB on cuda:0, 1.0 GiB are free" in said["reason"]
    assert said["hint"] == FULL.hint
    assert isinstance(await last(worker, call_on(worker)), Done)
    worker, engine = made()
    engine.lacking = {"reconviagen": FULL, "trellis": FULL}
    with pytest.raises(OutOfMemory):  # with nothing to serve, Serve shall say so
        await worker.reconfigure({})


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


@pytest.fixture(params=["both halves in one turn", "overlapping halves"])
def adapter(monkeypatch, request):
    """The adapter with a library that only says who was drafted with whom."""
    from deployments.adapters import trellis as module

    class Library:
        fits, begun, drafted, loads, free = 9, [], [], [], 9
        hold, finishing = threading.Event(), None
        seconds = 0.0

        def look(self, model, views, chosen, *, progress, cancelled):
            return Looked(views, chosen.cfg or 1.0, cancelled)

        def begin_together(self, model, calls):
            self.begun.append([call.views for call in calls])
            return [Begun(call) for call in calls]

        def draft_together(self, model, calls):
            views = [begun.call.views for begun in calls]
            self.drafted.append(views)
            self.hold.wait(10)
            if len(calls) > self.fits:
                raise OutOfMemory("The batch", needed=9 << 30, free=1 << 30, device="cuda:0")
            return [EmptyReconstruction("nothing") if name == "bad" else f"draft of {name}" for name in views]

        def finish(self, drafted, *args, **kwargs):
            if self.finishing is not None:
                self.finishing.wait()
            return Made()

    class Looked:
        def __init__(self, views, company, cancelled):
            self.views, self.company, self.cancelled = views, company, cancelled

    class Made:
        mesh = gaussians = None
        warnings, seconds = (), {}

    library = Library()
    library.begun, library.drafted, library.loads, library.hold = [], [], [], threading.Event()

    def load_model(name, *given):
        library.loads.append(name)
        if len(engine.models) >= library.free:
            raise OutOfMemory(name, needed=9 << 30, free=1 << 30, device="cpu")
        return name

    for name, value in {
        "look": library.look, "begin_together": library.begin_together,
        "draft_together": library.draft_together, "finish": library.finish,
        "load_model": load_model, "load_viewset": lambda path: path, "total_steps": lambda *a: 9,
        "save_draft": lambda *a: None, "load_draft": lambda *a: None, "save_mesh": lambda *a, **k: None,
        "early_previews": lambda *a: {}, "fit_together": lambda device: 3,
    }.items():  # fmt: skip
        monkeypatch.setattr(module, name, value)
    engine = module.LibraryGenerator("cpu")
    engine.hold(["trellis", "reconviagen"])
    engine.plenty = request.param == "overlapping halves"
    return engine, library


def asked(engine, views: str, cfg: float = 1.0, cancelled=lambda: False, model="trellis"):
    options = Options(model=model, cfg=cfg).model_dump(mode="json")
    return asyncio.create_task(
        asyncio.to_thread(engine.generate, views, options, Path("out"), lambda *a, **k: None, cancelled)
    )


async def until(condition, seconds: float = 10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


async def test_who_waits_for_the_device_runs_together_if_it_may_and_fits(adapter):
    engine, library = adapter
    calls = [asked(engine, "first")]
    await until(lambda: library.drafted)  # at once and alone: nobody waits for company
    for n, (views, cfg) in enumerate([("b", 1.0), ("other", 2.0), ("bad", 1.0), ("d", 1.0), ("e", 1.0)]):
        calls.append(asked(engine, views, cfg))
        await until(lambda n=n: len(engine.seconds.waiting) == n + 1)
    library.hold.set()
    facts = await asyncio.gather(*calls, return_exceptions=True)
    assert library.drafted == [["first"], ["b", "bad", "d"], ["other"], ["e"]]
    assert isinstance(facts[3], EmptyReconstruction)
    together = [f["generated_together"] for f in facts if isinstance(f, dict)]
    assert together == [1, 3, 1, 3, 1]


async def test_calls_of_two_models_never_share_a_batch(adapter):
    engine, library = adapter
    calls = [asked(engine, "first")]
    await until(lambda: library.drafted)
    for n, model in enumerate(("trellis", "reconviagen", "trellis", "reconviagen")):
        calls.append(asked(engine, f"{model[0]}{n}", model=model))
        await until(lambda n=n: len(engine.seconds.waiting) == n + 1)
    library.hold.set()
    await asyncio.gather(*calls)
    assert library.drafted == [["first"], ["t0", "t2"], ["r1", "r3"]]


async def test_a_model_without_room_is_tried_again_when_it_is_asked_for(adapter):
    engine, library = adapter
    library.hold.set()
    library.free = 1
    engine.hold(["trellis"])
    engine.hold(["trellis", "reconviagen"])
    assert library.loads == ["trellis", "reconviagen", "reconviagen"]  # what stays is not loaded again
    assert engine.held()["trellis"] is None
    assert "9.0 GiB" in str(engine.held()["reconviagen"])
    with pytest.raises(OutOfMemory):
        await asked(engine, "a", model="reconviagen")
    await asked(engine, "b")
    library.free = 2
    await asked(engine, "c", model="reconviagen")
    assert engine.held() == {"trellis": None, "reconviagen": None}
    engine.hold(["reconviagen"])
    with pytest.raises(MissingModel, match="does not hold trellis"):
        await asked(engine, "d")


async def test_with_batches_off_calls_take_turns(adapter):
    engine, library = adapter
    engine.together = 1
    calls = [asked(engine, "a")]
    await until(lambda: library.drafted)
    calls.append(asked(engine, "b"))
    calls.append(asked(engine, "c"))
    await until(lambda: len(engine.seconds.waiting) == 2)
    library.hold.set()
    await asyncio.gather(*calls)
    assert sorted(map(len, library.drafted)) == [1, 1, 1]


async def test_a_batch_that_does_not_fit_runs_one_by_one(adapter):
    engine, library = adapter
    library.fits = 1
    calls = [asked(engine, "a")]
    await until(lambda: library.drafted)
    for n, views in enumerate(("b", "bad", "d")):
        calls.append(asked(engine, views))
        await until(lambda n=n: len(engine.seconds.waiting) == n + 1)
    library.hold.set()
    facts = await asyncio.gather(*calls, return_exceptions=True)
    assert library.drafted == [["a"], ["b", "bad", "d"], ["b"], ["bad"], ["d"]]
    assert [type(f) for f in facts] == [dict, dict, EmptyReconstruction, dict]


async def test_a_call_that_waits_can_leave(adapter):
    engine, library = adapter
    first = asked(engine, "a")
    await until(lambda: library.drafted)
    leaver = asked(engine, "b", cancelled=lambda: True)
    with pytest.raises(Cancelled):
        await leaver
    library.hold.set()
    await first
    assert library.drafted == [["a"]]


async def test_texturing_does_not_hold_the_device(adapter):
    engine, library = adapter
    library.hold.set()
    library.finishing = threading.Barrier(2, timeout=10)  # both calls must be here at once
    await asyncio.gather(asked(engine, "a"), asked(engine, "b"))


async def test_one_draft_begins_while_another_ends_where_there_is_room_for_both(adapter):
    engine, library = adapter
    first = asked(engine, "a")
    await until(lambda: library.drafted)  # and held there
    second = asked(engine, "b")
    await until(lambda: len(engine.seconds.waiting) == 1)
    assert library.begun == ([["a"], ["b"]] if engine.plenty else [])
    library.hold.set()
    await asyncio.gather(first, second)
    assert library.drafted == [["a"], ["b"]]


@pytest.mark.parametrize(("free", "count"), [(None, 0), (17 << 30, 0), (22 << 30, 2), (100 << 30, 12)])
def test_as_many_processes_texture_as_the_gpu_has_memory_for(monkeypatch, free, count):
    from deployments.adapters import trellis as module

    monkeypatch.setattr(module, "free_bytes", lambda device: free)
    monkeypatch.setattr(module.os, "cpu_count", lambda: 64)
    assert module._finishers(torch.device("cpu" if free is None else "cuda")) == count
