import numpy as np
import pytest
import torch
from results import ball_mesh

from viewmesh.export.metrics import chamfer, mask_iou, on_white, point_to_surface, psnr, ssim, view_on_white
from viewmesh.geometry.mesh import Mesh
from viewmesh.geometry.nearest import NearestSurface, sample_surface
from viewmesh.render.shading import srgb_to_linear


def test_psnr_is_its_definition():
    a = torch.full((8, 8, 3), 0.5)
    assert psnr(a + 0.1, a) == pytest.approx(20, abs=1e-4)
    assert psnr(a, a) == 99


def naive_ssim(a: np.ndarray, b: np.ndarray) -> float:
    r = np.arange(11) - 5
    w = np.exp(-(r[:, None] ** 2 + r[None] ** 2) / 4.5)
    w /= w.sum()
    out = []
    for c in range(a.shape[2]):
        for y in range(a.shape[0] - 10):
            for x in range(a.shape[1] - 10):
                p, q = a[y : y + 11, x : x + 11, c], b[y : y + 11, x : x + 11, c]
                m, n = (w * p).sum(), (w * q).sum()
                v, u, k = (w * (p - m) ** 2).sum(), (w * (q - n) ** 2).sum(), (w * (p - m) * (q - n)).sum()
                out.append((2 * m * n + 1e-4) * (2 * k + 9e-4) / ((m * m + n * n + 1e-4) * (v + u + 9e-4)))
    return float(np.mean(out))


def test_ssim_is_the_window_by_window_formula():
    g = torch.Generator().manual_seed(0)
    a = torch.rand(18, 21, 3, generator=g)
    b = (a + 0.2 * torch.rand(18, 21, 3, generator=g)).clamp(0, 1)
    assert ssim(a, b) == pytest.approx(naive_ssim(a.double().numpy(), b.double().numpy()), abs=1e-9)
    assert ssim(a, a) == pytest.approx(1)


def test_iou():
    a = torch.zeros(4, 4)
    a[:2] = 1
    b = torch.zeros(4, 4)
    b[1:3] = 0.6
    assert mask_iou(a, b) == pytest.approx(1 / 3)
    assert mask_iou(a * 0, b * 0) == 1


def test_drawn_and_given_images_meet_on_white():
    view = torch.tensor([[[200, 100, 50, 255], [200, 100, 50, 128], [9, 9, 9, 0]]], dtype=torch.uint8)
    alpha = view[..., 3:].float() / 255
    drawn = torch.cat([srgb_to_linear(view[..., :3].float() / 255) * alpha, alpha], -1)
    assert torch.allclose(on_white(drawn), view_on_white(view), atol=1e-4)
    assert torch.equal(view_on_white(view)[0, 2], torch.ones(3))


def square(z: float, side: float = 1.0) -> Mesh:
    v = torch.tensor([[0.0, 0, z], [side, 0, z], [side, side, z], [0, side, z]])
    return Mesh(v, torch.tensor([[0, 1, 2], [0, 2, 3]]))


def test_chamfer_of_parallel_squares_is_their_distance():
    assert chamfer(square(0), square(0.25), 2000) == pytest.approx(0.25, abs=1e-6)
    assert chamfer(square(0), square(0), 2000) == pytest.approx(0, abs=1e-7)


def test_the_two_directions_differ_where_one_surface_is_larger():
    g = torch.Generator().manual_seed(0)
    assert point_to_surface(square(0), square(0, 2), 2000, g) == pytest.approx(0, abs=1e-7)
    assert point_to_surface(square(0, 2), square(0), 20000, g) == pytest.approx(
        0.25 + 0.7652 / 4, abs=0.01
    )  # by integration


def test_samples_are_spread_by_area():
    mesh = Mesh(
        torch.cat([square(0).vertices, square(1, 3).vertices]), torch.cat([square(0).faces, square(0).faces + 4])
    )
    drawn = sample_surface(mesh, 20000, torch.Generator().manual_seed(0))
    assert float((drawn.face < 2).float().mean()) == pytest.approx(0.1, abs=0.01)
    points = drawn.of(mesh.vertices.double(), mesh.faces)
    assert points[drawn.face >= 2].mean(0).tolist() == pytest.approx([1.5, 1.5, 1], abs=0.03)


def test_the_nearest_surface_point_is_the_nearest_of_all_faces():
    mesh, _, _ = ball_mesh()
    g = torch.Generator().manual_seed(2)
    points = torch.rand(200, 3, generator=g, dtype=torch.float64) - 0.5
    found, distance = NearestSurface(mesh).query(points)
    there = found.of(mesh.vertices.double(), mesh.faces)
    assert torch.allclose((there - points).norm(dim=-1), distance, atol=1e-6)
    dense = sample_surface(mesh, 200_000, g).of(mesh.vertices.double(), mesh.faces)
    brute = torch.cdist(points, dense).amin(1)
    assert bool((distance <= brute + 1e-9).all())
    assert float((brute - distance).max()) < 0.01
    assert bool((found.barycentric >= -1e-12).all())
