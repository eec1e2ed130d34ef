"""Which views' masks contradict the others': found by what the visual hull of the rest fills of every mask."""

import torch
from torch import Tensor

from viewmesh.geometry.camera import Cameras
from viewmesh.geometry.hull import voxel_centers

GRID = 40
# Thin parts fall between the voxels of the grid, so that even good masks are not filled to 1: leaving out the culprit
# must fill the others' masks by this much more, in itself and of what they lack.
LEAST_GAIN, RELATIVE_GAIN = 0.02, 0.3


def disagreeing_views(cameras: Cameras, masks: Tensor, bounds: Tensor, known: Tensor | None = None) -> list[int]:
    """Indices of views to leave out, at most one in five of at least four.

    A consistent set's hull fills every mask. A wrong mask (or pose) carves away what the others need. masks:
    (N, H, W) in [0, 1], bounds: (2, 3), known: (N, H, W) bool, where a view does see; None: all over.
    """
    if len(cameras) < 4:
        return []
    small = _pooled(masks)
    seen = torch.ones_like(small) if known is None else ~_pooled((~known).float())
    small &= seen
    points = voxel_centers(GRID, bounds)
    cells, blocked = _looked_up(cameras.resized(*small.shape[-2:]), small, seen, points)
    left_out: list[int] = []
    kept = list(range(len(cameras)))
    while len(left_out) < max(1, len(cameras) // 5):
        against = blocked[kept].sum(0, dtype=torch.int32)  # (P,) how many views rule the voxel out
        near = against <= 1  # the rest stays ruled out whichever view is left out
        hits, only, solid = cells[:, near], blocked[:, near], against[near] == 0
        filled = _filled(small, hits, solid)
        gains = {}
        for n in kept:
            others = [k for k in kept if k != n]
            before = float(filled[others].mean())
            after = float(_filled(small, hits, solid | only[n])[others].mean())
            gains[n] = after - before - max(LEAST_GAIN, RELATIVE_GAIN * (1 - before))
        worst = max(gains, key=lambda n: gains[n])
        if gains[worst] <= 0:
            break
        left_out.append(worst)
        kept.remove(worst)
    return sorted(left_out)


def _pooled(masks: Tensor) -> Tensor:
    """Masks as bools of about a voxel's size per pixel, widened by a pixel: a thin part must not vanish between two."""
    factor = max(1, round(max(masks.shape[-2:]) / GRID))
    H, W = masks.shape[-2:]
    small = torch.nn.functional.adaptive_max_pool2d(masks[:, None], (max(1, H // factor), max(1, W // factor)))
    return (torch.nn.functional.max_pool2d(small, 3, 1, 1) >= 0.5)[:, 0]


def _looked_up(cameras: Cameras, masks: Tensor, known: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Each view's pixel of each point, -1 if out of view or not known, and whether the view rules the point out; both
    (N, P)."""
    N, H, W = masks.shape
    pixels, depth = cameras.project(points)
    x, y = pixels.clamp(-1e6, 1e6).floor().long().unbind(-1)
    seen = (depth > 0) & (x >= 0) & (x < W) & (y >= 0) & (y < H)
    cells = torch.where(seen, y * W + x, -1)
    seen &= known.reshape(N, -1).gather(1, cells.clamp(min=0))
    cells = torch.where(seen, cells, -1)
    inside = masks.reshape(N, -1).gather(1, cells.clamp(min=0))
    return cells, seen & ~inside


def _filled(masks: Tensor, cells: Tensor, solid: Tensor) -> Tensor:
    """(N,) the share of each mask that the solid voxels (P,) bool cover; 1 for an empty mask."""
    N, H, W = masks.shape
    covered = torch.zeros(N, H * W + 1, dtype=torch.bool)  # the last column takes the points out of view
    hits = cells[:, solid]
    covered.scatter_(1, torch.where(hits < 0, H * W, hits), True)
    inside = masks.reshape(N, -1)
    count = inside.sum(1)
    return torch.where(count > 0, (covered[:, :-1] & inside).sum(1) / count.clamp(min=1), 1.0)
