"""Several Ray nodes on this machine, GPUs in name only, and the service on them with engines that take time, not work.

(Ray's own AutoscalingCluster is not for this: it begins with `ray stop --force`, which ends every Ray of the machine,
and the wheel lacks the file it reads.) Each GPU node has one GPU; all that needs none is on the head.
"""

import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serve_app.client import Client
from serve_app.ingress import free_port
from serve_app.testing import RayService, deployment

MIB = 2**20


class Nodes:
    """A head and GPU nodes that can be added, drained and lost."""

    def __init__(self, count: int) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 2, "num_gpus": 0, "resources": {"head": 1}, "object_store_memory": 150 * MIB}
        head |= {"include_dashboard": True, "dashboard_port": free_port()}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.gpu: list[Any] = []
        for _ in range(count):
            self.add()

    def add(self) -> Any:
        node = self.cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=100 * MIB, wait=False)
        self.gpu.append(node)
        return node

    def remove(self, node: Any, *, lost: bool = False) -> None:
        """As the autoscaler of a cloud does it, or (`lost`) as a power cut does."""
        self.gpu.remove(node)
        self.cluster.remove_node(node, allow_graceful=not lost)


@contextmanager
def service_on(count: int, data: Path, change: Callable[[dict], None]) -> Iterator[tuple[Nodes, RayService, Client]]:
    """The service on a head and `count` GPU nodes."""
    made = Nodes(count)
    try:
        with RayService(data, change, address=made.cluster.address) as service, service.client() as client:
            yield made, service, client
    finally:
        made.cluster.shutdown()


def scaled(low: int, high: int, *, slots: int | None = None, **worker: Any) -> Callable[[dict], None]:
    """A change of the config: one GPU for each Nvdiffrec, low to high replicas of it, all else on the head."""

    def change(config: dict) -> None:
        for name in ("Router", "Conductor", "Preprocessor", "Exporter"):
            deployment(config, name)["ray_actor_options"] = {"num_cpus": 0, "resources": {"head": 0.01}}
        optimiser = deployment(config, "Nvdiffrec")
        optimiser["ray_actor_options"] = {"num_cpus": 0, "num_gpus": 1}
        optimiser["autoscaling_config"].update(min_replicas=low, max_replicas=high)
        optimiser.update(worker)
        deployment(config, "Conductor")["user_config"]["slots"] = {"nvdiffrec": slots or high}

    return change


def replicas(service: RayService, name: str = "Nvdiffrec") -> dict[str, tuple[int, str]]:
    """Those that run: id → (pid, node)."""
    found = service.status()["deployments"][name]["replicas"]
    return {r["replica_id"]: (r["pid"], r["node_id"]) for r in found if r["state"] == "RUNNING"}


def wanted(service: RayService, name: str = "Nvdiffrec") -> int:
    return service.status()["deployments"][name]["target_num_replicas"]


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true value; how long that took is the caller's to measure."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.3)
    raise AssertionError(f"not within {seconds:g} s: {what}")


def ledger(database: Path, ids: list[str]) -> Counter[str]:
    """How the jobs ended, by the job table, the event stream, the artifacts and the tally: `lost` has no end or another
    than success, `doubled` has two ends or two results."""
    with sqlite3.connect(database) as opened:
        states = dict(opened.execute("SELECT id, state FROM viewmesh_jobs"))
        events = opened.execute("SELECT job_id, type, count(*) FROM viewmesh_events GROUP BY job_id, type").fetchall()
        files = opened.execute("SELECT job_id, name, count(*) FROM viewmesh_artifacts GROUP BY job_id, name").fetchall()
        workflows = opened.execute("SELECT workflow_uuid, status FROM workflow_status").fetchall()
        tally = dict(opened.execute("SELECT label, value FROM viewmesh_tallies WHERE name = 'jobs'"))
    done = {job_id: count for job_id, kind, count in events if kind == "done"}
    twice = {job_id for job_id, _, count in files if count != 1}
    ended = Counter(workflow for workflow, status in workflows if status == "SUCCESS")
    found: Counter[str] = Counter(accepted=len(ids), counted=int(sum(tally.values())))
    for job_id in ids:
        found["lost"] += states.get(job_id) != "succeeded" or not done.get(job_id) or not ended[job_id]
        found["doubled"] += done.get(job_id, 0) > 1 or job_id in twice or ended[job_id] > 1
    found["doubled"] += len(ids) - len(set(ids))
    return found
