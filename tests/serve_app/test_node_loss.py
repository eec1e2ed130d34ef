"""One of two worker nodes is lost while both work. A cluster of three Ray nodes on this machine."""

import time

import pytest

from serve_app.testing import RayService, deployment

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]


def place(config: dict) -> None:
    """Optimisers on the worker nodes, one each; all else on the head."""
    for name in ("Router", "Conductor", "Preprocessor", "Exporter"):
        deployment(config, name)["ray_actor_options"] = {"num_cpus": 0, "resources": {"head": 0.01}}
    worker = deployment(config, "Nvdiffrec")
    worker["ray_actor_options"] = {"num_cpus": 0, "num_gpus": 0, "resources": {"work": 1}}
    worker["autoscaling_config"].update(min_replicas=2, max_replicas=2)
    deployment(config, "Conductor")["user_config"]["slots"] = {"nvdiffrec": 2}


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "resources": {"head": 1}, "object_store_memory": 150 * 2**20},
    )
    workers = [made.add_node(num_cpus=1, resources={"work": 1}, object_store_memory=100 * 2**20) for _ in range(2)]
    yield made, workers
    made.shutdown()


def test_a_worker_node_is_lost(cluster, tmp_path):
    made, workers = cluster
    with RayService(tmp_path, place, address=made.address) as service, service.client() as client:
        ids = [service.submit(client, tmp_path, {"seed": i}, optimise_s=20, steps=200) for i in range(2)]
        followers = [service.follow(client, job_id) for job_id in ids]
        for job_id in ids:
            service.await_step(client, job_id, 20)
        lost = time.monotonic()
        made.remove_node(workers[0], allow_graceful=False)
        steps = {job_id: client.get(job_id).step for job_id in ids}
        for job_id in ids:
            service.await_step(client, job_id, steps[job_id] + 1)
        assert time.monotonic() - lost <= 60
        for job_id, follower in zip(ids, followers, strict=True):
            service.assert_whole(client, job_id, follower.all(150))
        assert max(client.get(job_id).resumes for job_id in ids) >= 1
