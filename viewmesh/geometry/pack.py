"""Charts into one square atlas: from the largest to the smallest, each where it fits lowest; the scale is searched for.

Charts are sets of cells of a grid; `pack_cells` finds the places, this file the scale.
"""

from collections.abc import Callable

import numpy as np
import torch

from viewmesh.geometry.charts import Charts, flat_area
from viewmesh.geometry.pack_cells import place
from viewmesh.geometry.texels import texels_inside
from viewmesh.progress import never

CELLS = 384  # at most, per side: finer packs little tighter and costs its third power


def pack(charts: Charts, size: int, padding: int, cancelled: Callable[[], bool] = never) -> np.ndarray:
    """Where each point of the charts lies in [0, 1]^2, x right and y up, (T, 2) float64; one scale for all charts.

    Charts keep `padding` texels of a size x size image apart and half of that from the border. When there are so many
    that not even points would fit so, the padding is halved until they do. Raises Cancelled between two charts.
    """
    points, of_point = _upright(charts)
    cells, margin = min(size, CELLS), padding / 2 * min(size, CELLS) / size
    while True:
        placed = _fit(Charts(points, charts.faces, charts.chart, charts.vertex), of_point, cells, margin, cancelled)
        if placed is not None:
            return placed
        cells, margin = (cells, margin / 2) if margin > 0.5 else (cells * 2, margin)


def _fit(
    charts: Charts, of_point: np.ndarray, cells: int, margin: float, cancelled: Callable[[], bool]
) -> np.ndarray | None:
    """Point positions in [0, 1]^2 at the largest scale found that fits, or None."""
    low, extent = _extent(charts.points, of_point)
    limit = (cells - 2 * margin - 2) / extent.max()
    if limit <= 0 or len(low) * (2 * margin + 1) ** 2 > 0.8 * cells**2:  # points alone would take that much
        return None
    points = charts.points - low[of_point]
    scale, best, fitted = min(limit, cells * np.sqrt(0.8 / flat_area(charts))), None, 0.0
    for _ in range(2):  # so that the footprints, margins and all, would fill most of the square
        area = len(_footprints(points * scale, charts, margin)[0])
        scale = min(limit, scale * np.sqrt(0.88 * cells * cells / area).clip(0.5, 1.1))
    for attempt in range(16):
        chart, x, y = _footprints(points * scale, charts, margin)
        if len(chart) <= cells * cells or best is None:
            placed = place(chart, x, y, cells, cancelled)
            height = placed.height
            if height <= cells and scale > fitted:
                local = points * scale + margin + 1
                quarter = np.stack([-local[:, 1], local[:, 0]], 1)
                best = np.where(placed.turned[of_point, None], quarter, local) + placed.shift[of_point]
                fitted = scale
        if best is not None and (height > 0.97 * cells or attempt >= 4 or fitted >= limit):
            break
        if height <= cells:
            scale = min(limit, scale * (cells / height) ** 0.5)
        else:
            # margins do not shrink with the charts: height goes with the scale's power of 4/3, not with its square
            scale = max(scale * max((0.995 * cells / height) ** 0.75, 0.5), 1.004 * fitted)
        if attempt > 8 and scale * extent.max() < 0.1:  # charts are points already
            break
    return None if best is None else best / cells


def _footprints(local: np.ndarray, charts: Charts, margin: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells (chart, x, y), sorted and unique, that charts touch when grown by `margin` and moved by margin + 1."""
    corners = torch.from_numpy(local[charts.faces] + margin + 1)
    face, x, y, _ = texels_inside(corners, margin=-(margin + 0.71))  # a cell's corner is 0.71 from its centre
    chart = charts.chart[face.numpy()]
    side = int(max(x.max(), y.max())) + 2
    key = np.sort((chart * side + y.numpy().clip(0)) * side + x.numpy().clip(0))
    key = key[np.r_[True, key[1:] != key[:-1]]]  # np.unique hashes, which takes ten times as long
    return key // (side * side), key % side, key // side % side


def _upright(charts: Charts) -> tuple[np.ndarray, np.ndarray]:
    """Points with each chart turned into its smallest rectangle, to half a degree; and the chart of each point.

    All charts at once: a loop over a thousand small ones would take the interpreter longer than this takes numpy.
    """
    of_point = np.empty(len(charts.points), np.int64)
    of_point[charts.faces.ravel()] = np.repeat(charts.chart, 3)
    order = np.argsort(of_point, kind="stable")
    ordered, first = of_point[order], np.r_[0, np.cumsum(np.bincount(of_point))[:-1]]
    x, y = charts.points[order].T

    def sides(turn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the charts' bounding boxes, each turned by -turn (K,)."""
        c, s = np.cos(turn)[ordered], np.sin(turn)[ordered]
        u, v = c * x + s * y, c * y - s * x
        width, height = (np.maximum.reduceat(w, first) - np.minimum.reduceat(w, first) for w in (u, v))
        return width, height

    best, least = np.zeros(len(first)), np.full(len(first), np.inf)
    for steps in (np.arange(0, 90, 3), np.array([-1.0, 1.0]), np.array([-0.5, 0.5])):
        around = best
        for step in steps:
            turn = around + np.deg2rad(step)
            width, height = sides(turn)
            better = width * height < least
            best, least = np.where(better, turn, best), np.where(better, width * height, least)
    width, height = sides(best)
    turn = (best + np.where(width < height, np.pi / 2, 0.0))[of_point]  # the long side along x
    x, y = charts.points.T
    return np.stack([np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x], 1), of_point


def _extent(points: np.ndarray, of_point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower corner and size of each chart's bounding box, (K, 2) each."""
    K = int(of_point.max()) + 1
    low, high = np.full((K, 2), np.inf), np.full((K, 2), -np.inf)
    np.minimum.at(low, of_point, points)
    np.maximum.at(high, of_point, points)
    return low, high - low
