"""Normalisation: laws of the frame, and what a bad mask may not do to it."""

import math

import numpy as np
import pytest
import synthetic_views as synthetic
import torch

from viewmesh.errors import InputError
from viewmesh.geometry.camera import Cameras, look_at, pinhole
from viewmesh.views.normalise import normalise, rotation_to_y, up_of


def scene(n: int = 10) -> tuple[Cameras, torch.Tensor]:
    poses = synthetic.around(n)
    masks = np.stack([synthetic.render(p, 80.0, 64, 48)[0][..., 3] / 255.0 for p in poses])
    return pinhole(torch.from_numpy(poses), 2 * math.atan(24 / 80.0), 48, 64), torch.from_numpy(masks).float()


def object_under(world_from_scene: torch.Tensor) -> torch.Tensor:
    m = torch.linalg.inv(world_from_scene)
    return synthetic.surface_points() @ m[:3, :3].T + m[:3, 3]


def extent(points: torch.Tensor) -> float:
    return float((points.amax(0) - points.amin(0)).max())


@pytest.mark.parametrize("n", [1, 2, 3, 6, 24])
def test_the_object_fills_the_unit_cube(n):
    points = object_under(normalise(*scene(n)).world_from_scene)
    assert points.abs().max() < (0.8 if n == 1 else 0.5)  # one view says nothing of the distance
    assert extent(points) > (0.3 if n < 3 else 0.55 if n == 3 else 0.8)  # few views leave the hull larger


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_moving_the_world_moves_the_frame_with_it(scale):
    cameras, masks = scene()
    move = look_at(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3), torch.tensor([0.0, 1.0, 0.0]))
    move[:3, :3] *= scale
    move[:3, 3] *= 50 * scale
    up = move[:3, 1] / scale
    moved = normalise(cameras.moved(move), masks, up_direction=up).world_from_scene
    points = synthetic.surface_points() @ move[:3, :3].T + move[:3, 3]
    m = torch.linalg.inv(moved)
    points = points @ m[:3, :3].T + m[:3, 3]
    assert points.abs().max() < 0.5
    assert extent(points) > 0.6
    assert torch.linalg.det(moved) > 0


@pytest.mark.parametrize("masked", [True, False], ids=["masks", "cameras alone"])
@pytest.mark.parametrize("far", [1e2, 1e4, 9e5])
def test_a_far_origin_changes_nothing_but_the_place(far, masked):
    cameras, masks = scene()
    shift = torch.eye(4, dtype=torch.float64)
    shift[:3, 3] = far * torch.tensor([0.6, 0.0, -0.8], dtype=torch.float64)
    near = normalise(cameras, masks if masked else None).world_from_scene
    moved = normalise(cameras.moved(shift), masks if masked else None).world_from_scene
    torch.testing.assert_close(torch.linalg.inv(shift) @ moved, near, atol=1e-5, rtol=0)


def test_wrong_pixels_change_nothing_much():
    cameras, masks = scene()
    clean = object_under(normalise(cameras, masks).world_from_scene)
    noisy = masks.clone()
    generator = torch.Generator().manual_seed(0)
    flips = torch.rand(masks.shape, generator=generator) < 0.002
    noisy[flips] = 1 - noisy[flips]
    found = object_under(normalise(cameras, noisy).world_from_scene)
    assert (found - clean).abs().max() < 0.05


def test_one_bad_view_is_left_out_and_named():
    cameras, masks = scene()
    clean = object_under(normalise(cameras, masks).world_from_scene)
    masks[4] = 0
    masks[4, :6, :6] = 1
    found = normalise(cameras, masks)
    assert found.disagreeing == (4,)
    assert (object_under(found.world_from_scene) - clean).abs().max() < 0.06


def test_good_views_are_not_left_out():
    for n in (4, 6, 12):
        assert normalise(*scene(n)).disagreeing == ()


def test_nothing_below_the_floor_counts():
    poses = synthetic.ring(8)
    masks = torch.from_numpy(np.stack([synthetic.render(p, 80.0, 64, 48)[0][..., 3] / 255.0 for p in poses])).float()
    cameras = pinhole(torch.from_numpy(poses), 2 * math.atan(24 / 80.0), 48, 64)
    floor = torch.tensor([0.0, 1.0, 0.0, -synthetic.BOX_LOW[1]], dtype=torch.float64)
    low = normalise(cameras, masks, floor=floor).world_from_scene
    scene_floor = (synthetic.BOX_LOW[1] - low[1, 3]) / low[1, 1]
    top = object_under(low)[:, 1].max()
    assert float(scene_floor + top) == pytest.approx(0, abs=0.06)  # centred between the floor and the top


def test_masks_that_share_nothing_are_refused():
    cameras, masks = scene(4)
    masks[:] = 0
    for n, (r, c) in enumerate([(0, 0), (40, 0), (0, 56), (40, 56)]):
        masks[n, r : r + 8, c : c + 8] = 1
    with pytest.raises(InputError, match="agree on no volume"):
        normalise(cameras, masks)


@pytest.mark.parametrize("axis", ["+x", "-x", "+y", "-y", "+z", "-z"])
def test_up_is_brought_to_y(axis):
    cameras, _ = scene()
    up = up_of(cameras, axis)
    turn = rotation_to_y(up)
    torch.testing.assert_close(turn[:3, :3] @ up, torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(turn[:3, :3] @ turn[:3, :3].T, torch.eye(3, dtype=torch.float64))
    assert torch.linalg.det(turn) == pytest.approx(1)
    poses = torch.from_numpy(synthetic.ring(6, height=0.4))
    inverse = torch.linalg.inv(turn)
    assert torch.equal(up_of(Cameras(inverse @ poses, *(torch.ones(6),) * 4, 1, 1), "auto").sign(), up)
