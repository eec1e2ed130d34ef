"""Replicas follow the queue, nodes follow the replicas, and no job is lost to either. Ray nodes on this machine."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from simulated_cluster import ledger, replicas, scaled, service_on, until, wanted

from serve_app.testing import RayService, deployment

pytestmark = [pytest.mark.ray, pytest.mark.scale, pytest.mark.timeout(600)]

SLICE_S = 1.0
STEP_S = 0.1


def eager(low: int, high: int, **more: Any):
    """Scaling with a short memory, so that a test need not wait for minutes."""
    change = scaled(low, high, **more)

    def changed(config: dict) -> None:
        change(config)
        quick = {"look_back_period_s": 11, "upscale_delay_s": 1, "downscale_delay_s": 4, "downscale_to_zero_delay_s": 4}
        deployment(config, "Nvdiffrec")["autoscaling_config"].update(quick)

    return changed


def submit(service: RayService, client: Any, folder: Path, count: int, seconds: float) -> list[str]:
    def one(i: int) -> str:
        scratch = folder / f"scratch-{time.monotonic_ns()}-{i}"
        scratch.mkdir()
        script = {"optimise_s": seconds, "steps": round(seconds / STEP_S), "scratch": str(scratch)}
        return service.submit(client, folder, {"seed": i}, **script)

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(one, range(count)))


def repeated(folder: Path) -> list[int]:
    """Steps that each job did more than once."""
    found = []
    for file in folder.glob("scratch-*/step"):
        steps = [line.split()[1] for line in file.read_text().splitlines()]
        found.append(len(steps) - len(set(steps)))
    return found


def test_one_to_four_nodes_under_load_and_back_to_none(tmp_path, record_property):
    with service_on(1, tmp_path / "data", eager(0, 4)) as (nodes, service, client):
        assert replicas(service) == {}  # scaled to zero: nothing holds a GPU before there is work
        began = time.monotonic()
        first = submit(service, client, tmp_path, 1, 3)
        until(lambda: replicas(service), 60, "a cold start")
        record_property("cold start, s", round(time.monotonic() - began, 1))
        client.wait(first[0])

        jobs = submit(service, client, tmp_path, 24, 12)
        until(lambda: wanted(service) == 4, 60, "the queue asks for four replicas")
        record_property("from the queue to four replicas wanted, s", round(time.monotonic() - began, 1))
        for count in (2, 3, 4):  # as a cluster's autoscaler would: a node for each replica that waits for a GPU
            nodes.add()
            until(lambda n=count: len(replicas(service)) == n, 60, f"{count} replicas")
        assert len({node for _, node in replicas(service).values()}) == 4, "one replica on each node"

        for _ in range(2):  # nodes go while they work
            service.await_step(client, next(i for i in jobs if client.get(i).state == "running"))
            nodes.remove(nodes.gpu[-1])
            time.sleep(4)
        assert all(client.get(i).state in ("queued", "running", "succeeded") for i in jobs)
        nodes.add()
        for job_id in jobs:
            service.assert_whole(client, job_id)
        found = ledger(tmp_path / "data" / "jobs.sqlite", first + jobs)
        assert (found["lost"], found["doubled"], found["counted"]) == (0, 0, 25)
        # A node that goes takes at most the slice in hand with it, and the half step before it.
        assert max(repeated(tmp_path)) <= SLICE_S / STEP_S + 1, repeated(tmp_path)

        until(lambda: not replicas(service) and wanted(service) == 0, 90, "back to none")
        while nodes.gpu:
            nodes.remove(nodes.gpu[-1])


def test_a_downscale_costs_a_job_at_most_a_slice(tmp_path):
    """Four replicas are busy, then three jobs end: Serve stops replicas without a look at which of them works."""
    with service_on(4, tmp_path / "data", eager(1, 4)) as (_, service, client):
        short = submit(service, client, tmp_path, 3, 25)
        long = submit(service, client, tmp_path, 1, 75)
        until(lambda: len(replicas(service)) == 4, 90, "four replicas for four jobs")
        for job_id in short:
            service.assert_whole(client, job_id)
        until(lambda: len(replicas(service)) == 1, 60, "one replica for one job")
        assert client.get(long[0]).state == "running"
        service.assert_whole(client, long[0])
        assert max(repeated(tmp_path)) <= SLICE_S / STEP_S + 1


def test_as_many_jobs_as_replicas_leave_none_idle(tmp_path):
    """With Serve's own consistent hashing one wave in three took twice as long: two jobs took turns on one replica."""
    with service_on(4, tmp_path / "data", scaled(4, 4)) as (_, service, client):
        until(lambda: len(replicas(service)) == 4, 90, "four replicas")
        for _ in range(4):
            began = time.monotonic()
            jobs = [client.wait(job_id) for job_id in submit(service, client, tmp_path, 4, 8)]
            assert time.monotonic() - began < 15  # 16 s and more if one waits for another
            assert [job.resumes for job in jobs] == [0, 0, 0, 0]


def test_200_jobs_while_a_node_is_lost_and_one_is_added(tmp_path):
    with service_on(4, tmp_path / "data", scaled(4, 4)) as (nodes, service, client):
        until(lambda: len(replicas(service)) == 4, 90, "four replicas")
        with ThreadPoolExecutor(4) as pool:

            def one(i: int) -> str:
                return service.submit(client, tmp_path, {"seed": i}, optimise_s=1.5, steps=15)

            ids = [*pool.map(one, range(200))]

        def over() -> int:
            return sum(client.get(job_id).state == "succeeded" for job_id in ids)

        until(lambda: over() >= 20, 120, "20 jobs done")
        before = replicas(service)
        nodes.remove(nodes.gpu[0], lost=True)
        until(lambda: over() >= 60, 180, "60 jobs done without the node")
        nodes.add()
        until(lambda: len(replicas(service).keys() - before.keys()) >= 1, 90, "a replica on the new node")
        until(lambda: over() == 200, 300, "all jobs done")
        found = ledger(tmp_path / "data" / "jobs.sqlite", ids)
        assert found == {"accepted": 200, "counted": 200, "lost": 0, "doubled": 0}, found
