"""Charts into one square atlas: from the largest to the smallest, each where it fits lowest; the scale is searched for.

Charts are sets of cells of a grid; `pack_cells` finds the places, this file the scale.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from viewmesh.geometry.charts import Charts, chart_of_points, extents, flat_area
from viewmesh.geometry.pack_cells import place
from viewmesh.geometry.texels import texels_of_groups
from viewmesh.progress import never

Footprints = tuple[np.ndarray, np.ndarray, np.ndarray]  # of charts: how many cells each takes, their x, their y

CELLS = 384  # per side, more only where charts would not fit: finer packs little tighter and costs its third power
USUAL = 0.88  # of the cells up to its height, what packing fills of most atlases
AIM, FULL = 0.985, 0.97  # of the height, what a scale is chosen for, and what is enough
TRIES, MORE = 12, 2  # of placing all charts: at most, and after the first that fits; most often it is two in all
SPARSE = 0.1  # of the atlas: charts that cover less would rather have less padding


def pack(charts: Charts, size: int, padding: int, cancelled: Callable[[], bool] = never) -> np.ndarray:
    """Where each point of the charts lies in [0, 1]^2, x right and y up, (T, 2) float64; one scale for all charts.

    Charts keep `padding` texels of a size x size image apart and half of that from the border. When there are so many
    that not even points would fit so, or that it would leave them next to nothing, the padding is halved. Raises
    Cancelled between two charts.
    """
    points, of_point = _upright(charts)
    cells, margin = min(size, CELLS), padding / 2 * min(size, CELLS) / size
    while True:
        placed = _fit(replace(charts, points=points), of_point, cells, margin, cancelled)
        if placed is not None and (margin <= 0.5 or flat_area(replace(charts, points=placed)) > SPARSE):
            return placed
        cells, margin = (cells, margin / 2) if margin > 0.5 else (cells * 2, margin)


def _fit(
    charts: Charts, of_point: np.ndarray, cells: int, margin: float, cancelled: Callable[[], bool]
) -> np.ndarray | None:
    """Point positions in [0, 1]^2 at the largest scale found that fits, or None."""
    low, extent = extents(charts.points, of_point)
    limit = (cells - 2 * margin - 2) / extent.max()
    if limit <= 0 or len(low) * (2 * margin + 1) ** 2 > 0.8 * cells**2:  # points alone would take that much
        return None
    points = charts.points - low[of_point]
    order = np.argsort(charts.chart, kind="stable")
    corners, bounds = points[charts.faces[order]], np.r_[0, np.cumsum(np.bincount(charts.chart))]

    def footprints(scale: float) -> Footprints:
        """Cells that charts touch when grown by `margin` and moved by margin + 1."""
        return texels_of_groups(corners * scale + (margin + 1), bounds, -(margin + 0.71))  # from its middle to a corner

    scale, best, fitted, wanted = min(limit, cells * np.sqrt(0.8 / flat_area(charts))), None, 0.0, USUAL * cells**2
    left = TRIES
    while left > 0:
        scale, (counts, x, y) = _scale_for(wanted, scale, limit, footprints)
        if scale <= fitted or len(x) > 1.01 * wanted:  # in the second case charts are hardly more than their margins
            break
        left -= 1
        placed = place(counts, x, y, cells, cancelled)
        if placed.height <= cells:
            local = points * scale + margin + 1
            quarter = np.stack([-local[:, 1], local[:, 0]], 1)
            best = np.where(placed.turned[of_point, None], quarter, local) + placed.shift[of_point]
            fitted = scale
            if placed.height > FULL * cells or scale >= limit:
                break
            left = min(left, MORE)
        wanted = AIM * cells / placed.height * len(x)  # the share of its rows that packing fills stays
    return None if best is None else best / cells


def _scale_for(
    wanted: float, scale: float, limit: float, footprints: Callable[[float], Footprints]
) -> tuple[float, Footprints]:
    """A scale, `limit` at most, at which charts take about `wanted` cells, from one near it; and those cells.

    Cells go with a power of the scale between its square, charts without margins, and a half, hardly more than margins.
    """
    power, cells = 1.5, footprints(scale)
    for _ in range(8):
        taken = len(cells[1])
        better = min(limit, scale * float(np.clip((wanted / taken) ** (1 / power), 0.5, 2)))
        if abs(taken / wanted - 1) < 0.003 or better == scale:
            break
        cells = footprints(better)
        power = float(np.clip(np.log(len(cells[1]) / taken) / np.log(better / scale), 0.5, 2))
        scale = better
    return scale, cells


def _upright(charts: Charts) -> tuple[np.ndarray, np.ndarray]:
    """Points with each chart turned into its smallest rectangle, to half a degree; and the chart of each point.

    All charts at once: a loop over a thousand small ones would take the interpreter longer than this takes numpy.
    """
    of_point = chart_of_points(charts)
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
