"""How replicas run their work: threads that stop, slices that go on from checkpoints, devices that die."""

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

import pytest

from deployments import fakes
from deployments.artifacts import ArtifactStore
from deployments.messages import Done, Failed, Progress
from deployments.nvdiffrec import Nvdiffrec
from deployments.running import TELLINGS, Unhealthy, Worker, failure
from viewmesh.errors import EmptyReconstruction, OutOfMemory, PoseError


async def all_of(messages) -> list:
    return [message async for message in messages]


async def test_progress_is_throttled_but_its_end_is_told():
    def work(progress, cancelled):
        for step in range(1, 1001):
            progress("optimise", step, 1000, loss=1.0)
        return {"x": 1}

    messages = await all_of(Worker().run(work))
    assert messages[-1] == Done({"x": 1})
    assert messages[-2].step == 1000
    assert len(messages) < 10


async def test_a_metric_that_is_no_number_is_not_told():
    def work(progress, cancelled):
        progress("optimise", 1, 1, loss=float("nan"), psnr=float("-inf"), faces=400)
        return {}

    told, _ = await all_of(Worker().run(work))
    assert told == Progress("optimise", 1, 1, {"faces": 400.0})


async def test_what_is_not_new_is_not_told_again():
    def work(progress, cancelled):
        for _ in range(20):  # as who waits for the device does, to be known alive
            progress("generate", 0, 9)
            time.sleep(0.01)
        progress("generate", 1, 9)
        return {}

    told = [m.step for m in await all_of(Worker(interval_s=0.02).run(work)) if isinstance(m, Progress)]
    assert told == [0, 1]


class Clock:
    """The workers' clock, which stands until it is moved."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("deployments.running.time", made)
    return made


@pytest.mark.parametrize("calls", [1, 4, 16])
async def test_many_calls_of_a_replica_tell_no_more_together_than_a_few(clock, calls):
    def tick():
        clock.seconds += 0.01

    together = threading.Barrier(calls, tick)

    def work(progress, cancelled):
        for step in range(500):  # five seconds
            together.wait(timeout=20)
            progress("generate", step, 1000)
        return {}

    worker = Worker(at_once=None, interval_s=0.01)
    found = await asyncio.gather(*(all_of(worker.run(work)) for _ in range(calls)))
    told = sum(isinstance(m, Progress) for messages in found for m in messages)
    assert calls < told <= 5 * TELLINGS + calls  # each alone would tell five hundred


async def test_leaving_the_generator_stops_the_thread():
    stopped = []

    def work(progress, cancelled):
        progress("x", 1, 2)
        while not cancelled():
            time.sleep(0.01)
        stopped.append(True)
        return {}

    worker = Worker()
    async with aclosing(worker.run(work)) as messages:
        assert isinstance(await anext(messages), Progress)
    assert stopped


async def test_calls_of_one_worker_never_overlap():
    running, most = 0, 0

    def work(progress, cancelled):
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.05)
        running -= 1
        return {}

    worker = Worker()
    await asyncio.gather(*(all_of(worker.run(work)) for _ in range(4)))
    assert most == 1


async def test_the_engine_is_made_in_the_thread_that_its_calls_run_in():
    """A second thread that computes would put OpenMP's to sleep between the parallel parts of each step."""
    worker = Worker()
    made_in = worker.made(threading.get_ident)
    found = [(await all_of(worker.run(lambda p, c: {"thread": threading.get_ident()})))[-1] for _ in range(3)]
    assert found == [Done({"thread": made_in})] * 3
    assert made_in != threading.get_ident()


