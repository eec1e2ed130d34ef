"""Photos without cameras: real structure from motion on a small scene, and the parent's judgement of a bad child."""

import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import synthetic_views as synthetic
import torch
from PIL import Image

from viewmesh.errors import Cancelled, PoseError
from viewmesh.options import ViewRules
from viewmesh.progress import never, silent
from viewmesh.views import pose as posing
from viewmesh.views.lens import Lens, distorted_pixels
from viewmesh.views.limits import Limits
from viewmesh.views.load import load_views
from viewmesh.views.photo import Photo

FOCAL, SIZE = 420.0, (320, 240)


@pytest.fixture
def photos() -> list[Photo]:
    return [Photo(f"photo_{i}.jpg", np.zeros((24, 32, 3), np.uint8)) for i in range(8)]


def child(monkeypatch, program: str) -> None:
    """Runs `program` instead of COLMAP; `folder` is its working folder."""
    real = posing.subprocess.Popen

    def popen(command, **options):
        code = f"import sys, pathlib, numpy as np; folder = pathlib.Path({command[-1]!r})\n{program}"
        return real([sys.executable, "-c", code], **options)

    monkeypatch.setattr(posing.subprocess, "Popen", popen)


def model(views: list[int]) -> str:
    return f"""
n = len({views})
np.savez(folder / 'model.npz', views=np.array({views}), world_from_camera=np.tile(np.eye(4), (n, 1, 1)),
    lens=np.tile([30.0, 16, 12, 0], (n, 1)), points=np.zeros((1, 3)), errors=np.zeros(1),
    seen=np.zeros((0, 2), int), pixels=np.zeros((0, 2)))
"""


def test_a_crashing_child_is_a_pose_error_naming_the_views(monkeypatch, photos, tmp_path):
    child(monkeypatch, "import os; os.abort()")
    with pytest.raises(PoseError, match="only 0 of 8 views, 4 are needed") as caught:
        posing.pose(photos, tmp_path, Limits(), silent, never)
    assert caught.value.unposed == tuple(p.name for p in photos)
    assert "photo_3.jpg" in str(caught.value)
    assert "cameras.json" in str(caught.value)


def test_too_few_posed_views(monkeypatch, photos, tmp_path):
    child(monkeypatch, model([0, 2, 5]))
    with pytest.raises(PoseError, match="only 3 of 8") as caught:
        posing.pose(photos, tmp_path, Limits(), silent, never)
    assert caught.value.unposed == tuple(f"photo_{i}.jpg" for i in (1, 3, 4, 6, 7))


@pytest.mark.parametrize("count", [5, 6, 7])
def test_the_rig_is_named_where_there_are_as_many_photos_as_it_has_views(monkeypatch, photos, tmp_path, count):
    child(monkeypatch, "")
    with pytest.raises(PoseError) as caught:
        posing.pose(photos[:count], tmp_path, Limits(), silent, never)
    assert ("--rig canonical6" in caught.value.hint) == (count == 6)


def test_half_posed_is_enough_and_the_rest_is_named(monkeypatch, photos, tmp_path):
    child(monkeypatch, model([0, 2, 5, 7]))
    posed = posing.pose(photos, tmp_path, Limits(), silent, never)
    assert [p.name for p in posed.photos] == [f"photo_{i}.jpg" for i in (0, 2, 5, 7)]
    assert posed.unposed == tuple(f"photo_{i}.jpg" for i in (1, 3, 4, 6))
    np.testing.assert_allclose(posed.photos[0].world_from_camera, np.diag([1, -1, -1, 1]))  # OpenGL from OpenCV


def test_masked_features_first_then_whole_images(monkeypatch, photos, tmp_path):
    masked = [replace(p, coverage=np.full((24, 32), 255, np.uint8)) for p in photos]
    child(monkeypatch, "if folder.name == 'sfm1':\n" + model([0, 1, 2, 3, 4]).replace("\n", "\n    "))
    assert len(posing.pose(masked, tmp_path, Limits(), silent, never).photos) == 5


def test_cancelling_kills_the_child(monkeypatch, photos, tmp_path):
    child(monkeypatch, "import os, time; (folder / 'pid').write_text(str(os.getpid())); time.sleep(60)")
    written = tmp_path / "sfm0/pid"
    with pytest.raises(Cancelled):
        posing.pose(photos, tmp_path, Limits(), silent, lambda: written.exists() and written.read_text() != "")
    with pytest.raises(ProcessLookupError):
        os.kill(int(written.read_text()), 0)


def test_a_hanging_child_is_stopped(monkeypatch, photos, tmp_path):
    child(monkeypatch, "import time; time.sleep(60)")
    with pytest.raises(PoseError):
        posing.pose(photos, tmp_path, Limits(sfm_seconds=0.5), silent, never)


