"""Housekeeping: what has expired goes, what nobody refers to goes, and one bad file keeps nothing else."""

import os
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.artifacts import ArtifactStore, StoreError
from serve_app.conductor import Conductor
from serve_app.jobs import JobStore, NewJob, new_id


@pytest.fixture
def sweeper(tmp_path):
    made = object.__new__(Conductor.func_or_class)
    made.store = JobStore(f"sqlite:///{tmp_path}/jobs.sqlite")
    made.store.create()
    made.artifacts = ArtifactStore(f"file://{tmp_path}/artifacts")
    made.workflows = SimpleNamespace(delete=lambda ids: None, over=lambda ids: {})
    made.lease = SimpleNamespace(require=lambda: None)
    yield made
    made.store.close()


def job_of(sweeper: Any, end: str = "succeeded", expires: float | None = None, **more: Any) -> str:
    """A job with a file of its own."""
    job = NewJob(new_id(), "ann", "reconstruction", "nvdiffrec", {}, more.pop("inputs", {}), "h", **more)
    sweeper.store.accept(job, lambda *args: None)
    sweeper.store.start(job.id)
    if end == "succeeded":
        sweeper.store.succeed(job.id, [], {}, expires)
    elif end == "failed":
        sweeper.store.fail(job.id, {"code": "x"}, expires)
    elif end == "cancelled":
        sweeper.store.cancel(job.id, expires)
    aged(sweeper, f"jobs/{job.id}/views")
    return job.id


def aged(sweeper: Any, key: str) -> str:
    """A file that was written long ago, in a folder as old."""
    sweeper.artifacts.put_bytes(b"x", key)
    path = sweeper.artifacts.path(key)
    for at in (path, os.path.dirname(path)):
        os.utime(at, (1, 1))
    return key


def test_a_file_that_cannot_be_removed_keeps_nothing_else(sweeper, monkeypatch):
    stuck = "inputs/aa/stuck"
    old = [
        job_of(sweeper, expires=1.0, inputs={"views/0.png": {"key": key, "sha256": "a", "size": 1}})
        for key in (aged(sweeper, stuck), aged(sweeper, "inputs/bb/b"))
    ]
    orphans = [aged(sweeper, key) for key in ("jobs/nobody/views", "tmp/a", "tmp/b", "tmp/c")]
    remove, refused = sweeper.artifacts.remove, {stuck, "tmp/b"}

    def removing(key: str) -> None:
        if key in refused:
            raise StoreError(f"Could not delete {key}: Permission denied.")
        remove(key)

    monkeypatch.setattr(sweeper.artifacts, "remove", removing)
    sweeper.sweep()
    assert [bool(sweeper.store.get(job_id)) for job_id in old] == [True, False]
    assert [key for key in orphans if sweeper.artifacts.exists(key)] == ["tmp/b"]
    refused.clear()
    sweeper.sweep()
    assert sweeper.store.get(old[0]) is None
    assert not any(sweeper.artifacts.exists(key) for key in (stuck, "tmp/b"))


def test_a_store_that_cannot_be_reached_ends_the_sweep_after_the_jobs_were_looked_at(sweeper, monkeypatch):
    for _ in range(3):
        job_of(sweeper, expires=1.0)
    asked, looked = [], []

    def away(key: str) -> None:
        asked.append(key)
        raise StoreError("Could not reach the store.")

    monkeypatch.setattr(sweeper.artifacts, "remove", away)
    monkeypatch.setattr(sweeper.artifacts, "exists", away)
    monkeypatch.setattr(sweeper, "_reconcile", lambda: looked.append(True), raising=False)
    with pytest.raises(StoreError):
        sweeper.sweep()
    assert len(asked) == 2  # one file, and whether it is that file
    assert looked


def test_an_old_input_that_nobody_uses_goes_also_where_others_come_in(sweeper):
    old, new = aged(sweeper, "inputs/aa/old"), "inputs/aa/new"
    used = aged(sweeper, "inputs/aa/used")
    job_of(sweeper, inputs={"views/0.png": {"key": used, "sha256": "a", "size": 1}})
    sweeper.artifacts.put_bytes(b"x", new)  # and its folder is young
    sweeper.sweep()
    assert [sweeper.artifacts.exists(key) for key in (old, new, used)] == [False, True, True]


def test_what_a_worker_wrote_after_its_job_failed_or_was_cancelled_goes(sweeper):
    left = {end: job_of(sweeper, end) for end in ("succeeded", "running", "failed", "cancelled")}
    sweeper.sweep()
    assert [end for end, job_id in left.items() if sweeper.artifacts.exists(f"jobs/{job_id}")] == [
        "succeeded",
        "running",
    ]
    assert all(sweeper.store.get(job_id) for job_id in left.values())


def test_more_jobs_are_asked_for_than_a_statement_takes_parameters(sweeper):
    kept = job_of(sweeper)
    assert sweeper.store.with_files([*map(str, range(300_000)), kept]) == {kept}
