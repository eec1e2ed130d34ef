"""Shading normals between the frame of a mesh and the tangent space of its normal map. glTF's frame, any device."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def tangent_frame(normal: Tensor, tangent: Tensor) -> Tensor:
    """(P, 3, 3) columns tangent, bitangent, normal, of interpolated normals (P, 3) and tangents (P, 4)."""
    n = normalize(normal, dim=-1)
    t = normalize(tangent[:, :3] - n * (n * tangent[:, :3]).sum(-1, keepdim=True), dim=-1)
    b = torch.linalg.cross(n, t) * torch.where(tangent[:, 3:] < 0, -1.0, 1.0)
    return torch.stack([t, b, n], -1)


def from_tangent_space(local: Tensor, normal: Tensor, tangent: Tensor) -> Tensor:
    """Unit shading normals (P, 3) in the mesh's frame, of a normal map's (P, 3)."""
    return normalize((tangent_frame(normal, tangent) @ local[..., None])[..., 0], dim=-1)


def into_tangent_space(shading: Tensor, normal: Tensor, tangent: Tensor) -> Tensor:
    """A normal map's values (P, 3) for shading normals (P, 3); a normal map cannot look inwards, so z >= 0.1."""
    local = (tangent_frame(normal, tangent).mT @ shading[..., None])[..., 0]
    local = torch.cat([local[:, :2], local[:, 2:].clamp(min=0.1)], -1)
    return normalize(local, dim=-1)
