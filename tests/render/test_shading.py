"""The BRDF table, split-sum shading, normal perturbation, colour spaces, normals and tangents."""

import math

import pytest
import torch

from viewmesh.geometry.normals import vertex_normals, vertex_tangents
from viewmesh.render.brdf import environment_brdf, table
from viewmesh.render.light import build_light
from viewmesh.render.rasterizer import get_rasterizer
from viewmesh.render.shading import (
    face_viewer,
    linear_to_srgb,
    perturb_normal,
    shade,
    shade_directions,
    srgb_to_linear,
)

RASTERIZER = get_rasterizer("cpu")
CPU = torch.device("cpu")


def brute_force(n_dot_v: float, roughness: float) -> torch.Tensor:
    """Scale and bias by a quadrature over light directions: GGX * Smith / (4 N.V), no importance sampling."""
    n = 1500
    a2 = roughness**4
    # finer near the pole of the mirror direction: theta is measured from it
    theta = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    step = 3 * theta**2 * math.pi / n  # theta = pi x^3
    theta = math.pi * theta**3
    phi = (torch.arange(400, dtype=torch.float64) + 0.5) * math.pi / 400  # symmetric: half, counted twice
    theta, phi = torch.meshgrid(theta, phi, indexing="ij")
    v = torch.tensor([math.sqrt(1 - n_dot_v**2), 0, n_dot_v], dtype=torch.float64)
    mirror = torch.tensor([-float(v[0]), 0, n_dot_v], dtype=torch.float64)
    side = torch.tensor([n_dot_v, 0, float(v[0])], dtype=torch.float64)
    light = theta.cos()[..., None] * mirror + (theta.sin() * phi.cos())[..., None] * side
    light[..., 1] += theta.sin() * phi.sin()
    h = torch.nn.functional.normalize(light + v, dim=-1)
    d = a2 / (math.pi * (h[..., 2] ** 2 * (a2 - 1) + 1) ** 2)
    nl = light[..., 2].clamp_min(1e-9)

    def smith(c):
        return (torch.sqrt(1 + a2 * (1 - c * c) / (c * c)) - 1) / 2

    g = 1 / (1 + smith(nl) + smith(torch.tensor(n_dot_v, dtype=torch.float64)))
    value = torch.where(light[..., 2] > 0, d * g / (4 * n_dot_v), 0.0) * theta.sin() * step[:, None] * math.pi / 400 * 2
    fresnel = (1 - (h @ v).clamp(0, 1)) ** 5
    return torch.stack([(value * (1 - fresnel)).sum(), (value * fresnel).sum()])


def test_the_table_against_brute_force():
    t = table(CPU)
    for row, column in ((12, 20), (20, 5), (32, 32), (32, 60), (50, 10), (63, 45)):
        expected = brute_force((column + 0.5) / 64, (row + 0.5) / 64)
        torch.testing.assert_close(t[row, column].double(), expected, atol=4e-3, rtol=0)


def test_the_table_gains_no_energy():
    t = table(CPU)
    assert float(t.min()) >= 0
    total = t.sum(-1)  # a white furnace with f0 = 1
    assert float(total.max()) <= 1 + 1e-5
    assert float(total[:8, 8:].min()) > 0.99  # smooth surfaces lose nothing
    assert float(total[-1].min()) > 0.3  # rough ones lose what bounces twice


def test_environment_brdf_is_differentiable_in_both():
    x = torch.tensor([[0.31, 0.52], [0.8, 0.2]], dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda p: environment_brdf(p[:, 0], p[:, 1], RASTERIZER), (x,), eps=1e-6, atol=1e-4)
    outside = environment_brdf(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]), RASTERIZER)
    torch.testing.assert_close(outside, torch.stack([table(CPU)[0, 0], table(CPU)[-1, -1]]))


