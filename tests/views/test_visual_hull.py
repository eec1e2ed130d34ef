"""The visual hull: laws, and a float64 twin that looks every voxel up by hand."""

import math

import numpy as np
import pytest
import synthetic_views as synthetic
import torch

from viewmesh.geometry.camera import Cameras, pinhole
from viewmesh.geometry.hull import agreeing_views, hull_at, voxel_centers

BOUNDS = torch.tensor([[-0.5] * 3, [0.5] * 3])


@pytest.fixture
def views() -> tuple[Cameras, torch.Tensor]:
    poses = synthetic.around(9)
    masks = [synthetic.render(p, 80.0, 64, 48)[0][..., 3] / 255.0 for p in poses]
    cameras = pinhole(torch.from_numpy(poses), 2 * math.atan(24 / 80.0), 48, 64)
    return cameras, torch.tensor(np.stack(masks), dtype=torch.float32)


def naive_hull(
    cameras: Cameras, masks: torch.Tensor, points: torch.Tensor, known: torch.Tensor | None = None
) -> list[float]:
    """Point by point, view by view, in Python floats."""
    N, H, W = masks.shape
    result = []
    for point in points.double():
        least = None
        for n in range(N):
            pixel, depth = cameras[n].project(point[None])
            x, y = pixel[0, 0].tolist()
            if float(depth) <= 0 or not (0 <= x <= W and 0 <= y <= H):
                continue
            c, r = x - 0.5, y - 0.5
            c0, r0 = math.floor(c), math.floor(r)
            value, sees = 0.0, True
            for dr in (0, 1):
                for dc in (0, 1):
                    weight = (1 - abs(r - r0 - dr)) * (1 - abs(c - c0 - dc))
                    at = n, min(max(r0 + dr, 0), H - 1), min(max(c0 + dc, 0), W - 1)
                    value += weight * float(masks[at])
                    sees &= known is None or bool(known[at]) or weight < 1e-3
            if not sees:
                continue
            least = value if least is None else min(least, value)
        result.append(0.0 if least is None or least <= 1e-3 else least)
    return result


def test_agrees_with_the_naive_twin(views):
    cameras, masks = views
    soft = torch.nn.functional.avg_pool2d(masks[:, None], 3, 1, 1)[:, 0]
    points = torch.rand(300, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    twin = torch.tensor(naive_hull(cameras, soft, points))
    assert (twin > 0).sum() > 5
    torch.testing.assert_close(hull_at(cameras, soft, points), twin, atol=2e-4, rtol=0)


def test_agrees_with_the_naive_twin_where_views_do_not_know_all(views):
    cameras, masks = views
    generator = torch.Generator().manual_seed(1)
    known = torch.nn.functional.interpolate(torch.rand(9, 1, 8, 6, generator=generator), masks.shape[1:])[:, 0] > 0.4
    points = torch.rand(300, 3, generator=generator) * 2 - 1
    twin = torch.tensor(naive_hull(cameras, masks * known, points, known))
    found = hull_at(cameras, masks * known, points, known=known)
    assert ((found - twin).abs() > 2e-4).float().mean() < 0.01  # a weight of about a thousandth is seen or not
    assert ((twin > 0.5) & (hull_at(cameras, masks * known, points) < 0.5)).sum() > 5  # as outside it would be carved
    inside, seeing = agreeing_views(cameras, masks * known, points, known=known)
    everywhere, whole = agreeing_views(cameras, masks, points)
    assert (seeing < whole).any()
    assert (inside <= everywhere).all()
    assert (seeing - inside <= whole - everywhere).all()


def test_contains_the_object_and_reprojects_to_the_masks(views):
    cameras, masks = views
    inside = torch.from_numpy(synthetic.BALL_CENTER) + 0.85 * synthetic.BALL_RADIUS * synthetic.fibonacci_sphere(200)
    assert (hull_at(cameras, masks, inside.float()) >= 0.5).all()
    points = voxel_centers(48, BOUNDS)
    solid = hull_at(cameras, masks, points) >= 0.5
    pixels, _ = cameras.project(points[solid])
    for n in range(len(cameras)):
        c, r = pixels[n].floor().long().T
        assert masks[n, r, c].mean() > 0.97


def test_voxels_lie_x_slowest_z_fastest():
    centers = voxel_centers(4, torch.tensor([[0.0, 4, 8], [4.0, 8, 12]])).reshape(4, 4, 4, 3)
    torch.testing.assert_close(centers[1, 2, 3], torch.tensor([1.5, 6.5, 11.5]))


def test_a_view_does_not_carve_what_it_does_not_see(views):
    cameras, _ = views
    one, nothing = cameras[0], torch.zeros(1, 48, 64)
    behind = cameras.centers[:1].float() * 1.5
    assert hull_at(one, 1 - nothing, behind) == 0  # seen by nobody: nothing speaks for it
    both = Cameras(*(torch.cat([getattr(one, k), getattr(cameras[4], k)]) for k in
                     ("world_from_camera", "fx", "fy", "cx", "cy")), 48, 64)  # fmt: skip
    points = voxel_centers(24, 4 * BOUNDS)
    full_and_empty = torch.cat([1 - nothing, nothing])
    agreement = hull_at(both, full_and_empty, points)
    seen_by_empty = agreeing_views(cameras[4], nothing, points)[1] > 0
    seen_by_full = agreeing_views(one, nothing, points)[1] > 0
    torch.testing.assert_close(agreement, (seen_by_full & ~seen_by_empty).float())
    assert (hull_at(both, full_and_empty, points, seen_by=0.9) == 0).all()


def test_empty_and_full_masks(views):
    cameras, masks = views
    points = voxel_centers(8, BOUNDS)
    assert (hull_at(cameras, torch.zeros_like(masks), points) == 0).all()
    torch.testing.assert_close(hull_at(cameras, torch.ones_like(masks), points), torch.ones(512))


def test_masks_of_another_size_than_the_cameras(views):
    cameras, masks = views
    twice = masks.repeat_interleave(2, 1).repeat_interleave(2, 2)
    points = voxel_centers(24, BOUNDS)
    difference = hull_at(cameras, twice, points) - hull_at(cameras, masks, points)
    assert float(difference.abs().mean()) < 0.02