def test_two_photos_are_too_few(photos, tmp_path):
    with pytest.raises(PoseError, match="needs at least 3"):
        posing.pose(photos[:2], tmp_path, Limits(), silent, never)


def test_pixels_are_undistorted_as_images_are():
    lens = Lens(300.0, 300.0, 160.0, 120.0, 320, 240, "opencv", (-0.15, 0.0, 0.0, 0.0))
    u, v = distorted_pixels(lens)
    back = posing._undistorted_pixels(np.stack([u, v], -1).reshape(-1, 2).astype(float), lens)
    columns, rows = np.meshgrid(np.arange(320) + 0.5, np.arange(240) + 0.5)
    np.testing.assert_allclose(back, np.stack([columns, rows], -1).reshape(-1, 2), atol=0.01)


@pytest.mark.parametrize("along_ray", [False, True])
def test_depth_maps_scale_the_reconstruction(along_ray):
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.uniform(-1, 1, (200, 2)), rng.uniform(-2, -1, (200, 1))], -1)
    depth = np.linalg.norm(points, axis=-1) if along_ray else -points[:, 2]
    photo = Photo("a", np.zeros((1, 200, 3), np.uint8), depth=7 * depth[None], depth_along_ray=along_ray)
    cell = np.arange(200)
    model = {"views": np.array([0]), "points": points, "seen": np.stack([0 * cell, cell], -1),
             "pixels": np.stack([cell + 0.5, 0 * cell + 0.5], -1)}  # fmt: skip
    assert posing._depth_scale([photo], model, np.eye(4)[None]) == pytest.approx(7)


def test_a_wrongly_posed_view_is_left_out(monkeypatch, tmp_path):
    poses = synthetic.ring(8)
    wrong = poses.copy()
    wrong[3, :3, :3] = poses[3, :3, :3] @ np.array([[0, -1.0, 0], [1, 0, 0], [0, 0, 1]])  # rolled by a quarter turn
    wrong[3, :3, 3] += 0.35 * poses[3, :3, 0]
    synthetic.write_views(tmp_path, poses, cameras=None)

    def pose(photos, *_):
        lens = Lens(80.0, 80.0, 32.0, 24.0, 64, 48)
        posed = [replace(p, lens=lens, world_from_camera=m) for p, m in zip(photos, wrong, strict=True)]
        return posing.Posed(posed, np.zeros((0, 3)), np.zeros((0, 2), int), np.zeros((0, 2)), ())

    monkeypatch.setattr("viewmesh.views.load.pose", pose)
    views = load_views(tmp_path, ViewRules())
    assert len(views) == 7
    assert views.warnings == (
        "views/view_03.png: its mask contradicts the other views'; it is left out, its pose is probably wrong.",
    )


def test_photos_alone_become_posed_masked_views(tmp_path):
    poses = synthetic.ring(10, height=0.9, distance=2.0)[:7]
    (tmp_path / "images").mkdir()
    for i, p in enumerate(poses):
        Image.fromarray(synthetic.photograph(p, FOCAL, *SIZE)).save(tmp_path / f"images/photo_{i}.png")
    steps = []
    views = load_views(tmp_path, ViewRules(), progress=lambda stage, step, steps_, **_: steps.append((stage, step)))
    assert len(views) >= 6
    assert (views.camera_source, views.mask_source) == ("sfm", "grabcut")
    assert {"read", "pose", "mask"} <= {stage for stage, _ in steps}
    assert views.cameras is not None
    posed = torch.from_numpy(poses[[int(name[-5]) for name in views.names]])
    # up to a similarity, the poses are the true ones: relative rotations and ratios of distances
    ours, true = views.cameras.world_from_camera, posed
    relative = ours[0, :3, :3].T @ ours[:, :3, :3]
    expected = true[0, :3, :3].T @ true[:, :3, :3]
    cosine = ((relative * expected).sum((1, 2)) - 1) / 2
    assert (cosine > np.cos(np.radians(1.5))).all()
    gaps, true_gaps = torch.cdist(ours[:, :3, 3], ours[:, :3, 3]), torch.cdist(true[:, :3, 3], true[:, :3, 3])
    torch.testing.assert_close(gaps / gaps.max(), true_gaps / true_gaps.max(), atol=0.02, rtol=0)
    # up is the floor's normal
    up = ours[:, :3, :3] @ true[:, :3, :3].mT @ torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    assert (up[:, 1] > np.cos(np.radians(5))).all()
    for name, image in zip(views.names, views.images, strict=True):
        truth = synthetic.render(poses[int(name[-5])], FOCAL, *SIZE)[0][..., 3] > 0
        mask = image[..., 3].numpy() > 127
        assert (truth & mask).sum() / (truth | mask).sum() > 0.8