async def test_a_call_that_does_not_listen_keeps_the_device_until_it_has_ended():
    """However often its caller goes away, and however long its thread goes on."""
    free, order = threading.Event(), []

    def deaf(progress, cancelled):
        order.append("deaf begins")
        free.wait(20)
        order.append("deaf ends")
        return {}

    def following(progress, cancelled):
        order.append("next begins")
        return {}

    worker = Worker(stall_s=0.3)
    left = asyncio.create_task(all_of(worker.run(deaf)))
    while not order:
        await asyncio.sleep(0.01)
    for _ in range(3):  # its cancellation, and those of who waits for it
        left.cancel()
        await asyncio.sleep(0.02)
    with pytest.raises(asyncio.CancelledError):
        await left
    after = asyncio.create_task(all_of(worker.run(following)))
    await asyncio.sleep(0.4)
    assert order == ["deaf begins"]
    with pytest.raises(Unhealthy, match="no progress"):
        worker.check_health()  # a thread that never ends is not forgotten
    free.set()
    assert (await after)[-1] == Done({})
    assert order == ["deaf begins", "deaf ends", "next begins"]
    worker.check_health()


async def test_a_call_that_gave_up_waiting_for_its_turn_leaves_it_to_others():
    free = threading.Event()
    worker = Worker()
    first = asyncio.create_task(all_of(worker.run(lambda p, c: free.wait(20) and {})))
    await asyncio.sleep(0.05)
    waiting = asyncio.create_task(all_of(worker.run(lambda p, c: {"x": 1})))
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    free.set()
    await first
    assert (await all_of(worker.run(lambda p, c: {"x": 2})))[-1] == Done({"x": 2})


async def test_calls_at_once_are_watched_one_by_one(clock):
    """As in the Exporter: one call that has died away is not hidden by another that works."""
    worker, over, asked = Worker(at_once=None, stall_s=5), threading.Event(), []

    def asking(progress, cancelled):
        gone = False
        while not gone and not over.wait(0.001):
            before = clock.seconds
            gone = cancelled()
            asked.append(before)
        return {}

    async def passes(seconds):
        clock.seconds += seconds
        while not asked or asked[-1] < clock.seconds:
            await asyncio.sleep(0.001)

    lively = asyncio.create_task(all_of(worker.run(asking)))
    for _ in range(3):
        await passes(4)
        worker.check_health()  # asking is a sign of life
    silent = asyncio.create_task(all_of(worker.run(lambda p, c: over.wait(20) and {})))
    await asyncio.sleep(0)  # it begins
    await passes(6)
    with pytest.raises(Unhealthy, match="no progress for 6 s"):
        worker.check_health()
    over.set()
    await asyncio.gather(lively, silent)
    worker.check_health()


async def test_as_many_calls_run_at_once_as_serve_lets_in():
    """Serve gives a replica's event loop threads for its CPUs and four more; calls that wait for a GPU need no CPU."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    worker, together = Worker(at_once=None), threading.Barrier(12)

    def meet(progress, cancelled):
        together.wait(timeout=20)
        return {}

    ended = await asyncio.gather(*(all_of(worker.run(meet)) for _ in range(12)))
    assert [messages[-1] for messages in ended] == [Done({})] * 12


async def test_a_poisoned_device_makes_the_replica_unhealthy_and_takes_no_more_work():
    def work(progress, cancelled):
        raise RuntimeError("CUDA error: device-side assert triggered\nsecret path")

    worker = Worker()
    worker.check_health()
    (message,) = await all_of(worker.run(work))
    assert (message.code, message.retry) == ("device_lost", True)
    assert "secret" not in message.message
    with pytest.raises(Unhealthy, match="device-side assert"):
        worker.check_health()
    (refused,) = await all_of(worker.run(lambda p, c: {}))
    assert (refused.code, refused.retry) == ("worker_unfit", True)


async def test_a_stalled_replica_is_unhealthy_and_an_idle_one_is_not(clock):
    worker, over = Worker(stall_s=5), threading.Event()
    task = asyncio.create_task(all_of(worker.run(lambda p, c: over.wait(20) and {})))
    await asyncio.sleep(0)  # it begins
    worker.check_health()
    clock.seconds += 6
    with pytest.raises(Unhealthy, match="no progress"):
        worker.check_health()
    over.set()
    await task
    clock.seconds += 6
    worker.check_health()


class OutOfMemoryError(RuntimeError):
    """Named as torch's is."""


