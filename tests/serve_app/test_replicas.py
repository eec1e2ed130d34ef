"""What /v1/models says of a model whose replica starts, failed, runs, or is not wanted now."""

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest

from serve_app.models import MODELS
from serve_app.replicas import FRESH_S, OLD_S, Replicas, Seen, Watched, seen_in


def application(status: str, running: int, message: str = "") -> SimpleNamespace:
    found = SimpleNamespace(status=status, replica_states={"RUNNING": running, "STARTING": 1}, message=message)
    idle = SimpleNamespace(status="HEALTHY", replica_states={"RUNNING": 1}, message="")
    return SimpleNamespace(deployments={"Trellis": found, "Conductor": idle})


@pytest.mark.parametrize(
    ("status", "running", "ready", "reason"),
    [
        ("HEALTHY", 1, True, ""),
        ("UPDATING", 1, True, ""),
        ("UPDATING", 0, False, "starting"),
        ("HEALTHY", 0, True, "on demand"),
        ("UPSCALING", 0, True, "on demand"),
        ("DEPLOY_FAILED", 0, False, "needs about 6.0 GB, 2.0 GB are free"),
        ("UNHEALTHY", 0, False, "needs about 6.0 GB, 2.0 GB are free"),
    ],
)
def test_readiness_of_a_deployment(status, running, ready, reason):
    message = "The deployment failed to start 3 times:\n\nTrellis needs about 6.0 GB, 2.0 GB are free\n"
    other = SimpleNamespace(deployments={"Trellis": None})
    found = seen_in({"other": other, "viewmesh": application(status, running, message)})["Trellis"]
    state = found.readiness()
    assert state.ready == ready
    assert reason in state.reason


async def test_nothing_is_seen_outside_a_cluster_and_a_lost_controller_is_no_error(monkeypatch):
    assert await Replicas().seen() == {}

    def lost():
        raise RuntimeError("the controller is away")

    monkeypatch.setattr("serve_app.replicas._look", lost)
    assert await Replicas().seen() == {}


async def test_a_controller_that_does_not_answer_holds_one_thread(monkeypatch):
    over, looking = threading.Event(), []
    monkeypatch.setattr("serve_app.replicas._look", lambda: looking.append(1) or over.wait(30))
    monkeypatch.setattr("serve_app.replicas.PATIENCE_S", 0.02)
    replicas = Replicas()
    try:
        for _ in range(4):
            assert await replicas._see() == {}
        assert len(looking) == 1
    finally:
        over.set()


async def test_the_controller_is_asked_now_and_then(monkeypatch):
    asked = []
    monkeypatch.setattr("serve_app.replicas._look", lambda: asked.append(1) or {"Trellis": Seen("HEALTHY", len(asked))})
    replicas = Replicas()
    for _ in range(5):
        assert (await replicas.seen())["Trellis"].running == 1
    assert len(asked) == 1


@pytest.mark.parametrize(("status", "waits"), [("UPDATING", True), ("UNHEALTHY", False), ("DEPLOY_FAILED", False)])
async def test_a_model_is_broken_where_nothing_answers_and_nothing_is_about_to(monkeypatch, status, waits):
    monkeypatch.setattr("serve_app.replicas._look", lambda: {"Trellis": Seen(status, 0, "no memory")})
    broken = await Replicas().broken([MODELS["trellis"], MODELS["nvdiffrec"]])
    assert list(broken) == ([] if waits else ["trellis"])


async def test_what_a_worker_says_of_its_models_is_kept_while_it_is_busy(monkeypatch):
    said = [{"trellis": {}, "reconviagen": {"reason": "no memory", "hint": "make some"}}]

    async def ask():
        if not said:
            raise TimeoutError
        return said.pop()

    monkeypatch.setattr("serve_app.replicas._look", lambda: {"Trellis": Seen("HEALTHY", 1)})
    replicas = Replicas(ask)
    for _ in range(2):
        assert (await replicas.readiness(MODELS["trellis"])).ready
        assert (await replicas.readiness(MODELS["reconviagen"])).reason == "no memory"
        assert list(await replicas.broken(MODELS.values())) == ["reconviagen"]
        replicas._held.at = -10.0


async def test_what_is_a_little_old_is_answered_at_once_and_new_for_the_next_request():
    asked, answer = [], asyncio.Event()

    async def ask() -> int:
        asked.append(1)
        await answer.wait()
        return len(asked)

    watched = Watched(ask, 0)
    answer.set()
    assert await watched.get() == 1  # the first waits
    answer.clear()
    watched.at = time.monotonic() - (FRESH_S + OLD_S) / 2
    assert [await watched.get(), await watched.get()] == [1, 1]  # though nobody answers
    answer.set()
    await asyncio.sleep(0.01)
    assert await watched.get() == 2
    watched.at = time.monotonic() - 2 * OLD_S
    assert await watched.get() == 3  # too old: waits again
