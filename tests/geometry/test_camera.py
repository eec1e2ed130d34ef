"""Cameras: laws of projection, and the canonical rig against numbers written out by hand."""

import math

import pytest
import torch

from viewmesh.geometry.camera import Cameras, canonical6, fibonacci_sphere, look_at, pinhole


@pytest.fixture
def cameras() -> Cameras:
    eyes = 2.0 * fibonacci_sphere(7)
    return pinhole(look_at(eyes, torch.zeros(3), torch.tensor([0.0, 1.0, 0.0])), math.radians(40), 48, 64)


def test_project_undoes_unproject(cameras):
    depth = 1 + torch.rand(7, 48, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    points = cameras.unproject(depth)
    rows, cols = torch.meshgrid(torch.arange(48) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    for n in range(7):
        pixels, z = cameras[n].project(points[n].reshape(-1, 3))
        torch.testing.assert_close(pixels[0], torch.stack([cols, rows], -1).reshape(-1, 2).double())
        torch.testing.assert_close(z[0], depth[n].reshape(-1))


def test_clip_space_agrees_with_project(cameras):
    points = torch.rand(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 0.5
    clip_from_world = cameras.clip_from_camera(0.1, 10.0) @ cameras.camera_from_world
    clip = torch.cat([points, torch.ones(20, 1)], -1) @ clip_from_world.mT
    ndc = clip[..., :3] / clip[..., 3:]
    pixels, depth = cameras.project(points)
    torch.testing.assert_close((ndc[..., 0] + 1) / 2 * 64, pixels[..., 0])
    torch.testing.assert_close((ndc[..., 1] + 1) / 2 * 48, pixels[..., 1])  # row 0 of the image is clip y = -1
    torch.testing.assert_close(clip[..., 3], depth)


def test_look_at_is_rigid_and_looks_at_the_target(cameras):
    r = cameras.world_from_camera[:, :3, :3]
    torch.testing.assert_close(r @ r.mT, torch.eye(3, dtype=torch.float64).expand(7, 3, 3))
    torch.testing.assert_close(torch.linalg.det(r), torch.ones(7, dtype=torch.float64))
    pixels, _ = cameras.project(torch.zeros(1, 3, dtype=torch.float64))
    torch.testing.assert_close(pixels[:, 0], torch.tensor([32.0, 24.0], dtype=torch.float64).expand(7, 2))


def test_look_at_along_up_is_still_rigid():
    m = look_at(torch.tensor([0.0, 3.0, 0.0]), torch.zeros(3), torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(m[:3, :3] @ m[:3, :3].T, torch.eye(3, dtype=torch.float64))


def test_moving_the_world_moves_points_and_cameras_alike(cameras):
    turn = look_at(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3), torch.tensor([0.0, 1.0, 0.0]))
    move = turn.clone()
    move[:3, :3] *= 2.5
    points = torch.rand(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) - 0.5
    before, depth = cameras.project(points)
    after, scaled_depth = cameras.moved(move).project(points @ move[:3, :3].T + move[:3, 3])
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(scaled_depth, 2.5 * depth)


def test_canonical_rig_is_front_right_back_left_top_bottom():
    rig = canonical6(400, 400)
    expected = 2.2 * torch.tensor([[0, 0, 1], [1, 0, 0], [0, 0, -1], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])
    torch.testing.assert_close(rig.centers, expected.double())
    assert float(rig.fy[0]) == pytest.approx(549.4954838909244)
    top = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]], dtype=torch.float64)
    torch.testing.assert_close(rig.world_from_camera[4, :3, :3], top)


def test_resizing_scales_pixels(cameras):
    points = torch.rand(5, 3, dtype=torch.float64) - 0.5
    before, _ = cameras.project(points)
    after, _ = cameras.resized(96, 32).project(points)
    torch.testing.assert_close(after, before * torch.tensor([0.5, 2.0], dtype=torch.float64))
