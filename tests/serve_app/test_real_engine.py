"""The optimiser that ships, small, through the whole graph in one process: pictures on the way, files, a re-export."""

import asyncio
import hashlib
import io
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import synthetic_views as synthetic
import torch
import trimesh
from in_process import Running, running_service
from PIL import Image

from deployments.adapters import nvdiffrec as adapter
from viewmesh.export import preview
from viewmesh.nvdiffrec import presets, problem
from viewmesh.nvdiffrec.initial import initial_field

pytestmark = pytest.mark.asyncio(loop_scope="module")

SMALL = replace(
    adapter.preset("preview", "cpu"), lattice=14, shape_steps=24, shape_size=48, shape_batch=2, volume=(8, 16),
    light_size=8, texture_steps=8, texture_crop=64, texture_batch=2, target_faces=600, texture_size=256,
)  # fmt: skip


@dataclass
class Finished:
    running: Running
    job: dict[str, Any]
    pictures: dict[str, bytes]  # by URL, fetched while the job ran


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def finished(tmp_path_factory) -> AsyncIterator[Finished]:
    """A job that has succeeded."""
    folder, threads = tmp_path_factory.mktemp("real"), torch.get_num_threads()
    synthetic.write_views(folder / "capture", synthetic.around(12), size=(64, 64), f=96.0)
    files = [("views", (f.name, f.read_bytes())) for f in sorted((folder / "capture" / "views").iterdir())]
    files.append(("cameras", ("cameras.json", (folder / "capture" / "cameras.json").read_bytes())))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(problem, "initial_field", partial(initial_field, resolution=40))
        patch.setattr(presets, "preset", lambda name, device, **_: SMALL)
        patch.setattr(preview, "turntable_bytes", partial(preview.turntable_bytes, frames=4, side=64))
        async with running_service(folder / "data", fake=None, device="cpu", models=["nvdiffrec"]) as running:
            wishes = {"formats": ["glb"], "seed": 3}
            answer = await running.http.post(
                "/v1/reconstructions", files=files, data={"options": json.dumps(wishes)}, headers={"prefer": "wait=0"}
            )
            assert answer.status_code == 202, answer.text
            pictures, url = {}, f"/v1/reconstructions/{answer.json()['id']}"
            while (job := (await running.http.get(url)).json())["state"] in ("queued", "running"):
                await asyncio.sleep(0.05)
                picture = await running.http.get(f"{url}/artifacts/preview.png")
                if picture.status_code == 200:
                    assert picture.headers["content-type"] == "image/png"
                    pictures[hashlib.sha256(picture.content).hexdigest()] = picture.content
            assert job["state"] == "succeeded", job
            yield Finished(running, job, pictures)
    torch.set_num_threads(threads)


async def artifacts(running: Running, job: dict[str, Any]) -> dict[str, bytes]:
    """The bytes of each, which are what their sha256 says."""
    found = {}
    for artifact in job["artifacts"]:
        body = (await running.http.get(artifact["url"])).content
        assert hashlib.sha256(body).hexdigest() == artifact["sha256"]
        found[artifact["name"]] = body
    return found


def faces_of(glb: bytes) -> trimesh.Trimesh:
    return trimesh.load_scene(io.BytesIO(glb), file_type="glb").to_geometry()


async def test_each_slice_is_told_with_a_picture_of_the_object(finished: Finished):
    told = await finished.running.events(finished.job["id"])
    steps = [data["step"] for _, kind, data in told if kind == "preview"]
    assert steps == [24, 25, 26, 27, 35]
    assert finished.pictures
    for data in finished.pictures.values():
        pixels = np.asarray(Image.open(io.BytesIO(data)))
        assert pixels.shape == (256, 256, 4)
        assert 0.05 < (pixels[..., 3] > 127).mean() < 0.95


async def test_the_files_are_what_the_report_says(finished: Finished):
    files = await artifacts(finished.running, finished.job)
    report = json.loads(files["report.json"])
    assert len(faces_of(files["mesh.glb"]).faces) == report["faces"] <= SMALL.target_faces
    assert report["quality"]["mask_iou"] > 0.9
    assert (report["model"], report["seed"]) == ("nvdiffrec", 3)


async def test_another_format_and_size_without_running_the_model_again(finished: Finished):
    answer = await finished.running.http.post(
        f"/v1/reconstructions/{finished.job['id']}/exports",
        json={"formats": ["obj", "glb"], "target_faces": 200, "texture_size": 512},
        headers={"prefer": "wait=60"},
    )
    export = answer.json()
    assert (export["state"], export["parent"]) == ("succeeded", finished.job["id"]), export
    assert {a["stage"] for _, kind, a in await finished.running.events(export["id"]) if kind == "progress"} == {
        "export"
    }
    files = await artifacts(finished.running, export)
    assert {"mesh.obj", "mesh.mtl", "mesh.glb", "report.json"} <= set(files)
    before = faces_of((await artifacts(finished.running, finished.job))["mesh.glb"])
    after = faces_of(files["mesh.glb"])
    assert len(after.faces) <= 200 < len(before.faces)
    assert files["mesh.obj"].count(b"\nf ") == len(after.faces)
    assert np.allclose(after.bounds, before.bounds, atol=0.05)
    (texture,) = (body for name, body in files.items() if name == "texture.png")
    assert Image.open(io.BytesIO(texture)).size == (512, 512)
    report = json.loads(files["report.json"])
    assert report["faces"] == len(after.faces)
    assert report["quality"]["mask_iou"] > 0.85