@pytest.mark.parametrize(
    ("error", "code", "details"),
    [
        (EmptyReconstruction("nothing"), "empty_reconstruction", {}),
        (PoseError("two", unposed=("a", "b")), "unposed_views", {"unposed": ["a", "b"]}),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory", {}),
        (MemoryError(), "out_of_memory", {}),
        (ZeroDivisionError("secret"), "internal_error", {}),
        (
            OutOfMemory("It", needed=2, free=1, device="cuda:0"),
            "out_of_memory",
            {"needed_bytes": 2, "free_bytes": 1, "device": "cuda:0"},
        ),
    ],
)
def test_each_error_becomes_its_failure(error, code, details):
    found = failure(error)
    assert (found.code, found.details, found.retry) == (code, details, False)
    assert "secret" not in found.message


@pytest.fixture
def replica(tmp_path):
    """An Nvdiffrec replica without Serve, on a store with the views of one fake job."""
    store = ArtifactStore(f"file://{tmp_path}/store")
    made = Nvdiffrec.func_or_class(store.url, "deployments.fakes:FakeOptimiser", {})
    made.reconfigure({"slice_s": 0.15, "warm_jobs": 1})
    return made


def call(replica, tmp_path, job: str = "a", **script) -> dict:
    views = replica.store.put_bytes(
        fakes.Script(**{"optimise_s": 0.4, "scratch": str(tmp_path), **script}).model_dump_json().encode(),
        f"jobs/{job}/views.safetensors",
    )
    return {"job_id": job, "options": {}, "views": views.json(), "checkpoint": None}


async def last(messages):
    return (await all_of(messages))[-1]


async def test_slices_go_on_warm_and_only_the_first_one_starts(replica, tmp_path):
    given = call(replica, tmp_path)
    steps, done = [], False
    while not done:
        made = (await last(replica.slice(given))).value
        given["checkpoint"], done = made["checkpoint"], made["done"]
        steps.append(made["step"])
        assert not made["resumed"]
    assert steps[-1] == fakes.PREVIEW_STEPS
    assert len(steps) >= 3
    assert not (tmp_path / "load").exists()
    finished = await last(replica.finish(given))
    assert isinstance(finished, Done)


async def test_another_replica_goes_on_from_the_checkpoint(replica, tmp_path):
    given = call(replica, tmp_path)
    first = (await last(replica.slice(given))).value
    other = Nvdiffrec.func_or_class(replica.store.url, "deployments.fakes:FakeOptimiser", {})
    other.reconfigure({"slice_s": 0.15})
    second = (await last(other.slice({**given, "checkpoint": first["checkpoint"]}))).value
    assert second["resumed"]
    assert second["step"] > first["step"]
    assert (tmp_path / "load").read_text().split()[1] == str(first["step"])


async def test_what_is_warm_but_not_what_was_recorded_is_not_used(replica, tmp_path):
    given = call(replica, tmp_path)
    first = (await last(replica.slice(given))).value
    await last(replica.slice({**given, "checkpoint": first["checkpoint"]}))  # the recording of this one was lost
    again = (await last(replica.slice({**given, "checkpoint": first["checkpoint"]}))).value
    assert again["resumed"]


async def test_a_second_job_pushes_the_first_out_of_memory(replica, tmp_path):
    one, two = call(replica, tmp_path, "one"), call(replica, tmp_path, "two")
    first = (await last(replica.slice(one))).value
    await last(replica.slice(two))
    assert list(replica.warm) == ["two"]
    assert (await last(replica.slice({**one, "checkpoint": first["checkpoint"]}))).value["resumed"]


async def test_memory_that_runs_out_is_given_back(replica, tmp_path):
    released = []
    replica.engine.release = lambda: released.append(True)
    message = await last(replica.slice(call(replica, tmp_path, fail="out_of_memory", optimise_s=0.04)))
    assert isinstance(message, Failed)
    assert message.code == "out_of_memory"
    assert released
    assert not replica.warm


def test_fake_results_are_valid():
    import trimesh

    mesh = trimesh.load_scene(trimesh.util.wrap_as_stream(fakes.tiny_glb()), file_type="glb").to_geometry()
    assert mesh.is_watertight
    assert mesh.volume > 0
    assert json.loads(fakes.fake_view(0, optimise_s=1.0)) == {"optimise_s": 1.0}
