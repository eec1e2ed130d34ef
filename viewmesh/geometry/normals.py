"""Vertex normals and tangents of a triangle mesh. Differentiable; scatter-adds are in face order on the CPU."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def face_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Cross products of two edges, (F, 3): twice the area long, to the side that sees the face counter-clockwise."""
    a, b, c = (vertices.index_select(0, faces[:, i]) for i in range(3))
    return torch.linalg.cross(b - a, c - a)


def vertex_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Unit area-weighted normals (V, 3) of vertices (V, 3); (0, 0, 1) at a vertex without area around it."""
    n = face_normals(vertices, faces)
    total = torch.zeros_like(vertices)
    for i in range(3):
        total = total.index_add(0, faces[:, i], n)
    return _unit(total, torch.tensor([0.0, 0, 1]).to(vertices))


def vertex_tangents(vertices: Tensor, faces: Tensor, normals: Tensor, uvs: Tensor, uv_faces: Tensor) -> Tensor:
    """Tangents (T, 4), one per row of uvs (T, 2): a unit vector along growing u, orthogonal to the normal, and a sign.

    The frame is glTF's and, like MikkTSpace, weighs each corner by its angle: bitangent = sign * cross(normal, tangent)
    points to the top of the texture, against growing v. A uv row without area around it gets any orthogonal tangent.
    normals: (V, 3) unit vertex normals.
    """
    p, t = vertices[faces], uvs[uv_faces]  # (F, 3, 3), (F, 3, 2)
    (e1, e2), (d1, d2) = ((x[:, 1] - x[:, 0], x[:, 2] - x[:, 0]) for x in (p, t))
    area = d1[:, 0] * d2[:, 1] - d2[:, 0] * d1[:, 1]  # (F,), v grows downwards: negative where not mirrored
    along_u = _unit((d2[:, 1:] * e1 - d1[:, 1:] * e2) * area.sign()[:, None], torch.zeros(3).to(p))
    total, sign = p.new_zeros(len(uvs), 3), p.new_zeros(len(uvs))
    normal = torch.tensor([0.0, 0, 1]).to(p).repeat(len(uvs), 1)
    for i in range(3):
        n = normals.index_select(0, faces[:, i])
        a, b = _unit(p[:, (i + 1) % 3] - p[:, i]), _unit(p[:, (i + 2) % 3] - p[:, i])
        angle = torch.arccos((a * b).sum(-1).clamp(-1 + 1e-6, 1 - 1e-6))[:, None]
        projected = _unit(along_u - n * (n * along_u).sum(-1, keepdim=True), torch.zeros(3).to(p))
        total = total.index_add(0, uv_faces[:, i], angle * projected)
        sign = sign.index_add(0, uv_faces[:, i], -angle[:, 0] * area.sign())
        normal = normal.index_copy(0, uv_faces[:, i], n)
    axis = torch.nn.functional.one_hot(normal.abs().argmin(-1), 3).to(p)
    tangent = _unit(total, _unit(torch.linalg.cross(axis, normal)))
    return torch.cat([tangent, torch.where(sign < 0, -1.0, 1.0).to(p)[:, None]], -1)


def _unit(v: Tensor, otherwise: Tensor | None = None) -> Tensor:
    """v (..., 3) of length one; `otherwise` where it is shorter than 1e-20."""
    if otherwise is None:
        return normalize(v, dim=-1, eps=1e-20)
    small = v.detach().abs().amax(-1, keepdim=True) < 1e-20
    return torch.where(small, otherwise, normalize(torch.where(small, torch.ones_like(v), v), dim=-1, eps=1e-20))
