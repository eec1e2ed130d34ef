"""Antialiasing by every back-end against the naive twin, and the gradients that it is for."""

import naive
import pytest
import torch
from scenes import CUBE, CUBE_TRIANGLES, H, W, close, generator, project, tetrahedra
from scipy.spatial import ConvexHull
from torch import Tensor

from viewmesh.render.rasterizer import Rasterizer, get_rasterizer, topology


def test_antialias_agrees_with_the_twin(backend):
    rasterizer, device = backend
    for seed in range(2):
        clip, faces = tetrahedra(seed)
        rast, _ = naive.rasterize(clip, faces, H, W)
        rast = rast.detach().float().double()
        color = torch.randn(2, H, W, 3, generator=generator(1), dtype=torch.float64)
        g = torch.randn(2, H, W, 3, generator=generator(2), dtype=torch.float64)
        exact = [color.clone().requires_grad_(), clip.double().requires_grad_()]
        out = naive.antialias(exact[0], rast, exact[1], faces)
        (out * g).sum().backward()
        assert float((out - color).detach().abs().max()) > 0.1
        ours = [color.float().to(device).requires_grad_(), clip.to(device).requires_grad_()]
        out2 = rasterizer.antialias(
            ours[0], rast.float().to(device), ours[1], faces.to(device), topology(faces.to(device))
        )
        (out2 * g.to(out2)).sum().backward()
        close(out2, out, 1e-3)
        close(ours[0].grad, exact[0].grad, 1e-3)
        if rasterizer.name == "nvdiffrast":  # it decides single crossings otherwise; values and colours still agree
            a, b = ours[1].grad.cpu().double().flatten(), exact[1].grad.flatten()
            assert float(torch.nn.functional.cosine_similarity(a, b, dim=0)) > 0.97
        else:
            close(ours[1].grad, exact[1].grad, 2e-3)
        assert float(exact[1].grad.abs().max()) > 0


def coverage(rasterizer: Rasterizer, clip: Tensor, faces: Tensor, size: int) -> Tensor:
    raster = rasterizer.rasterize(clip, faces, size, size)
    return rasterizer.antialias((raster.rast[..., 3:] > 0).float(), raster.rast, clip, faces, topology(faces))


def test_the_gradient_of_an_area_is_that_of_the_area(backend):
    """An edge counted by both directions of pairs gives exactly twice the gradient; one lost gives less."""
    rasterizer, device = backend
    size, ratios = 256, []
    for eye in (torch.tensor([1.7, 1.1, 1.4]), torch.tensor([-0.9, 0.6, 2.1]), torch.tensor([0.2, -2.0, 1.3])):
        scale = torch.tensor(1.0, device=device, requires_grad=True)
        clip = project(CUBE.to(device) * scale, eye, size)
        coverage(rasterizer, clip, CUBE_TRIANGLES.to(device), size).sum().backward()

        def area(s: float, eye: Tensor = eye) -> float:  # a cube's outline is convex
            p = project(CUBE.double() * s, eye, size)[0]
            return float(ConvexHull((p[:, :2] / p[:, 3:] * size / 2).numpy()).volume)

        ratios.append(float(scale.grad) / ((area(1 + 1e-4) - area(1 - 1e-4)) / 2e-4))
    assert all(0.9 < r < 1.1 for r in ratios), ratios


def test_antialiased_values_may_leave_the_range_of_the_colours(backend):
    """Documented: a pixel blended across three edges loses more than it has, so an alpha is clamped before a loss."""
    rasterizer, device = backend
    pixels = torch.tensor([[8.3, 8.6], [8.7, 8.6], [8.5, 8.2]])  # a triangle around the centre of one pixel
    clip = torch.cat([pixels / 8 - 1, torch.tensor([[0.0, 1]] * 3)], -1)[None].to(device)
    values = coverage(rasterizer, clip, torch.tensor([[0, 1, 2]], device=device), 16)
    assert float(values[0, 8, 8]) == pytest.approx(1 - 0.35 - 0.35 - 0.4, abs=1e-3)
    assert int((values != 0).sum()) == 1


def test_shared_vertices_have_no_inner_silhouettes_and_duplicated_ones_do(backend):
    rasterizer, device = backend
    x = torch.tensor([[-0.8, -0.7, 0, 1], [0.9, -0.8, 0, 1], [0.7, 0.8, 0, 1], [-0.75, 0.9, 0, 1.0]], device=device)
    shared, split = torch.tensor([[0, 1, 2], [0, 2, 3]]), torch.tensor([[0, 1, 2], [3, 4, 5]])
    changed = []
    for p, faces in ((x, shared), (x[[0, 1, 2, 0, 2, 3]], split)):
        raster = rasterizer.rasterize(p[None], faces.to(device), 32, 32)
        color = raster.rast[..., 3:] * 1.0  # a colour per triangle
        aa = rasterizer.antialias(color, raster.rast, p[None].contiguous(), faces.to(device))
        inner = torch.nn.functional.max_pool2d((color == 0).float().permute(0, 3, 1, 2), 3, 1, 1)[0, 0] == 0
        changed.append(int(((aa - color)[0, ..., 0].abs() > 1e-6)[inner].sum()))
    assert changed[0] == 0
    assert changed[1] > 5


@pytest.mark.parametrize("continuous", [True, False])
def test_a_cube_is_fitted_from_16_pixels(continuous):
    """Positions and colours of a cube from random 16 x 16 views: 500 iterations bring the vertex error below 0.01."""
    rasterizer = get_rasterizer("cpu")
    g = generator(0)
    faces = CUBE_TRIANGLES
    if continuous:
        colors, color_faces = CUBE + 0.5, faces
    else:  # a colour per side, hence own colour vertices per triangle
        palette = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]])
        colors, color_faces = palette[torch.arange(12) // 2].repeat_interleave(3, 0), torch.arange(36).reshape(12, 3)
    v = (CUBE + (torch.rand(8, 3, generator=g) - 0.5)).requires_grad_()
    c = torch.rand(colors.shape, generator=g).requires_grad_()
    optimizer = torch.optim.Adam([v, c], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda it: max(0.01, 10 ** (-0.0005 * it)))
    around = topology(faces)

    def render(vertices: Tensor, vertex_colors: Tensor, eye: Tensor) -> Tensor:
        clip = project(vertices, eye, 16)
        raster = rasterizer.rasterize(clip, faces, 16, 16)
        color, _ = rasterizer.interpolate(vertex_colors, raster.rast, color_faces)
        return rasterizer.antialias(color, raster.rast, clip, faces, around)

    for _ in range(500):
        eye = torch.nn.functional.normalize(torch.randn(3, generator=g), dim=0) * 2.2
        loss = (render(v, c, eye) - render(CUBE, colors, eye)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    error = float((v.detach() - CUBE).norm(dim=1).mean())
    assert error < 0.01
