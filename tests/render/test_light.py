"""Cube maps, prefiltered light and lat-long images: laws."""

import math

import pytest
import torch

from viewmesh.render.cubemap import directions, face_coordinates, solid_angles
from viewmesh.render.light import (
    build_light,
    from_latlong,
    latlong,
    latlong_directions,
    rotate,
    sample_cube,
    sample_latlong,
    studio,
)


def smooth(d: torch.Tensor) -> torch.Tensor:
    """A radiance of low frequency, without symmetry."""
    x, y, z = d.unbind(-1)
    return torch.stack([2 + x + 0.3 * y * z, 2 + y - 0.4 * x, 2 - z + 0.5 * x * y], -1)


def rotation(seed: int = 0) -> torch.Tensor:
    q = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)))[0]
    return q * torch.linalg.det(q)


def test_solid_angles_sum_to_the_sphere_and_shrink_to_the_corners():
    area = solid_angles(16, dtype=torch.float64)
    assert float(area.sum()) == pytest.approx(4 * math.pi, rel=1e-12)
    # the solid angle of a small square texel is cos / distance^2
    d = 1 / directions(16, dtype=torch.float64).abs().amax(-1)
    torch.testing.assert_close(area, (2 / 16) ** 2 / d**3, rtol=4e-3, atol=0)
    assert float(area[0, 0, 0]) < 0.3 * float(area[0, 8, 8])


def test_a_texel_looks_where_opengl_says():
    d = directions(2)
    expected = torch.tensor([1, 0.5, 0.5]) / torch.tensor([1, 0.5, 0.5]).norm()
    torch.testing.assert_close(d[0, 0, 0], expected)  # +x: columns towards -z, rows towards -y
    torch.testing.assert_close(d[2, 0, 0], torch.tensor([-0.5, 1, -0.5]) / 1.5**0.5)  # +y: towards +x, towards +z
    st, face = face_coordinates(directions(8))
    assert torch.equal(face, torch.arange(6)[:, None, None].expand(6, 8, 8))
    centres = (torch.arange(8) + 0.5) / 8
    torch.testing.assert_close(st[..., 0], centres.expand(6, 8, 8))
    torch.testing.assert_close(st[..., 1], centres[:, None].expand(6, 8, 8))


@pytest.mark.parametrize("resolution", [8, 16, 32])
def test_constant_light_is_constant_everywhere(resolution):
    base = torch.tensor([0.2, 1.0, 7.0]).expand(6, resolution, resolution, 3)
    light = build_light(resolution).prefilter(base)
    for m in (light.diffuse, *light.specular):
        torch.testing.assert_close(m, base[:, : m.shape[1], : m.shape[1]], rtol=1e-5, atol=0)
    sizes = [m.shape[1] for m in light.specular]
    assert sizes[0] == resolution
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("resolution", [16, 32])
def test_one_bright_texel(resolution):
    """Irradiance is L * cosine * solid angle; a GGX lobe peaks at the light and follows its formula."""
    base = torch.zeros(6, resolution, resolution, 3)
    base[4, 3, 9] = 5.0
    d = directions(resolution)[4, 3, 9]
    area = float(solid_angles(resolution)[4, 3, 9])
    light = build_light(resolution).prefilter(base)
    cosine = (directions(light.diffuse.shape[1]) @ d).clamp_min(0)
    torch.testing.assert_close(
        light.diffuse[..., 0], 5 * cosine * area / math.pi, rtol=0.02, atol=2e-4
    )  # its size shows at the horizon
    rough = light.specular[-1]  # roughness 1: D is constant, so this lobe is the cosine too
    cosine = (directions(rough.shape[1]) @ d).clamp_min(0)
    torch.testing.assert_close(rough[..., 0], 5 * cosine * area / math.pi, rtol=0.05, atol=5 * 3e-3 * area)
    for m in light.specular[1:]:
        assert float((directions(m.shape[1]).reshape(-1, 3) @ d)[m[..., 0].argmax()]) > math.cos(
            1.2 * math.pi / 2 / m.shape[1]
        )


def test_a_rough_lobe_against_a_quadrature():
    """Level values at a few texels, from GGX importance sampling of H on a fine grid."""
    light = build_light(16)
    base = smooth(directions(16))
    out = light.prefilter(base)
    for level in (2, 3):
        alpha = light.roughness[level] ** 2
        n = directions(out.specular[level].shape[1])[3, 1, 0].double()
        u1, u2 = torch.meshgrid(*[(torch.arange(200, dtype=torch.float64) + 0.5) / 200] * 2, indexing="ij")
        cos2 = (1 - u1) / (1 + (alpha**2 - 1) * u1)
        sin = (1 - cos2).sqrt()
        h = torch.stack([sin * (2 * math.pi * u2).cos(), sin * (2 * math.pi * u2).sin(), cos2.sqrt()], -1)
        t = torch.linalg.cross(n, torch.tensor([0.0, 0, 1], dtype=torch.float64))
        t = t / t.norm()
        frame = torch.stack([t, torch.linalg.cross(n, t), n])
        light_dir = 2 * h[..., 2:] * h - torch.tensor([0.0, 0, 1], dtype=torch.float64)
        weight = light_dir[..., 2:].clamp_min(0)
        expected = (smooth(light_dir @ frame) * weight).sum((0, 1)) / weight.sum()
        torch.testing.assert_close(out.specular[level][3, 1, 0].double(), expected, rtol=0.01, atol=0)


