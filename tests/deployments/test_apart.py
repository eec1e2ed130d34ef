"""Calls in processes of their own: what comes back, what is raised, and what happens when they die."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deployments.adapters.apart import Apart
from viewmesh.errors import Cancelled, OutOfMemory
from viewmesh.progress import check, never, silent


def work(given: dict[str, Any], progress: Any, cancelled: Any) -> dict[str, Any]:
    progress("texture", 1, 4, loss=0.5)
    if given.get("raises"):
        raise OutOfMemory("it", needed=2**30, free=0, device="cuda")
    if given.get("dies", os.getpid()) != os.getpid():
        os._exit(3)
    time.sleep(given.get("hangs", 0.0))
    until = time.monotonic() + given.get("seconds", 0.0)
    while time.monotonic() < until:
        check(cancelled)
        time.sleep(0.01)
    return {"pid": os.getpid(), "given": given}


def noted() -> None:
    os.environ["BEFORE"] = "1"


def of_the_process(given: dict[str, Any], progress: Any, cancelled: Any) -> dict[str, Any]:
    return {"before": os.environ.get("BEFORE"), "after": os.environ.get("AFTER")}


def noted_after() -> None:
    os.environ["AFTER"] = "1"


@contextmanager
def started(apart: Apart, count: int = 1) -> Iterator[Apart]:
    apart.start(count)
    try:
        yield apart
    finally:
        apart.stop()


@pytest.fixture(scope="module")
def two() -> Iterator[Apart]:
    with started(Apart(work), 2) as apart:
        yield apart


def test_a_call_runs_elsewhere_and_tells_its_progress(two: Apart):
    told = []
    found = two({"x": 1}, lambda *a, **m: told.append((a, m)), never)
    assert found["pid"] != os.getpid()
    assert found["given"] == {"x": 1}
    assert told == [(("texture", 1, 4), {"loss": 0.5})]


def test_without_processes_it_runs_here():
    assert Apart(work)({}, silent, never)["pid"] == os.getpid()


def test_calls_beyond_the_processes_wait_for_one(two: Apart):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(two({"seconds": 0.4}, silent, never)["pid"])) for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 5
    assert set(found) == {helper.process.pid for helper in two.helpers}


def test_a_call_that_waits_for_a_process_can_leave(two: Apart):
    threads = [threading.Thread(target=lambda: two({"seconds": 1.0}, silent, never)) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    began = time.monotonic()
    with pytest.raises(Cancelled):
        two({}, silent, lambda: True)
    assert time.monotonic() - began < 0.6
    for thread in threads:
        thread.join()


def test_an_error_keeps_its_type_and_its_figures_and_the_process_goes_on(two: Apart):
    with pytest.raises(OutOfMemory) as caught:
        two({"raises": True}, silent, never)
    assert caught.value.needed == 2**30
    assert two({}, silent, never)["pid"] != os.getpid()


def test_a_cancelled_call_ends_soon_and_the_next_is_not_cancelled(two: Apart):
    began = time.monotonic()
    with pytest.raises(Cancelled):
        two({"seconds": 30.0}, silent, lambda: time.monotonic() > began + 0.3)
    assert time.monotonic() - began < 5
    for _ in range(2):
        assert two({"seconds": 0.3}, silent, never)["pid"] != os.getpid()


def test_a_stop_that_comes_too_late_stops_nobody():
    with started(Apart(work)) as apart:
        apart({}, silent, never)
        apart.helpers[0].connection.send(None)
        assert apart({"seconds": 0.2}, silent, never)["pid"] != os.getpid()


def test_what_a_dead_process_left_is_done_here_and_another_takes_its_place():
    with started(Apart(work)) as apart:
        dead = apart.helpers[0].process
        assert apart({"dies": os.getpid()}, silent, never)["pid"] == os.getpid()
        assert dead.exitcode == 3
        assert apart({}, silent, never)["pid"] not in (os.getpid(), dead.pid)


def test_one_that_hangs_is_killed_and_one_that_works_long_is_not():
    with started(Apart(work, quiet_s=2.5)) as apart:
        first = apart({"seconds": 4.0}, silent, never)["pid"]
        with pytest.raises(RuntimeError, match="said nothing"):
            apart({"hangs": 60.0}, silent, never)
        assert not Path(f"/proc/{first}").exists()
        assert apart({}, silent, never)["pid"] not in (first, os.getpid())


def test_whoever_cannot_tell_progress_on_leaves_no_process_at_work():
    with started(Apart(work)) as apart:
        pid = apart({}, silent, never)["pid"]
        with pytest.raises(ZeroDivisionError):
            apart({"seconds": 60.0}, lambda *a, **m: 1 / 0, never)
        assert not Path(f"/proc/{pid}").exists()
        assert apart({}, silent, never)["pid"] != os.getpid()


def test_before_and_after():
    with started(Apart(of_the_process, before=noted, after=noted_after)) as apart:
        assert apart({}, silent, never) == {"before": "1", "after": None}
        assert apart({}, silent, never) == {"before": "1", "after": "1"}
    assert "BEFORE" not in os.environ
