"""`refine` from files to files, on a network of random weights: it makes nothing like the views."""

import json

import numpy as np
import pytest
import synthetic_views as synthetic
import torch
from tiny_command import shrink

from viewmesh import refine
from viewmesh.geometry.camera import Cameras
from viewmesh.nvdiffrec import register
from viewmesh.nvdiffrec.register import Plan
from viewmesh.options import Options
from viewmesh.reconstruct import reconstruct
from viewmesh.trellis.preprocess import reconviagen_image
from viewmesh.trellis.tiny import write_tiny_trellis
from viewmesh.trellis.view_cameras import in_views

WISHES = Options(
    model="trellis", refine=True, steps=1, target_faces=300, texture_size=256, formats=("glb", "gaussian_ply")
)  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_tiny_trellis(tmp_path_factory.mktemp("tiny-trellis"))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink(monkeypatch.setattr)
    monkeypatch.setattr(refine, "PLAN", Plan(rotations=64, candidates=2, coarse_steps=1, finalists=1, fine_size=48))


def report_of(tmp_path, weights) -> dict:
    files = reconstruct(tmp_path, tmp_path / "out", WISHES, device="cpu", weights={"trellis": weights})
    assert "gaussians.ply" in files
    return json.loads(files["report.json"].read_text())


def test_a_generated_mesh_among_posed_views(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(register, "ENOUGH_IOU", 0.0)
    synthetic.write_views(tmp_path, synthetic.around(6), size=(64, 64), f=96.0, depth=True)
    report = report_of(tmp_path, weights)
    found = report["refinement"]
    assert found["registration"]["scale"] > 0
    assert found["registration"]["depth_error"] is not None
    better = all(found["after"][name] >= found["before"][name] - 1e-3 for name in ("psnr_db", "mask_iou"))
    assert found["kept"] == better
    assert bool(found["reason"]) != found["kept"]
    assert report["quality"]["views"] == 6
    assert "refine" in report["seconds"]


def test_a_mesh_that_agrees_with_nothing_is_handed_out_as_it_came(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(register, "ENOUGH_IOU", 1.1)
    synthetic.write_views(tmp_path, synthetic.around(6), size=(64, 64), f=96.0)
    report = report_of(tmp_path, weights)
    assert not report["refinement"]["kept"]
    assert report["refinement"]["registration"] is not None
    assert report["quality"] is None  # it is not among the cameras
    assert any("silhouettes" in warning for warning in report["warnings"])


def test_views_that_cannot_be_posed_are_a_warning(weights, tmp_path):
    synthetic.write_views(tmp_path, synthetic.around(2), size=(64, 64), f=96.0, cameras=None)
    report = report_of(tmp_path, weights)
    assert "no cameras" in report["refinement"]["reason"]
    assert any("Structure from motion" in warning for warning in report["warnings"])


def test_cameras_of_crops_are_cameras_of_the_views():
    """A pixel of the crop and the pixel of the view that it was cut from look the same way."""
    from PIL import Image

    views = synthetic.viewset(synthetic.around(3))
    assert views.cameras is not None
    size = 40
    images = views.images.clone()
    focal, centre = (torch.full((3,), v, dtype=torch.float64) for v in (70.0, size / 2))
    crops = Cameras(views.cameras.world_from_camera, focal, focal.clone(), centre, centre.clone(), size, size)
    there = in_views(crops, images)
    ramp = torch.arange(64).float() * 4
    for i in range(3):
        images[i, ..., 0], images[i, ..., 1] = ramp[None].to(torch.uint8), ramp[:, None].to(torch.uint8)
        crop = torch.from_numpy(np.array(reconviagen_image(Image.fromarray(images[i].numpy()), size=size)))
        inside = (crop[..., 3] == 255).nonzero()
        row, column = inside[len(inside) // 2].tolist()
        x, y = (float(crop[row, column, c]) / 4 + 0.5 for c in (0, 1))  # where in the view the colour says it came from
        ours = [(column + 0.5 - size / 2) / 70, (row + 0.5 - size / 2) / 70]
        theirs = [(x - float(there.cx[i])) / float(there.fx[i]), (y - float(there.cy[i])) / float(there.fy[i])]
        assert ours == pytest.approx(theirs, abs=0.01)