def hemisphere(P: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    n = torch.nn.functional.normalize(torch.randn(P, 3, generator=g), dim=-1)
    v = torch.nn.functional.normalize(torch.randn(P, 3, generator=g), dim=-1)
    return n, v * (n * v).sum(-1, keepdim=True).sign()


def test_a_white_furnace():
    """Under constant light: a white dielectric returns about what it gets, metals lose only what bounces twice."""
    n, v = hemisphere(200)
    light = build_light(16).prefilter(torch.ones(6, 16, 16, 3))
    for metallic in (0.0, 1.0):
        for roughness in (0.1, 0.5, 1.0):
            orm = torch.tensor([1.0, roughness, metallic]).expand(200, 3)
            color = shade_directions(n, v, torch.ones(200, 3), orm, light, RASTERIZER)
            scale, bias = environment_brdf((n * v).sum(-1), torch.full((200,), roughness), RASTERIZER).unbind(-1)
            f0 = 0.04 if metallic == 0 else 1.0
            torch.testing.assert_close(color[:, 0], (1 - metallic) + f0 * scale + bias, atol=1e-4, rtol=0)
    half = shade_directions(n, v, torch.ones(200, 3), orm * torch.tensor([0.5, 1, 1]), light, RASTERIZER)
    torch.testing.assert_close(half, color * 0.5)  # occlusion multiplies; 1 is unoccluded


def test_a_smooth_metal_is_a_mirror():
    base = torch.zeros(6, 16, 16, 3)
    base[0] = torch.tensor([1.0, 2.0, 3.0])  # light from +x only
    light = build_light(16).prefilter(base)
    n = torch.nn.functional.normalize(torch.tensor([[1.0, 0, 1]]), dim=-1)
    orm, white = torch.tensor([[1.0, 0.05, 1.0]]), torch.ones(1, 3)
    seen = shade(torch.zeros(1, 3), n, torch.tensor([0.0, 0, 4]), white, orm, light, RASTERIZER)
    torch.testing.assert_close(seen, torch.tensor([[1.0, 2, 3]]), rtol=0.02, atol=0)
    other = shade(torch.zeros(1, 3), n, torch.tensor([4.0, 0, 0]), white, orm, light, RASTERIZER)
    assert float(other.max()) < 0.02  # looks back to +z


def test_shading_is_differentiable_in_everything():
    n, v = hemisphere(40)
    base = torch.rand(6, 16, 16, 3, generator=torch.Generator().manual_seed(1))
    inputs = [n, v, torch.full((40, 3), 0.5), torch.full((40, 3), 0.4), base]
    inputs = [t.clone().requires_grad_() for t in inputs]
    shade_directions(*inputs[:4], build_light(16).prefilter(inputs[4]), RASTERIZER).square().sum().backward()
    for t in inputs:
        assert bool(torch.isfinite(t.grad).all())
        assert float(t.grad.abs().max()) > 0


def test_normals_look_at_the_viewer():
    g, v = hemisphere(500)
    g = g * torch.where(torch.arange(500) % 2 == 0, 1.0, -1.0)[:, None]  # every other face is seen from behind
    n = torch.nn.functional.normalize(g + 0.8 * torch.randn(500, 3, generator=torch.Generator().manual_seed(5)), dim=-1)
    out = face_viewer(n, g, v)
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(500))
    assert float((out * v).sum(-1).min()) >= -1e-6
    torch.testing.assert_close(face_viewer(-n, -g, v), out)
    front = (n * v).sum(-1) * (g * v).sum(-1).sign() > 0.1
    torch.testing.assert_close(out[front], (n * (g * v).sum(-1, keepdim=True).sign())[front])


