"""A generative model on a real Ray: a tiny checkpoint on the CPU, photos in, a GLB out; and one that is refined."""

import io
import json
import time

import httpx
import numpy as np
import pytest
import trimesh
from PIL import Image
from test_generative import WISHES, photos

from serve_app.testing import RayService, deployment
from viewmesh.geometry.camera import canonical6
from viewmesh.trellis.tiny import write_tiny_reconviagen, write_tiny_trellis

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    trellis = write_tiny_trellis(tmp_path_factory.mktemp("trellis"))
    reconviagen = write_tiny_reconviagen(tmp_path_factory.mktemp("reconviagen"))
    places = {"trellis": str(trellis), "reconviagen": str(reconviagen), "vggt-object": str(reconviagen / "vggt")}

    def change(config: dict) -> None:
        args = config["applications"][0]["args"]
        args.update(fake=None, device="cpu", models=["nvdiffrec", "trellis", "reconviagen"], weights=places)
        worker = {"ray_actor_options": {"num_gpus": 0, "num_cpus": 0.1}, "user_config": {"models": ["trellis"]}}
        config["applications"][0]["deployments"].append({"name": "Trellis", **worker})

    with RayService(tmp_path_factory.mktemp("service"), change) as running:
        yield running


@pytest.fixture
def client(service):
    with httpx.Client(base_url=service.url, timeout=120) as client:
        yield client


def ready(client: httpx.Client, *names: str, reason: str = "starting") -> dict[str, dict]:
    """The models once those named are ready; until then the service says why not."""
    until = time.monotonic() + 90
    while True:
        models = {model["name"]: model for model in client.get("/v1/models").json()["models"]}
        waiting = [models[name] for name in names if not models[name]["ready"]]
        if not waiting:
            return models
        assert all(reason in model["reason"] for model in waiting), waiting
        assert time.monotonic() < until
        time.sleep(0.5)


def test_photos_in_a_glb_out(client):
    models = ready(client, "nvdiffrec", "trellis")
    assert {name for name, model in models.items() if model["ready"]} == {"nvdiffrec", "trellis"}
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


def balls(radius: float = 0.4, size: int = 96) -> list[tuple[str, tuple[str, bytes]]]:
    """The six canonical views of a ball, which is about what a network of random weights makes here."""
    rig, files = canonical6(size, size), []
    x = (np.arange(size) + 0.5 - size / 2) / float(rig.fx[0])
    for i, pose in enumerate(rig.world_from_camera.numpy()):
        rays = np.stack([*np.broadcast_arrays(x[None], -x[:, None]), -np.ones((size, size))], -1) @ pose[:3, :3].T
        eye = pose[:3, 3]
        a, b, c = (rays * rays).sum(-1), rays @ eye, eye @ eye - radius**2
        inside = b * b - a * c
        t = (-b - np.sqrt(inside.clip(0))) / a
        normal = (eye + t[..., None] * rays) / radius
        pixels = np.zeros((size, size, 4), np.uint8)
        pixels[..., :3] = (128 + 90 * np.sin(6 * normal)).clip(0, 255)
        pixels[..., 3] = (inside > 0) * 255
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        files.append(("views", (f"view_{i:02d}.png", file.getvalue())))
    return files


def test_a_generated_mesh_is_refined_against_the_six_views(client):
    ready(client, "nvdiffrec", "trellis")
    wishes = {**WISHES, "refine": True, "formats": ["glb"], "views": {"rig": "canonical6"}}
    answer = client.post("/v1/reconstructions", files=balls(), data={"options": json.dumps(wishes)})
    assert answer.status_code == 202, answer.text
    url, until = answer.headers["location"], time.monotonic() + 900
    while (job := client.get(url).json())["state"] in ("queued", "running"):
        assert time.monotonic() < until, job
        time.sleep(1)
    assert job["state"] == "succeeded", job["error"]
    artifact = next(a for a in job["artifacts"] if a["name"] == "report.json")
    report = client.get(artifact["url"]).json()
    found = report["refinement"]
    assert found["cameras"] == "canonical6"
    assert found["registration"]["silhouette_iou"] > 0.6
    better = all(found["after"][name] > found["before"][name] for name in ("psnr_db", "mask_iou"))
    assert found["kept"] == better
    assert found["kept"], found  # random colours are easily made better
    assert report["quality"]["mask_iou"] > 0.8
    assert {"generate", "optimise"} <= report["seconds"].keys()
    with client.stream("GET", f"{url}/events") as stream:
        told = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
    stages = [data["stage"] for data in told if "percent" in data]
    assert list(dict.fromkeys(stages))[:3] == ["prepare", "generate", "optimise"]


def test_an_edit_of_the_user_config_loads_the_other_model_without_a_restart(service, client):
    before = ready(client, "nvdiffrec", "trellis")
    assert "does not hold reconviagen" in before["reconviagen"]["reason"]
    assert "user_config.models" in before["reconviagen"]["hint"]
    worker = service.pids("Trellis")

    def both(config: dict) -> None:
        deployment(config, "Trellis")["user_config"]["models"] = ["trellis", "reconviagen"]

    service.deploy(both)
    ready(client, "nvdiffrec", "trellis", "reconviagen", reason="does not hold reconviagen")
    assert service.pids("Trellis") == worker
    wishes = {**WISHES, "model": "reconviagen", "formats": ["glb"]}
    answer = client.post(
        "/v1/reconstructions", files=photos(), data={"options": json.dumps(wishes)}, headers={"prefer": "wait=100"}
    )
    assert answer.json()["state"] == "succeeded", answer.text
