"""Cube maps as tensors (6, R, R, C): which way each texel looks, and how the faces join.

Face order and orientation are OpenGL's: +x, -x, +y, -y, +z, -z; on a face, s grows with the column and t with the row:

    face  s   t         face  s   t         face  s   t
    +x   -z  -y         +y   +x  +z         +z   +x  -y
    -x   +z  -y         -y   +x  -z         -z   -x  -y

so row 0 of a side face is its upper (+y) edge.
"""

from functools import cache

import torch
from torch import Tensor

# direction of a point (s, t) in [-1, 1]^2 of each face: centre + s * right + t * down
_CENTRE = [[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]]
_RIGHT = [[0, 0, -1], [0, 0, 1], [1, 0, 0], [1, 0, 0], [1, 0, 0], [-1, 0, 0]]
_DOWN = [[0, -1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1], [0, -1, 0], [0, -1, 0]]


def directions(resolution: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """Unit directions of the texel centres, (6, R, R, 3)."""
    return torch.nn.functional.normalize(_points(resolution, 0, device), dim=-1).to(dtype)


def solid_angles(resolution: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """Exact solid angle of each texel in steradians, (6, R, R); they sum to 4 pi."""
    x = torch.linspace(-1, 1, resolution + 1, dtype=torch.float64, device=device)
    s, t = x[None, :], x[:, None]
    corner = torch.atan2(s * t, torch.sqrt(s * s + t * t + 1))
    face = corner[1:, 1:] - corner[:-1, 1:] - corner[1:, :-1] + corner[:-1, :-1]
    return face.to(dtype).expand(6, -1, -1).contiguous()


def face_coordinates(direction: Tensor) -> tuple[Tensor, Tensor]:
    """Where directions (..., 3) meet the cube: s, t in [0, 1] (..., 2), differentiable, and the face (...,) int64."""
    x, y, z = direction.unbind(-1)
    ax, ay, az = x.abs(), y.abs(), z.abs()
    by_x, by_y = (ax >= ay) & (ax >= az), ay >= az
    face = torch.where(
        by_x, torch.where(x >= 0, 0, 1), torch.where(by_y, torch.where(y >= 0, 2, 3), torch.where(z >= 0, 4, 5))
    )
    frame = torch.tensor([_RIGHT, _DOWN, _CENTRE], dtype=direction.dtype, device=direction.device)
    right, down, centre = frame[:, face]
    m = (direction * centre).sum(-1)
    safe = torch.where(m > 0, m, torch.ones_like(m))
    st = torch.stack([(direction * right).sum(-1) / safe, (direction * down).sum(-1) / safe], -1) * 0.5 + 0.5
    return st, face


def padded(cube: Tensor) -> Tensor:
    """Each face with a border of one texel from its neighbours, (6, R + 2, R + 2, C), for seamless bilinear look-up.

    The texel that a corner lacks is the mean of the three that meet there.
    """
    R, C = cube.shape[1], cube.shape[3]
    index, corner, three = _border(R, cube.device)
    flat = cube.reshape(-1, C)
    out = flat.index_select(0, index)
    return out.index_copy(0, corner, flat.index_select(0, three).reshape(24, 3, C).mean(1)).reshape(6, R + 2, R + 2, C)


def _points(R: int, border: int, device: torch.device | str) -> Tensor:
    """Points of the cube's planes at texel centres, with `border` texels beyond each side, float64."""
    x = (torch.arange(-border, R + border, dtype=torch.float64, device=device) + 0.5) * (2 / R) - 1
    centre, right, down = (
        torch.tensor(m, dtype=torch.float64, device=device)[:, None, None] for m in (_CENTRE, _RIGHT, _DOWN)
    )
    return centre + x[None, None, :, None] * right + x[None, :, None, None] * down


@cache
def _border(R: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Flat source texel of every padded texel; the 24 corner texels; the three sources of each corner."""
    with torch.no_grad():
        points = _points(R, 1, "cpu")
        # a border texel lies 1/R beyond an edge in its face's plane; folded around the edge, it is the first texel of
        # the neighbour: clamp along the edge, then step over it by less than one texel
        st, face = face_coordinates(points)
        texel = (st * R).floor().clamp(0, R - 1).long()
        source = (face * R + texel[..., 1]) * R + texel[..., 0]
        pad = torch.arange(6 * (R + 2) ** 2).reshape(6, R + 2, R + 2)
        rows, cols = torch.tensor([0, 0, R + 1, R + 1]), torch.tensor([0, R + 1, 0, R + 1])
        corner = pad[:, rows, cols].reshape(-1)
        inner_rows, inner_cols = rows.clamp(1, R), cols.clamp(1, R)
        three = torch.stack(
            [source[:, inner_rows, inner_cols], source[:, rows, inner_cols], source[:, inner_rows, cols]], -1
        )
        return source.reshape(-1).to(device), corner.to(device), three.reshape(-1).to(device)