def test_a_flat_normal_map_changes_nothing_and_y_is_the_top_of_the_texture():
    # a square seen from +z, u to the right, v downwards
    vertices = torch.tensor([[-1.0, 1, 0], [1, 1, 0], [1, -1, 0], [-1, -1, 0]])
    faces = torch.tensor([[0, 2, 1], [0, 3, 2]])
    uvs = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    normals = vertex_normals(vertices, faces)
    torch.testing.assert_close(normals, torch.tensor([[0.0, 0, 1]] * 4))
    tangents = vertex_tangents(vertices, faces, normals, uvs, faces)
    torch.testing.assert_close(tangents, torch.tensor([[1.0, 0, 0, 1]] * 4))
    view = torch.tensor([[0.0, 0, 1]] * 4)
    flat = torch.tensor([[0.0, 0, 1]] * 4)
    torch.testing.assert_close(perturb_normal(normals, tangents, flat, view), normals)
    up = torch.tensor([[0.0, 0.6, 0.8]] * 4)
    torch.testing.assert_close(perturb_normal(normals, tangents, up, view), up)
    mirrored = vertex_tangents(vertices, faces, normals, uvs * torch.tensor([-1.0, 1]) + torch.tensor([1.0, 0]), faces)
    torch.testing.assert_close(mirrored, torch.tensor([[-1.0, 0, 0, -1]] * 4))
    torch.testing.assert_close(perturb_normal(normals, mirrored, up, view), up)  # the top is still the top
    right = torch.tensor([[0.6, 0.0, 0.8]] * 4)
    torch.testing.assert_close(perturb_normal(normals, mirrored, right, view)[:, 0], torch.tensor([-0.6] * 4))


def random_mesh() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    vertices = torch.randn(9, 3, generator=g, dtype=torch.float64)
    faces = torch.stack([torch.randperm(8, generator=g)[:3] for _ in range(14)])  # vertex 8 has no face
    return vertices, faces, torch.rand(9, 2, generator=g, dtype=torch.float64)


def test_vertex_normals_against_a_loop():
    vertices, faces, _ = random_mesh()
    total = torch.zeros(9, 3, dtype=torch.float64)
    for a, b, c in faces.tolist():
        n = torch.linalg.cross(vertices[b] - vertices[a], vertices[c] - vertices[a])
        for i in (a, b, c):
            total[i] += n  # its length is twice the area
    total[8] = torch.tensor([0.0, 0, 1])
    torch.testing.assert_close(vertex_normals(vertices, faces), total / total.norm(dim=1, keepdim=True))
    vertices.requires_grad_()
    torch.autograd.gradcheck(lambda v: vertex_normals(v, faces), (vertices,))


def test_vertex_tangents_against_a_loop():
    vertices, faces, uvs = random_mesh()
    normals = vertex_normals(vertices, faces)
    total, sign = torch.zeros(9, 3, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)
    for face in faces.tolist():
        p, t = vertices[face], uvs[face]
        jacobian = torch.linalg.solve(torch.stack([t[1] - t[0], t[2] - t[0]]), torch.stack([p[1] - p[0], p[2] - p[0]]))
        flipped = torch.linalg.det(torch.stack([t[1] - t[0], t[2] - t[0]])) > 0  # v grows downwards
        for k, i in enumerate(face):
            a, b = p[(k + 1) % 3] - p[k], p[(k + 2) % 3] - p[k]
            angle = torch.arccos(a @ b / a.norm() / b.norm())
            along = jacobian[0] - normals[i] * (normals[i] @ jacobian[0])
            total[i] += angle * along / along.norm()
            sign[i] += -angle if flipped else angle
    out = vertex_tangents(vertices, faces, normals, uvs, faces)
    torch.testing.assert_close(out[:8, :3], (total / total.norm(dim=1, keepdim=True))[:8])
    torch.testing.assert_close(out[:8, 3], torch.where(sign < 0, -1.0, 1.0).double()[:8])
    assert float(out[8, :3].norm()) == pytest.approx(1)  # no face: any tangent, but a unit one, off the normal
    assert abs(float(out[8, :3] @ normals[8])) < 1e-9


def test_srgb():
    x = torch.linspace(-0.1, 1.5, 400, dtype=torch.float64)
    torch.testing.assert_close(linear_to_srgb(srgb_to_linear(x)), x, atol=3e-6, rtol=0)
    assert float(srgb_to_linear(torch.tensor(0.5))) == pytest.approx(0.21404114)
    for curve in (srgb_to_linear, linear_to_srgb):
        zero = torch.zeros(1, requires_grad=True)
        curve(zero).backward()
        assert float(zero.grad) == pytest.approx(12.92 if curve is linear_to_srgb else 1 / 12.92)
