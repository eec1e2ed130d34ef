"""How a step tries again: lost workers, busy deployments, and when it gives up. Fake handles, no Ray."""

import asyncio

import pytest
import ray.exceptions
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from deployments.artifacts import ArtifactStore
from deployments.messages import Done, Failed, Progress
from serve_app import stages
from serve_app.jobs import JobStore, NewJob, new_id
from serve_app.seats import Seats
from serve_app.stages import MAX_DEVICE_LOSSES, MAX_LOSSES, Calls
from viewmesh.weights.ready import Readiness


class Handle:
    """Plays one script per call: messages to yield, or an error to raise."""

    def __init__(self, *scripts):
        self.scripts, self.calls = list(scripts), []

    def options(self, **options):
        self.given = options
        return self

    def remote(self, call):
        self.calls.append(call)
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        return Response(script)


class Response:
    def __init__(self, script):
        self.script, self.cancelled = script, False

    def cancel(self):
        self.cancelled = True

    async def __aiter__(self):
        for item in self.script:
            if callable(item):
                item()
                continue
            if isinstance(item, Exception):
                raise item
            yield item


DONE = [Progress("x", 1, 2), Done({"x": 1, "seconds": 1.0})]
DEAD = [Progress("x", 1, 2), ray.exceptions.ActorDiedError()]
LOST_DEVICE = [Failed("device_lost", "gone", retry=True)]


@pytest.fixture
def play(tmp_path, monkeypatch):
    async def no_pause(seconds, pause=asyncio.sleep):
        await pause(0)

    monkeypatch.setattr(stages.asyncio, "sleep", no_pause)
    store = JobStore(f"sqlite:///{tmp_path}/jobs.sqlite")
    store.create()

    async def play(*scripts, cancel=False, because="", models=("nvdiffrec",), broken=None):
        result = {"facts": {"chosen_because": because}}
        new = NewJob(new_id(), "ann", "reconstruction", "nvdiffrec", {}, {}, "h", result=result)
        row, _ = store.accept(new, lambda *a: None)
        play.store, play.job_id = store, row["id"]
        store.start(row["id"])
        if cancel:
            play.cancel()
        handle = Handle(*scripts)

        async def unusable() -> dict[str, Readiness]:
            return broken or {}

        artifacts, seats = ArtifactStore(f"file://{tmp_path}/a"), Seats()
        served = dict.fromkeys(models, handle)
        seats.set(lambda model: 1)
        calls = Calls(store, artifacts, handle, handle, served, seats, None, unusable)
        job = {
            "id": row["id"],
            "model": "nvdiffrec",
            "options": {},
            "inputs": {},
            "result": result,
            "kind_of_model": "optimiser",
        }
        play.calls, play.job = calls, job
        return await calls.prepare(job), handle

    play.cancel = lambda: store.cancel(play.job_id, None)
    yield play
    store.close()


@pytest.mark.parametrize(
    "trouble",
    [
        DEAD,
        [ray.exceptions.ActorUnavailableError("away", None)],
        [BackPressureError(1, 1)],
        [DeploymentUnavailableError("x")],
        LOST_DEVICE,
        [Failed("worker_unfit", "soon", retry=True)],
        [Failed("store_unavailable", "later", retry=True)],
        [RuntimeError("the handle is closed")],
        [Progress("x", 1, 2)],
    ],
)
async def test_trouble_that_passes_is_waited_out(play, trouble):
    value, handle = await play(trouble, trouble, DONE)
    assert value == {"x": 1, "seconds": 1.0}
    assert len(handle.calls) == 3


@pytest.mark.parametrize(
    ("trouble", "code", "tries"),
    [
        (DEAD, "worker_lost", MAX_LOSSES),
        (LOST_DEVICE, "device_lost", MAX_DEVICE_LOSSES),
        ([Failed("invalid_input", "bad")], "invalid_input", 1),
        ([RuntimeError("always")], "worker_lost", MAX_LOSSES),
    ],
)
async def test_trouble_that_stays_fails_the_job(play, trouble, code, tries):
    value, handle = await play(trouble)
    assert value["failed"]["code"] == code
    assert len(handle.calls) == tries


@pytest.mark.parametrize("stage", ["generate", "slice", "finish"])
async def test_a_job_of_a_model_that_is_no_longer_served_is_told_so(play, stage):
    await play(DONE, models=())
    given = {"generate": (None,), "slice": (None, None, None, False), "finish": (None, {}, False)}[stage]
    made = await getattr(play.calls, stage)(play.job, *given)
    assert made["failed"]["code"] == "model_missing"
    assert "no longer serves" in made["failed"]["message"]


NO_POSES = [Failed("unposed_views", "3 of 4 views could not be posed.")]


@pytest.mark.parametrize(
    ("because", "served", "model"),
    [("4 views are enough", True, "trellis"), ("4 views are enough", False, "nvdiffrec"), ("", True, "nvdiffrec")],
)
async def test_auto_goes_on_with_trellis_where_no_cameras_were_found(play, because, served, model):
    models = ("nvdiffrec", "trellis") if served else ("nvdiffrec",)
    value, handle = await play(NO_POSES, DONE, because=because, models=models)
    row = play.store.get(play.job_id)
    assert row["model"] == model
    if model == "trellis":
        assert value["x"] == 1
        assert value["job"] == {"model": "trellis", "options": {"model": "trellis"}, "kind_of_model": "generator"}
        assert [call["options"].get("model") for call in handle.calls] == [None, "trellis"]
        assert "could not be posed" in row["result"]["facts"]["chosen_because"]
    else:
        assert value["failed"]["code"] == "unposed_views"


async def test_auto_does_not_go_on_with_a_model_that_has_no_worker(play):
    broken = {"trellis": Readiness(False, "Its replica does not start: no memory.")}
    value, handle = await play(NO_POSES, because="4 views", models=("nvdiffrec", "trellis"), broken=broken)
    assert value["failed"]["code"] == "unposed_views"
    assert "no memory" in value["failed"]["hint"]
    assert len(handle.calls) == 1


async def test_a_deployment_that_never_comes_is_given_up(play, monkeypatch):
    monkeypatch.setattr(stages, "MAX_WAIT_S", 0.05)
    value, _ = await play([DeploymentUnavailableError("x")])
    assert value["failed"]["code"] == "no_worker"


@pytest.mark.parametrize("tries", [0, 1])
async def test_a_cancelled_job_is_not_tried_or_not_again(play, tries):
    """Also where only its row says so: its workflow could not be told."""
    value, handle = await play([play.cancel, *DEAD], cancel=tries == 0)
    assert value["failed"]["code"] == "cancelled"
    assert len(handle.calls) == tries
