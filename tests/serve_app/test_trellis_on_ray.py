"""A generative model on a real Ray: a tiny checkpoint on the CPU, photos in, a GLB out."""

import io
import json
import time

import httpx
import pytest
import trimesh
from test_generative import WISHES, photos

from serve_app.testing import RayService
from viewmesh.trellis.tiny import write_tiny_trellis

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    weights = str(write_tiny_trellis(tmp_path_factory.mktemp("tiny")))

    def change(config: dict) -> None:
        args = config["applications"][0]["args"]
        args.update(fake=None, device="cpu", models=["trellis"], weights={"trellis": weights})
        deployments = config["applications"][0]["deployments"]
        deployments[:] = [d for d in deployments if d["name"] != "Nvdiffrec"]
        deployments.append({"name": "Trellis", "ray_actor_options": {"num_gpus": 0, "num_cpus": 0.5}})

    with RayService(tmp_path_factory.mktemp("service"), change) as running:
        yield running


def ready(client: httpx.Client) -> dict[str, dict]:
    """The models once trellis's replica runs; until then the service says that it is starting."""
    until = time.monotonic() + 60
    while True:
        models = {model["name"]: model for model in client.get("/v1/models").json()["models"]}
        if models["trellis"]["ready"]:
            return models
        assert "starting" in models["trellis"]["reason"]
        assert time.monotonic() < until
        time.sleep(0.5)


def test_photos_in_a_glb_out(service):
    with httpx.Client(base_url=service.url, timeout=120) as client:
        models = ready(client)
        assert {name for name, model in models.items() if model["ready"]} == {"trellis"}
        answer = client.post(
            "/v1/reconstructions",
            files=photos(),
            data={"options": json.dumps({**WISHES, "formats": ["glb"]})},
            headers={"prefer": "wait=100", "accept": "model/gltf-binary"},
        )
    assert answer.status_code == 200, answer.text[:500]
    assert answer.headers["content-type"] == "model/gltf-binary"
    scene = trimesh.load(io.BytesIO(answer.content), file_type="glb")
    assert len(scene.to_geometry().faces) == 300
