"""Which texels a set of flat triangles covers. Any device, no mesh, no image."""

import math

import numpy as np
import torch
from torch import Tensor

from viewmesh.geometry.jit import inline, jit


def texels_inside(corners: Tensor, margin: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every texel whose centre (x + 0.5, y + 0.5) lies inside a triangle, by at least `margin` texels.

    corners: (F, 3, 2) float64, texels, x and y; either orientation; margin may be negative: what lies up to -margin
    outside of an edge then counts, too, but nothing farther than that from the triangle's bounding box.
    Returns face, x, y (K,) int64 and barycentric (K, 3) float64, in the order of faces, then of rows; a texel on a
    shared edge occurs once per triangle. Degenerate triangles cover nothing.
    """
    if corners.device.type == "cpu":
        points = np.ascontiguousarray(corners.detach().numpy())
        found = _room(_about(points, margin))
        count = _fill(points, float(margin), *found)
        if count > len(found[0]):
            found = _room(count)
            _fill(points, float(margin), *found)
        face, x, y, weight = (torch.from_numpy(column[:count]) for column in found)
        return face, x, y, weight
    return _on_device(corners, margin)


def texels_of_groups(
    corners: np.ndarray, bounds: np.ndarray, margin: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The texels that some triangle of each group covers, each once: how many each group has (K,), x and y (N,) int64,
    in the order of groups, then of rows.

    corners: (F, 3, 2) float64, in the order of groups; bounds: (K + 1,) int64, where each begins and the last one ends.
    Otherwise as `texels_inside`, but of groups whose bounding boxes have room in memory.
    """
    counts, nothing = np.zeros(len(bounds) - 1, np.int64), np.empty(0, np.int64)
    count = _fill_groups(corners, bounds, float(margin), counts, nothing, nothing)
    x, y = np.empty(count, np.int64), np.empty(count, np.int64)
    _fill_groups(corners, bounds, float(margin), counts, x, y)
    return counts, x, y


def _about(points: np.ndarray, margin: float) -> int:
    """How many texels there will be, or a few more: to count them takes as long as to list them."""
    sides = np.roll(points, -1, 1) - points
    x, y = sides[:, 0].T, sides[:, 1].T
    areas = np.abs(x[0] * y[1] - x[1] * y[0]) / 2
    outline = np.linalg.norm(sides, axis=-1).sum()
    return int(1.1 * (areas.sum() + max(-margin, 0.0) * (outline + 4 * max(-margin, 0.0) * len(points)))) + 64


def _on_device(corners: Tensor, margin: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All texels of all bounding boxes, a quarter of a million at a time, tested at once."""
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


def _room(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    face, x, y = (np.empty(count, np.int64) for _ in range(3))
    return face, x, y, np.empty((count, 3))


@jit
def _fill(corners, margin, face, xs, ys, weight):
    """How many texels there are; writes those that there is room for."""
    n = 0
    for f in range(len(corners)):
        area, low_x, high_x, low_y, high_y = _bounds(corners[f], margin)
        if area == 0:
            continue
        for y in range(low_y, high_y + 1):
            for x in range(low_x, high_x + 1):
                a, b, c = _inside(corners[f], area, x + 0.5, y + 0.5, margin)
                if math.isnan(a + b + c):
                    continue
                if n < len(face):
                    face[n], xs[n], ys[n] = f, x, y
                    weight[n, 0], weight[n, 1], weight[n, 2] = b / abs(area), c / abs(area), a / abs(area)
                n += 1
    return n


@jit
def _fill_groups(corners, bounds, margin, counts, xs, ys):
    """As `_fill`; writes how many texels each group has, too."""
    n = 0
    for g in range(len(counts)):
        left, right, bottom, top = 2**62, -(2**62), 2**62, -(2**62)
        for f in range(bounds[g], bounds[g + 1]):
            area, low_x, high_x, low_y, high_y = _bounds(corners[f], margin)
            if area != 0:
                left, right = min(left, low_x), max(right, high_x)
                bottom, top = min(bottom, low_y), max(top, high_y)
        covered = np.zeros((max(0, top - bottom + 1), max(0, right - left + 1)), np.bool_)
        for f in range(bounds[g], bounds[g + 1]):
            area, low_x, high_x, low_y, high_y = _bounds(corners[f], margin)
            if area == 0:
                continue
            for y in range(low_y, high_y + 1):
                for x in range(low_x, high_x + 1):
                    if not covered[y - bottom, x - left]:
                        a, b, c = _inside(corners[f], area, x + 0.5, y + 0.5, margin)
                        covered[y - bottom, x - left] = not math.isnan(a + b + c)
        counts[g] = 0
        for y in range(covered.shape[0]):
            for x in range(covered.shape[1]):
                if covered[y, x]:
                    if n < len(xs):
                        xs[n], ys[n] = x + left, y + bottom
                    n += 1
                    counts[g] += 1
    return n


@inline
def _bounds(corner, margin):
    """Twice the signed area, and the texels (first and last x, first and last y) that may be inside."""
    ax, ay, bx, by, cx, cy = corner[0, 0], corner[0, 1], corner[1, 0], corner[1, 1], corner[2, 0], corner[2, 1]
    area = (bx - ax) * -(ay - cy) + (by - ay) * (ax - cx)
    out = min(margin, 0.0)
    low_x, high_x = math.ceil(min(ax, bx, cx) - 0.5 + out), math.floor(max(ax, bx, cx) - 0.5 - out)
    low_y, high_y = math.ceil(min(ay, by, cy) - 0.5 + out), math.floor(max(ay, by, cy) - 0.5 - out)
    return area, int(low_x), int(high_x), int(low_y), int(high_y)


@inline
def _inside(corner, area, x, y, margin):
    """How far (x, y) is inside of edges 0, 1, 2, times their lengths; not numbers where it is outside of one."""
    sign = 1.0 if area > 0 else -1.0
    a = _of_edge(corner[0, 0], corner[0, 1], corner[1, 0], corner[1, 1], x, y, sign, margin)
    b = _of_edge(corner[1, 0], corner[1, 1], corner[2, 0], corner[2, 1], x, y, sign, margin)
    c = _of_edge(corner[2, 0], corner[2, 1], corner[0, 0], corner[0, 1], x, y, sign, margin)
    return a, b, c


@inline
def _of_edge(ax, ay, bx, by, x, y, sign, margin):
    dx, dy = bx - ax, by - ay
    cross = (dx * (y - ay) - dy * (x - ax)) * sign
    return cross if cross >= margin * math.sqrt(dx * dx + dy * dy) else math.nan
