"""The start of a fit: distance fields of hulls and of fused depth, against shapes that are known exactly."""

from dataclasses import replace

import pytest
import synthetic_views as synthetic
import torch

from viewmesh.errors import EmptyReconstruction
from viewmesh.geometry.camera import Cameras, canonical6, fibonacci_sphere, look_at, pinhole
from viewmesh.nvdiffrec.initial import HALF, Field, initial_field
from viewmesh.views.viewset import ViewSet

R = 48
VOXEL = 2 * HALF / R


def cameras_around(n: int, size: int = 128) -> Cameras:
    return pinhole(look_at(2.2 * fibonacci_sphere(n), torch.zeros(3), torch.tensor([0.0, 1.0, 0.0])), 0.7, size, size)


def rays(cameras: Cameras) -> tuple[torch.Tensor, torch.Tensor]:
    """Eyes (N, 1, 1, 3) and directions (N, H, W, 3) of unit z-depth, float64."""
    one = torch.ones(len(cameras), cameras.height, cameras.width, dtype=torch.float64)
    eyes = cameras.world_from_camera[:, None, None, :3, 3]
    return eyes, cameras.unproject(one) - eyes


def viewset(cameras: Cameras, depth: torch.Tensor, *, with_depth: bool) -> ViewSet:
    """Views of whatever has the z-depths (N, H, W), 0 = nothing."""
    images = torch.full((*depth.shape, 4), 128, dtype=torch.uint8)
    images[..., 3] = (depth > 0) * 255
    names = tuple(str(n) for n in range(len(cameras)))
    return ViewSet(names, images, cameras, depth.float() if with_depth else None)


def sphere_depth(cameras: Cameras, radius: float) -> torch.Tensor:
    eye, d = rays(cameras)
    a, b, c = (d * d).sum(-1), (d * eye).sum(-1), (eye * eye).sum(-1) - radius**2
    disc = b * b - a * c
    return torch.where(disc > 0, (-b - disc.clamp(min=0).sqrt()) / a, 0)


def grid(n: int = 40) -> torch.Tensor:
    axis = torch.linspace(-0.5, 0.5, n)
    return torch.cartesian_prod(axis, axis, axis)


@pytest.mark.parametrize("with_depth", [False, True])
def test_photos_on_a_larger_canvas_make_the_same_field(with_depth: bool):
    views = synthetic.viewset(synthetic.around(12), depth=with_depth)
    alone, padded, carved = (
        initial_field(v, R).values
        for v in (
            synthetic.cut_off(views, 26),
            synthetic.blanked(views, 26),
            replace(synthetic.blanked(views, 26), known=None),
        )
    )
    apart = ((alone < 0) != (padded < 0)).sum() / (alone < 0).sum()
    assert float(apart) < 0.02
    assert int((carved < 0).sum()) < 0.8 * int((alone < 0).sum())


@pytest.mark.parametrize("with_depth", [False, True])
def test_the_field_of_a_sphere_is_its_signed_distance(with_depth: bool):
    cameras = cameras_around(24)
    field = initial_field(viewset(cameras, sphere_depth(cameras, 0.36), with_depth=with_depth), R)
    points = grid()
    error = (field.at(points) - (points.norm(dim=-1) - 0.36)).abs()
    near = (points.norm(dim=-1) - 0.36).abs() < 0.2
    assert float(error[near].max()) < 1.5 * VOXEL
    assert float(error[near].mean()) < 0.5 * VOXEL
    torch.testing.assert_close(field.upper, torch.full((3,), 0.36), atol=1.5 * VOXEL, rtol=0)
    torch.testing.assert_close(field.lower, torch.full((3,), -0.36), atol=1.5 * VOXEL, rtol=0)


def test_a_field_is_looked_up_x_y_z():
    values = torch.zeros(4, 4, 4)
    values[3, 1, 0] = 1.0
    center = (torch.tensor([3, 1, 0]).float() + 0.5) / 4 * 2 * HALF - HALF
    field = Field(values, torch.zeros(3), torch.zeros(3))
    assert float(field.at(center[None])) == pytest.approx(1.0, abs=1e-6)
    assert float(field.at(center.flip(0)[None])) == pytest.approx(0.0, abs=1e-6)
    assert float(field.at(torch.tensor([[9.0, center[1], center[2]]]))) == pytest.approx(1.0, abs=1e-6)  # border


