"""Drawing a finished mesh: geometry, depth, light and material land where they should."""

import math

import pytest
import torch
import trimesh

from viewmesh.geometry.camera import canonical6, fibonacci_sphere, look_at, pinhole
from viewmesh.geometry.mesh import Material, Mesh, TexturedMesh
from viewmesh.render.draw import draw, draw_depth
from viewmesh.render.rasterizer import get_rasterizer


def textured_sphere(radius: float = 0.45, roughness: float = 1.0, metallic: float = 0.0) -> TexturedMesh:
    ball = trimesh.creation.icosphere(4)
    v = torch.tensor(ball.vertices, dtype=torch.float32)
    uvs = torch.stack(
        [torch.atan2(v[:, 0], v[:, 2]) / (2 * math.pi) + 0.5, torch.arccos(v[:, 1].clamp(-1, 1)) / math.pi], -1
    )
    f = torch.tensor(ball.faces)
    color = torch.zeros(16, 16, 3)
    color[:8], color[8:] = torch.tensor([0.8, 0.1, 0.1]), torch.tensor([0.1, 0.1, 0.8])  # red above, blue below
    orm = torch.tensor([1.0, roughness, metallic]).expand(16, 16, 3)
    normal = torch.tensor([0.0, 0, 1]).expand(16, 16, 3)
    return TexturedMesh(Mesh(v * radius, f), uvs, f, Material(color, orm, normal))


def test_silhouette_depth_and_texture_of_a_sphere():
    cameras = canonical6(64, 64)
    images, depth = draw(textured_sphere(), cameras), draw_depth(textured_sphere().mesh, cameras)
    assert images.shape == (6, 64, 64, 4)
    assert images.dtype == torch.float32
    d, r = 2.2, 0.45
    outline = float(cameras.fy[0]) * r / math.sqrt(d * d - r * r)
    torch.testing.assert_close(images[..., 3].sum((1, 2)), torch.full((6,), math.pi * outline**2), rtol=0.01, atol=0)
    points = cameras.unproject(depth)
    on_surface = points[depth > 0].norm(dim=-1)
    assert float((on_surface - r).abs().max()) < 0.003
    assert float(((depth > 0).float() - (images[..., 3] > 0.5).float()).abs().mean()) < 0.003
    front = images[0]
    assert front[24, 32, 0] > 3 * front[24, 32, 2]  # red above
    assert front[40, 32, 2] > 3 * front[40, 32, 0]  # blue below
    assert images[4, 32, 32, 0] > 3 * images[4, 32, 32, 2]  # from the top
    assert bool((images[..., :3][depth == 0].amax(-1) <= 2 * images[..., 3][depth == 0] + 1e-6).all())  # premultiplied


def test_a_constant_environment_lights_every_view_alike():
    cameras = pinhole(look_at(2.2 * fibonacci_sphere(5), torch.zeros(3), torch.tensor([0.0, 1, 0])), 0.7, 48, 48)
    images = draw(textured_sphere(), cameras, torch.full((8, 16, 3), 2.0), supersample=1)
    brightness = images[:, 24, 24].double().amax(-1)
    # diffuse 0.8 * 2, and a dielectric's reflection of 4 % of the light, less what roughness loses
    color = images[..., :3].amax(-1)[images[..., 3] > 0.99]
    assert float(brightness.max()) > 1.5
    assert 1.6 < float(color.median()) < 1.6 + 2 * 0.1


def test_back_ends_draw_the_same_picture():
    cameras = canonical6(40, 40)[[0, 1]]
    ball, backends = textured_sphere(), [get_rasterizer("cpu", name) for name in ("numba", "torch")]
    a, b = (draw(ball, cameras, rasterizer=backend) for backend in backends)
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(*(draw_depth(ball.mesh, cameras, backend) for backend in backends))


def test_a_normal_map_tilts_towards_its_green_axis():
    """+y of the map is the texture's top (the sphere's north): light from above must brighten."""
    ball = textured_sphere()
    above = torch.zeros(16, 32, 3)
    above[:4] = 4.0
    tilted = torch.tensor([0.0, 0.6, 0.8]).expand(16, 16, 3)
    flat = ball.material
    up = TexturedMesh(ball.mesh, ball.uvs, ball.uv_faces, Material(flat.base_color, flat.orm, tilted))
    cameras = canonical6(32, 32)[[0, 3]]
    before, after = (draw(m, cameras, above)[:, 15:17, 15:17, :3].mean((1, 2, 3)) for m in (ball, up))
    assert bool((after > 1.3 * before).all())


@pytest.mark.parametrize("supersample", [1, 2, 3])
def test_supersampling_keeps_the_picture(supersample):
    images = draw(textured_sphere(), canonical6(24, 32)[[0]], supersample=supersample)
    assert images.shape == (1, 24, 32, 4)
    expected = math.pi * (float(canonical6(24, 32).fy[0]) * 0.45 / math.sqrt(2.2**2 - 0.45**2)) ** 2
    assert float(images[..., 3].sum()) == pytest.approx(expected, rel=0.03)