@pytest.mark.parametrize("resolution", [8, 32])
def test_prefilter_is_linear_and_its_gradient_is_the_transpose(resolution):
    g = torch.Generator().manual_seed(0)
    light = build_light(resolution)
    x = torch.rand(6, resolution, resolution, 3, generator=g).requires_grad_()
    y = torch.rand(6, resolution, resolution, 3, generator=g)
    out, other = light.prefilter(x), light.prefilter(y)
    weights = [torch.randn(m.shape, generator=g) for m in (out.diffuse, *out.specular)]
    total = sum((m * w).sum() for m, w in zip((out.diffuse, *out.specular), weights, strict=True))
    assert isinstance(total, torch.Tensor)
    total.backward()
    expected = sum((m * w).sum() for m, w in zip((other.diffuse, *other.specular), weights, strict=True))
    assert float((x.grad * y).sum()) == pytest.approx(float(expected), rel=1e-3, abs=1e-2)


def test_a_level_per_roughness():
    light = build_light(8, levels=((8, 0.1), (4, 0.4), (4, 1.0))).prefilter(torch.ones(6, 8, 8, 3))
    level = light.level(torch.tensor([0.0, 0.1, 0.25, 0.4, 0.7, 1.0]))
    torch.testing.assert_close(level, torch.tensor([0, 0, 0.5, 1, 1.5, 2]))
    with pytest.raises(ValueError, match="must have resolution 8"):
        build_light(8, levels=((4, 0.1), (4, 0.4)))


def test_prefilter_turns_with_the_light():
    turn = rotation()
    light = build_light(16)
    straight = light.prefilter(smooth(directions(16)))
    turned = light.prefilter(smooth(directions(16) @ turn))
    for a, b in zip((straight.diffuse, *straight.specular), (turned.diffuse, *turned.specular), strict=True):
        torch.testing.assert_close(b, rotate(a, turn), rtol=0.04, atol=0)


def test_rotate_moves_light_from_d_to_the_turned_d():
    turn = rotation(1)
    d = directions(32)
    torch.testing.assert_close(rotate(smooth(d), turn), smooth(d @ turn), rtol=0.01, atol=0.01)
    image = smooth(latlong_directions(64))
    torch.testing.assert_close(rotate(image, turn), smooth(latlong_directions(64) @ turn), rtol=0.01, atol=0.01)
    torch.testing.assert_close(rotate(rotate(smooth(d), turn), turn.T), smooth(d), rtol=0.01, atol=0.01)
    sun = torch.zeros(6, 32, 32, 1)
    sun[0, 16, 16] = 1  # +x, moved to wherever the rotation takes +x
    moved = rotate(sun, turn)
    assert float(directions(32).reshape(-1, 3)[moved.argmax()] @ turn[:, 0]) > 0.99


def test_latlong_has_the_columns_that_textured_mesh_documents():
    d = torch.tensor([[0.0, 0, -1], [1, 0, 0], [0, 0, 1], [-1, 0, 0], [0, 1, 0]])
    H = 64
    grid = latlong_directions(H)
    for direction, column in zip(d[:4], (0, H // 2, H, 3 * H // 2), strict=True):
        assert float(grid[H // 2, column % (2 * H)] @ direction) > 0.998
    assert float(grid[0, 0, 1]) > 0.999
    image = torch.zeros(H, 2 * H, 3)
    image[:, H // 2 - 4 : H // 2 + 4] = 1  # around +x
    torch.testing.assert_close(sample_latlong(image, d[:4])[:, 0], torch.tensor([0.0, 1, 0, 0]))
    cube = from_latlong(image, 16)
    assert float(cube[0, 8, 8, 0]) == pytest.approx(1)
    assert float(cube[1].max()) == 0


def test_latlong_round_trip_and_energy():
    base = smooth(directions(32))
    torch.testing.assert_close(from_latlong(latlong(base, 64), 32), base, rtol=0.01, atol=0.01)
    image = torch.zeros(64, 128, 3)
    image[20, 40] = 1000  # a sun of one pixel keeps its energy
    theta = torch.tensor([20, 21]) * math.pi / 64
    energy = 1000 * float(theta[0].cos() - theta[1].cos()) * 2 * math.pi / 128
    cube = from_latlong(image, 16)
    assert float((cube[..., 0] * solid_angles(16)).sum()) == pytest.approx(energy, rel=0.1)


def test_studio_is_brightest_above():
    base = studio(16)
    up, down = sample_cube(base, torch.tensor([[0.0, 1, 0], [0, -1, 0]]))
    assert float(base.min()) > 0
    assert float(up[0]) > float(down[0])
