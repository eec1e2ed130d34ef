"""Which views' masks contradict the others': found by what the visual hull of the rest fills of every mask."""

import torch
from torch import Tensor

from viewmesh.geometry.camera import Cameras
from viewmesh.geometry.hull import voxel_centers

GRID = 40
CONTENT = 0.75  # masks filled to this degree by the hull are consistent enough
GAIN = 0.15  # how much fuller the other masks must get when a view is left out, for it to be the culprit


def disagreeing_views(cameras: Cameras, masks: Tensor, bounds: Tensor) -> list[int]:
    """Indices of views to leave out, at most one in five of at least four.

    A consistent set's hull fills every mask. A wrong mask (or pose) carves away what the others need. masks:
    (N, H, W) in [0, 1], bounds: (2, 3).
    """
    if len(cameras) < 4:
        return []
    small = _pooled(masks)
    points = voxel_centers(GRID, bounds)
    cells, blocked = _looked_up(cameras.resized(*small.shape[-2:]), small, points)
    left_out: list[int] = []
    fill = _fill(small, cells, blocked, left_out)
    while fill < CONTENT and len(left_out) < len(cameras) // 5 + (len(cameras) < 5):
        others = [n for n in range(len(cameras)) if n not in left_out]
        fills = {n: _fill(small, cells, blocked, [*left_out, n]) for n in others}
        best = max(fills, key=lambda n: fills[n])
        if fills[best] < fill + GAIN:
            break
        left_out.append(best)
        fill = fills[best]
    return sorted(left_out)


def _pooled(masks: Tensor) -> Tensor:
    """Masks as bools of about a voxel's size per pixel, widened by a pixel: a thin part must not vanish between two."""
    factor = max(1, round(max(masks.shape[-2:]) / GRID))
    H, W = masks.shape[-2:]
    small = torch.nn.functional.adaptive_max_pool2d(masks[:, None], (max(1, H // factor), max(1, W // factor)))
    return (torch.nn.functional.max_pool2d(small, 3, 1, 1) >= 0.5)[:, 0]


def _looked_up(cameras: Cameras, masks: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Each view's pixel of each point, -1 if out of view, and whether the view rules the point out; both (N, P)."""
    N, H, W = masks.shape
    pixels, depth = cameras.project(points)
    x, y = pixels.clamp(-1e6, 1e6).floor().long().unbind(-1)
    seen = (depth > 0) & (x >= 0) & (x < W) & (y >= 0) & (y < H)
    cells = torch.where(seen, y * W + x, -1)
    inside = masks.reshape(N, -1).gather(1, cells.clamp(min=0))
    return cells, seen & ~inside


def _fill(masks: Tensor, cells: Tensor, blocked: Tensor, left_out: list[int]) -> float:
    """The mean share of each kept mask that the hull of the kept views covers."""
    kept = [n for n in range(len(masks)) if n not in left_out]
    solid = ~blocked[kept].any(0)
    shares = []
    for n in kept:
        hit = cells[n][solid & (cells[n] >= 0)].unique()
        covered = torch.zeros(masks[n].numel(), dtype=torch.bool)
        covered[hit] = True
        mask = masks[n].reshape(-1)
        if mask.any():
            shares.append(float((covered & mask).sum() / mask.sum()))
    return sum(shares) / len(shares) if shares else 0.0
