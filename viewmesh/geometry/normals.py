"""Vertex normals and tangents of a triangle mesh. Differentiable; scatter-adds are in face order on the CPU."""

import torch
from torch import Tensor

from viewmesh.geometry.rows import rows_at


def unit(vectors: Tensor, eps: float = 1e-12) -> Tensor:
    """vectors (..., C) of length one; those shorter than eps, divided by it.

    torch's `normalize` with its gradient written out: a third of the operations.
    """
    return _Unit.apply(vectors, eps)  # pyright: ignore[reportReturnType]


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, vectors: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_(min=eps)
        out = vectors / length
        ctx.save_for_backward(out, length)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        out, length = ctx.saved_tensors
        along = (gradient * out).sum(-1, keepdim=True)
        return torch.addcmul(gradient, out, along, value=-1).div_(length), None


def face_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Cross products of two edges, (F, 3): twice the area long, to the side that sees the face counter-clockwise."""
    return corner_normals(rows_at(vertices, faces))


def corner_normals(corners: Tensor) -> Tensor:
    """`face_normals` of triangles given by their corners (F, 3, 3)."""
    a, b, c = corners.unbind(1)
    return torch.linalg.cross(b - a, c - a)


def vertex_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Unit area-weighted normals (V, 3) of vertices (V, 3); (0, 0, 1) at a vertex without area around it."""
    n = face_normals(vertices, faces)[:, None].expand(-1, 3, -1).reshape(-1, 3)  # one for each corner
    return _unit(torch.zeros_like(vertices).index_add(0, faces.flatten(), n), _plus_z(vertices))


def vertex_tangents(vertices: Tensor, faces: Tensor, normals: Tensor, uvs: Tensor, uv_faces: Tensor) -> Tensor:
    """Tangents (T, 4), one per row of uvs (T, 2): a unit vector along growing u, orthogonal to the normal, and a sign.

    The frame is glTF's and, like MikkTSpace, weighs each corner by its angle: bitangent = sign * cross(normal, tangent)
    points to the top of the texture, against growing v. A uv row without area around it gets any orthogonal tangent.
    normals: (V, 3) unit vertex normals.
    """
    along, turn = _corner_tangents(rows_at(vertices, faces), rows_at(uvs, uv_faces), rows_at(normals, faces))
    at = uv_faces.flatten()
    total = vertices.new_zeros(len(uvs), 3).index_add(0, at, along.flatten(0, 1))
    sign = vertices.new_zeros(len(uvs)).index_add(0, at, turn.flatten())
    normal = _plus_z(vertices).repeat(len(uvs), 1).index_put((at,), normals[faces.flatten()])
    return _frames(total, sign, normal)


def _corner_tangents(p: Tensor, t: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """What each corner adds to its uv row's tangent (F, 3, 3) and sign (F, 3); p, n (F, 3, 3), t (F, 3, 2)."""
    (e1, e2), (d1, d2) = ((x[:, 1] - x[:, 0], x[:, 2] - x[:, 0]) for x in (p, t))
    area = d1[:, 0] * d2[:, 1] - d2[:, 0] * d1[:, 1]  # (F,), v grows downwards: negative where not mirrored
    zero = p.new_zeros(3)
    along_u = _unit((d2[:, 1:] * e1 - d1[:, 1:] * e2) * area.sign()[:, None], zero)[:, None]  # (F, 1, 3)
    a, b = _unit(p.roll(-1, 1) - p), _unit(p.roll(-2, 1) - p)  # from each corner to the next two
    angle = torch.arccos((a * b).sum(-1, keepdim=True).clamp(-1 + 1e-6, 1 - 1e-6))  # (F, 3, 1)
    along = angle * _unit(along_u - n * (n * along_u).sum(-1, keepdim=True), zero)
    return along, -angle[..., 0] * area.sign()[:, None]


def _frames(total: Tensor, sign: Tensor, normal: Tensor) -> Tensor:
    """Tangents (T, 4) of the summed corners; any orthogonal one where they cancel."""
    axis = torch.nn.functional.one_hot(normal.abs().argmin(-1), 3).to(total)
    tangent = _unit(total, _unit(torch.linalg.cross(axis, normal)))
    return torch.cat([tangent, torch.where(sign < 0, -1.0, 1.0).to(total)[:, None]], -1)


def _plus_z(like: Tensor) -> Tensor:
    """(0, 0, 1) as `like`: made where it is wanted, for a GPU waits for what comes from elsewhere."""
    return (torch.arange(3, device=like.device) == 2).to(like)


def _unit(v: Tensor, otherwise: Tensor | None = None) -> Tensor:
    """v (..., 3) of length one; `otherwise` where it is shorter than 1e-20."""
    if otherwise is None:
        return unit(v, 1e-20)
    small = v.detach().abs().amax(-1, keepdim=True) < 1e-20
    return torch.where(small, otherwise, unit(v.masked_fill(small, 1.0), 1e-20))