def test_fused_depth_knows_the_hollow_that_no_silhouette_shows():
    """A box with a bowl hollowed out of its top: every silhouette is that of the box."""
    cameras = canonical6(160, 160)
    low, high = torch.tensor([-0.35, -0.3, -0.35]), torch.tensor([0.35, 0.1, 0.35])
    bowl, radius = torch.tensor([0.0, 0.1, 0.0]), 0.25

    def distance(points: torch.Tensor) -> torch.Tensor:
        q = (points - (low + high) / 2).abs() - (high - low) / 2
        box = q.clamp(min=0).norm(dim=-1) + q.amax(-1).clamp(max=0)
        return torch.maximum(box, radius - (points - bowl).norm(dim=-1))

    eye, d = rays(cameras)
    t = torch.full(d.shape[:-1], 1.0, dtype=torch.float64)
    unit = d.norm(dim=-1)
    for _ in range(80):  # sphere tracing; a maximum of distances never oversteps
        t = t + distance(eye + t[..., None] * d) / unit
    depth = torch.where(distance(eye + t[..., None] * d).abs() < 1e-3, t, 0)
    fused, hull = (initial_field(viewset(cameras, depth, with_depth=w), R) for w in (True, False))
    points = grid()
    wrong_fused, wrong_hull = (
        float(((f.at(points) < 0) != (distance(points) < 0)).float().mean()) for f in (fused, hull)
    )
    assert wrong_fused < 0.35 * wrong_hull
    middle = torch.tensor([[0.0, 0.0, 0.0]])  # in the bowl
    assert float(hull.at(middle)) < 0 < float(fused.at(middle))


def test_one_bad_mask_of_sixteen_does_not_erase_the_object():
    cameras = cameras_around(16)
    good = viewset(cameras, sphere_depth(cameras, 0.36), with_depth=False)
    images = good.images.clone()
    images[5, ..., 3] = 0
    images[5, 30:40, 30:40, 3] = 255
    field = initial_field(replace(good, images=images), R)
    points = grid()
    near = (points.norm(dim=-1) - 0.36).abs() < 0.2
    error = (field.at(points) - (points.norm(dim=-1) - 0.36)).abs()[near]
    assert float(error.mean()) < 1.5 * VOXEL


def test_an_object_in_two_pieces_keeps_both():
    cameras = cameras_around(14)
    eye, d = rays(cameras)
    depth = torch.zeros(d.shape[:-1], dtype=torch.float64)
    centers = torch.tensor([[-0.3, 0.0, 0.0], [0.3, 0.0, 0.0]], dtype=torch.float64)
    for center in centers:
        o = eye - center
        a, b, c = (d * d).sum(-1), (d * o).sum(-1), (o * o).sum(-1) - 0.15**2
        disc = b * b - a * c
        t = torch.where(disc > 0, (-b - disc.clamp(min=0).sqrt()) / a, 0)
        depth = torch.where((depth == 0) | ((t > 0) & (t < depth)), t, depth)
    field = initial_field(viewset(cameras, depth, with_depth=False), R)
    assert bool((field.at(centers.float()) < 0).all())
    assert float(field.at(torch.zeros(1, 3))) > 0


def test_masks_that_agree_on_nothing():
    cameras = cameras_around(6)
    good = viewset(cameras, sphere_depth(cameras, 0.3), with_depth=False)
    images = good.images.clone()
    images[..., 3] = 0
    with pytest.raises(EmptyReconstruction) as caught:
        initial_field(replace(good, images=images), R)
    assert "masks and cameras" in caught.value.hint


def test_the_ball_and_box_inside_and_out():
    field = initial_field(synthetic.viewset(synthetic.around(20), size=128, f=190.0), R)
    points = grid()
    true = synthetic.signed_distance(points).float()
    assert bool((field.at(points[true < -0.08]) < 0).all())
    assert bool((field.at(points[true > 0.12]) > 0).all())
