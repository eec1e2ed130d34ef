"""Which texels a set of flat triangles covers. Any device, no mesh, no image."""

import torch
from torch import Tensor


def texels_inside(corners: Tensor, margin: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every texel whose centre (x + 0.5, y + 0.5) lies inside a triangle, by at least `margin` texels.

    corners: (F, 3, 2) float64, texels, x and y; either orientation; margin may be negative.
    Returns face, x, y (K,) int64 and barycentric (K, 3) float64; a texel on a shared edge occurs once per triangle.
    Degenerate triangles cover nothing.
    """
    low = torch.ceil(corners.amin(1) - 0.5 + min(margin, 0.0)).long()
    size = (torch.floor(corners.amax(1) - 0.5 - min(margin, 0.0)).long() - low + 1).clamp(min=0)
    count = size.prod(1)
    edge, start = corners.roll(-1, 1) - corners, corners  # edge i runs from corner i to corner i + 1
    area = edge[:, 0, 0] * -edge[:, 2, 1] + edge[:, 0, 1] * edge[:, 2, 0]  # twice the signed area
    found = []
    order = torch.arange(len(corners), device=corners.device)[area != 0]
    pieces = torch.tensor_split(order, max(1, int(count.sum()) // 250_000))
    for part in pieces:
        n = count[part]
        face = torch.repeat_interleave(part, n)
        k = torch.arange(len(face), device=corners.device) - torch.repeat_interleave(n.cumsum(0) - n, n)
        width = size[face, 0]
        x, y = low[face, 0] + k % width, low[face, 1] + k // width
        centre = torch.stack([x, y], 1) + 0.5
        offset, direction = centre[:, None] - start[face], edge[face]  # (K, 3, 2)
        cross = direction[..., 0] * offset[..., 1] - direction[..., 1] * offset[..., 0]  # (K, 3), of edge i
        cross = cross * torch.sign(area[face])[:, None]
        inside = (cross >= margin * direction.norm(dim=-1)).all(1)
        weight = (cross / area[face].abs()[:, None])[inside][:, [1, 2, 0]]  # corner i lies opposite edge i + 1
        found.append((face[inside], x[inside], y[inside], weight))
    face, x, y, weight = (torch.cat(column) for column in zip(*found, strict=True))
    return face, x, y, weight
