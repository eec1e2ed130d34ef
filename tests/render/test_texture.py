"""Texture lookups by every back-end against the naive twin."""

import naive
import pytest
import torch
from scenes import close, generator
from torch import Tensor

from viewmesh.render.mipmap import halved


@pytest.mark.parametrize("boundary", ["wrap", "clamp", "zero", "cube"])
@pytest.mark.parametrize("filter", ["nearest", "linear", "trilinear"])
def test_texture_agrees_with_the_twin(backend, boundary, filter):
    rasterizer, device = backend
    g = generator(3)
    cube = boundary == "cube"
    shape = (6, 4, 4, 3) if cube else ((8, 16, 3) if filter == "trilinear" else (5, 7, 3))
    image = torch.randn(shape, generator=g, dtype=torch.float64)
    uv = torch.randn(60, 3 if cube else 2, generator=g, dtype=torch.float64).float().double()
    level = torch.rand(60, generator=g, dtype=torch.float64) * 2
    smaller = (halved(image), halved(halved(image))) if filter == "trilinear" else ()
    mips = [torch.randn(m.shape, generator=g, dtype=torch.float64) for m in smaller]
    inputs = [t.clone().requires_grad_() for t in (image, uv, level, *mips)]

    def sample(m: Tensor) -> Tensor:
        if cube and filter != "nearest":
            return naive.cube_texture(m, inputs[1])
        if cube:  # the nearest texel is the one whose weight is largest
            R = m.shape[1]
            points = torch.tensor([naive.cube_point(f, r, c, R) for f in range(6) for r in range(R) for c in range(R)])
            frames = torch.tensor(naive.CUBE_FACES, dtype=torch.float64)
            on_plane = uv / (uv @ frames[:, 0].T).amax(1, keepdim=True)
            return m.reshape(-1, 3)[torch.cdist(on_plane, points, p=torch.inf).argmin(1)]
        return naive.texture(m, inputs[1], boundary, filter)

    expected = sample(inputs[0])
    if mips:
        expected = sum(
            (1 - (inputs[2] - n).abs()).clamp_min(0)[:, None] * sample(m)
            for n, m in enumerate([inputs[0], *inputs[3:]])
        )
    cotangent = torch.randn(60, 3, generator=g, dtype=torch.float64)
    (expected * cotangent).sum().backward()
    ours = [t.detach().to(device, torch.float32).requires_grad_() for t in (image, uv, level, *mips)]
    out = rasterizer.texture(
        ours[0], ours[1].reshape(3, 20, -1), boundary=boundary, filter=filter,
        mips=ours[3:] or None, level=ours[2].reshape(3, 20) if mips else None,
    ).reshape(60, 3)  # fmt: skip
    (out * cotangent.to(out)).sum().backward()
    loose = 1e-4
    if rasterizer.name == "nvdiffrast":
        # It filters across the corners of a cube its own way, 0.17 of the largest gradient on an H100; the last of the
        # mips is nothing but corners, 0.36.
        loose = 2e-2 if not cube else 0.5 if mips else 0.25
    close(out, expected, loose)
    for mine, twin in zip(ours, inputs, strict=True):
        if twin.grad is not None:
            close(mine.grad, twin.grad, loose)


def test_mips_are_averages_and_the_level_is_the_footprint(backend):
    rasterizer, device = backend
    image = torch.randn(16, 32, 2, generator=generator()).to(device).requires_grad_()
    uv = torch.rand(200, 2, generator=generator(1)).to(device)
    da = torch.zeros(200, 4, device=device)
    da[:, 0], da[:, 3] = 2 / 32, 4 / 16  # 2 texels wide, 4 high: the long axis decides, level 2
    by_footprint = rasterizer.texture(image, uv, uv_da=da, filter="trilinear")
    level2 = rasterizer.texture(halved(halved(image)), uv)
    torch.testing.assert_close(by_footprint, level2, atol=2e-3, rtol=1e-3)
    whole = rasterizer.texture(image, uv, filter="trilinear", level=torch.full((200,), 9.0, device=device))
    torch.testing.assert_close(whole, image.mean((0, 1)).expand(200, 2), atol=1e-5, rtol=1e-4)
    (g,) = torch.autograd.grad(whole[0, 0], image)
    torch.testing.assert_close(g[..., 0], torch.full((16, 32), 1 / 512, device=device))
    odd = torch.zeros(6, 5, 1, device=device)
    with pytest.raises(ValueError, match="powers of two"):
        rasterizer.texture(odd, uv, uv_da=da, filter="trilinear")
    assert rasterizer.texture(odd, uv).shape == (200, 1)


def test_the_top_left_corner_is_uv_zero(backend):
    rasterizer, device = backend
    image = torch.zeros(4, 4, 1, device=device)
    image[0, 1] = 1
    uv = torch.tensor([[1.5 / 4, 0.5 / 4]], device=device)
    assert float(rasterizer.texture(image, uv)) == pytest.approx(1)


def test_cube_maps_are_continuous_across_edges_and_corners(backend):
    rasterizer, device = backend
    cube = torch.randn(6, 4, 4, 3, generator=generator()).to(device)
    g = generator(1)
    edge = torch.randn(400, 3, generator=g).sign()
    edge[:300, 0] *= torch.rand(300, generator=g)  # edges between y and z faces; the rest are corners
    edge = torch.cat([edge, edge.roll(1, 1), edge.roll(2, 1)])
    nudge = torch.randn(1200, 3, generator=g) * 1e-4
    a, b = (rasterizer.texture(cube, (edge + s * nudge).to(device), boundary="cube") for s in (1, -1))
    assert float((a - b).abs().max()) < 0.01
    assert float((a[:300] - a[300:600]).abs().mean()) > 0.1
