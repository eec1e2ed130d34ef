"""A small finished reconstruction for the export tests: a ball with seams, a checked texture and a bumpy normal map."""

import math

import torch

from viewmesh.export.result import Reconstruction
from viewmesh.geometry.camera import fibonacci_sphere
from viewmesh.geometry.mesh import Material, Mesh, TexturedMesh


def ball_mesh(rows: int = 13, columns: int = 24, radius: float = 0.4) -> tuple[Mesh, torch.Tensor, torch.Tensor]:
    """A sphere by latitude and longitude: watertight in its vertices, with a seam in its UVs."""
    theta = torch.linspace(0, math.pi, rows)[1:-1]
    phi = torch.arange(columns) * (2 * math.pi / columns)
    height = theta.cos()[:, None].expand(-1, columns)
    ring = torch.stack([torch.outer(theta.sin(), phi.sin()), height, torch.outer(theta.sin(), phi.cos())], -1)
    vertices = torch.cat([ring.reshape(-1, 3), torch.tensor([[0.0, 1, 0], [0, -1, 0]])]) * radius
    top, bottom, inner = len(vertices) - 2, len(vertices) - 1, rows - 2
    u = torch.linspace(0.05, 0.95, columns + 1)
    v = torch.linspace(0.05, 0.95, rows)
    uvs = torch.stack([u.repeat(rows), v.repeat_interleave(columns + 1)], 1)
    faces, uv_faces = [], []
    for j in range(columns):
        k = (j + 1) % columns
        for i in range(inner - 1):
            a, b, c, d = i * columns + j, i * columns + k, (i + 1) * columns + k, (i + 1) * columns + j
            s = (i + 1) * (columns + 1) + j
            w = s + columns + 1
            faces += [[a, d, c], [a, c, b]]
            uv_faces += [[s, w, w + 1], [s, w + 1, s + 1]]
        faces += [[top, j, k], [bottom, (inner - 1) * columns + k, (inner - 1) * columns + j]]
        low = (rows - 2) * (columns + 1) + j
        uv_faces += [[j, columns + 1 + j, columns + 2 + j], [low + columns + 2, low + 1, low]]
    return Mesh(vertices, torch.tensor(faces)), uvs, torch.tensor(uv_faces)


def textured_ball(size: int = 64, *, flat: bool = False) -> TexturedMesh:
    mesh, uvs, uv_faces = ball_mesh()
    t = (torch.arange(size) + 0.5) / size
    y, x = torch.meshgrid(t, t, indexing="ij")
    base_color = torch.stack([x, y, 0.2 + 0.6 * ((x * 6).floor() + (y * 6).floor()) % 2 * 0.5], -1)
    orm = torch.stack([torch.ones_like(x), 0.3 + 0.5 * x, 0.1 + 0.2 * y], -1)
    bump = torch.stack([0.3 * torch.sin(12 * x), 0.3 * torch.cos(12 * y), torch.ones_like(x)], -1)
    normal = torch.tensor([0.0, 0, 1]).expand_as(bump).clone() if flat else torch.nn.functional.normalize(bump, dim=-1)
    environment = 0.2 + fibonacci_sphere(8 * 16).float().reshape(8, 16, 3).abs()
    return TexturedMesh(mesh, uvs, uv_faces, Material(base_color, orm, normal), environment).validate()


def similarity(scale: float = 3.0) -> torch.Tensor:
    """A world that is not +y up: turned by 90 degrees about x, scaled and moved."""
    m = torch.eye(4, dtype=torch.float64)
    m[:3, :3] = scale * torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]], dtype=torch.float64)
    m[:3, 3] = torch.tensor([1.0, 2, 3])
    return m


def result_of(mesh: TexturedMesh | None = None, **fields) -> Reconstruction:
    return Reconstruction(
        mesh=mesh or textured_ball(), world_from_scene=similarity(), seed=7, seconds={"optimise": 1.5},
        licence_notes=("a note",), warnings=("a warning",), **fields,
    )  # fmt: skip
