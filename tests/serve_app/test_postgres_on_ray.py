"""The service on a real Ray with its jobs in PostgreSQL and its files in S3. `make test-stores` runs the rest so."""

import time

import pytest
from stores import stores_of

from serve_app.testing import RayService

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]


def test_the_conductor_dies_in_the_middle_of_a_job(request, tmp_path):
    stores = stores_of("cloud", request)
    with (
        RayService(tmp_path, lambda config: config["applications"][0]["args"].update(stores.args)) as service,
        service.client() as client,
    ):
        job_id = service.submit(client, tmp_path, {"formats": ["glb", "ply"]}, optimise_s=8, steps=80)
        queued = service.submit(client, tmp_path, optimise_s=0.2)
        follower = service.follow(client, job_id)
        service.await_step(client, job_id, 20)
        killed = time.monotonic()
        service.kill("Conductor")
        service.await_step(client, job_id, client.get(job_id).step + 1)
        resumed = time.monotonic() - killed
        print(f"resumed {resumed:.1f} s after the Conductor was killed")  # noqa: T201
        assert resumed <= 20
        service.assert_whole(client, job_id, follower.all())
        service.assert_whole(client, queued)
        files = client.download(job_id, tmp_path / "out")
        assert files["mesh.glb"].read_bytes()[:4] == b"glTF"
        assert "viewmesh_conductor_epoch 2.0" in client.http.get("/metrics").text
        assert not (tmp_path / "jobs.sqlite").exists()
        assert not (tmp_path / "artifacts").exists()
