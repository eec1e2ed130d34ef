"""Charts into one square atlas, the way blocks fall: Lévy et al. 2002, "Least squares conformal maps", section 4.

Each chart is turned into its smallest rectangle, standing; from the tallest to the shortest it is put where the least
is wasted between its lower outline and the skyline of what lies there already. The scale is searched for.
"""

import cv2
import numpy as np

from viewmesh.geometry.charts import Charts, flat_area


def pack(charts: Charts, size: int, padding: int) -> np.ndarray:
    """Where each point of the charts lies in [0, 1]^2, x right and y up, (T, 2) float64; one scale for all charts.

    Outlines keep `padding` texels of a size x size image apart and half of that from the border. When there are so many
    charts that not even points would fit so, the padding is halved until they do.
    """
    points, of_point = _upright(charts)
    order = np.argsort(-_extent(points, of_point)[1][:, 1], kind="stable")
    edges = _outline(charts)
    grid = size
    while True:
        placed = _fit(points, of_point, edges, order, grid, padding / 2, flat_area(charts))
        if placed is not None:
            return placed / grid
        grid *= 2


def _fit(points, of_point, edges, order, size: int, margin: float, area: float) -> np.ndarray | None:
    """Point positions in texels at the largest scale found that fits, or None."""
    low, extent = _extent(points, of_point)
    limit = (size - 2 * margin - 2) / extent.max()
    if limit <= 0:
        return None
    scale, best, fitted = min(limit, size * np.sqrt(0.7 / area)), None, 0.0
    for attempt in range(24):
        local = (points - low[of_point]) * scale + margin
        shift, height = _drop(_profiles(local, of_point, edges, margin), order, size)
        if height <= size and scale > fitted:
            best, fitted = local + shift[of_point], scale
            if height > 0.985 * size or scale >= limit:
                break
        if best is not None and attempt >= 5:
            break
        step = np.sqrt(size / height)
        scale = min(limit, scale * (min(step, 1.1) if step > 1 else 0.995 * step))
        if best is not None:
            scale = max(scale, fitted * 1.005)
    return best


def _drop(profiles, order: np.ndarray, size: int) -> tuple[np.ndarray, float]:
    """Puts every chart on the skyline; returns shifts (K, 2) in texels and the height reached."""
    skyline = np.zeros(size, np.float32)
    shift = np.zeros((len(order), 2))
    for chart in order:
        bottom, top = profiles[chart]
        w = len(bottom)
        at = np.arange(0, size - w + 1, max(1, w // 8))
        if at[-1] != size - w:
            at = np.append(at, size - w)
        window = np.lib.stride_tricks.sliding_window_view(skyline, w)[at]
        y = np.ceil((window - bottom).max(1))
        waste = w * y - window.sum(1) + 0.5 * y  # the last term settles ties downwards
        i = int(np.argmin(waste + 0.25 * w * np.maximum(0, y + top.max() - skyline.max())))
        shift[chart] = at[i], y[i]
        skyline[at[i] : at[i] + w] = np.maximum(skyline[at[i] : at[i] + w], y[i] + top)
    return shift, float(skyline.max())


def _profiles(local: np.ndarray, of_point: np.ndarray, edges: np.ndarray, margin: float) -> list:
    """Per chart, (bottom, top) per column of texels, of its outline grown by `margin`."""
    a, b = local[edges[:, 0]], local[edges[:, 1]]
    swap = a[:, :1] > b[:, :1]
    a, b = np.where(swap, b, a), np.where(swap, a, b)
    first = np.floor(a[:, 0] - margin).astype(np.int64).clip(0)
    count = np.floor(b[:, 0] + margin).astype(np.int64) - first + 1
    edge = np.repeat(np.arange(len(edges)), count)
    column = first[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count)
    a, b = a[edge], b[edge]
    run = (b[:, 0] - a[:, 0]).clip(1e-12)
    t0 = ((column - margin - a[:, 0]) / run).clip(0, 1)
    t1 = ((column + 1 + margin - a[:, 0]) / run).clip(0, 1)
    y0, y1 = a[:, 1] + t0 * (b[:, 1] - a[:, 1]), a[:, 1] + t1 * (b[:, 1] - a[:, 1])
    steep = b[:, 0] - a[:, 0] < 1e-9
    y0, y1 = np.where(steep, a[:, 1], y0), np.where(steep, b[:, 1], y1)
    K = int(of_point.max()) + 1
    of_edge = of_point[edges[:, 0]][edge]
    widths = np.zeros(K, np.int64)
    np.maximum.at(widths, of_edge, column + 1)
    start = np.cumsum(widths) - widths
    bottom, top = np.full(widths.sum(), np.inf), np.full(widths.sum(), -np.inf)
    np.minimum.at(bottom, start[of_edge] + column, np.minimum(y0, y1) - margin)
    np.maximum.at(top, start[of_edge] + column, np.maximum(y0, y1) + margin)
    bottom = np.maximum(bottom, 0)  # exactly 0 up to rounding: points start at the margin
    bottom, top = bottom.astype(np.float32), np.nextafter(top.astype(np.float32), np.float32(np.inf))
    empty = ~np.isfinite(top)  # columns between the pieces of a chart that was cut in two
    bottom[empty], top[empty] = np.float32(1e6), 0
    return [(bottom[s : s + w], top[s : s + w]) for s, w in zip(start, widths, strict=True)]


def _upright(charts: Charts) -> tuple[np.ndarray, np.ndarray]:
    """Points with each chart turned into its smallest rectangle, longer side up; and the chart of each point."""
    of_point = np.empty(len(charts.points), np.int64)
    of_point[charts.faces.ravel()] = np.repeat(charts.chart, 3)
    order = np.argsort(of_point, kind="stable")
    bounds = np.r_[0, np.cumsum(np.bincount(of_point))]
    points = charts.points.copy()
    for a, b in zip(bounds[:-1], bounds[1:], strict=True):
        ids = order[a:b]
        p = points[ids] - points[ids].mean(0)
        reach = max(np.abs(p).max(), 1e-30)
        (_, (w, h), degrees) = cv2.minAreaRect((p / reach).astype(np.float32))
        turn = np.deg2rad(degrees) + (np.pi / 2 if w > h else 0.0)
        c, s = np.cos(turn), np.sin(turn)
        points[ids] = p @ np.array([[c, -s], [s, c]])
    return points, of_point


def _extent(points: np.ndarray, of_point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower corner and size of each chart's bounding box, (K, 2) each."""
    K = int(of_point.max()) + 1
    low, high = np.full((K, 2), np.inf), np.full((K, 2), -np.inf)
    np.minimum.at(low, of_point, points)
    np.maximum.at(high, of_point, points)
    return low, high - low


def _outline(charts: Charts) -> np.ndarray:
    """Edges (E, 2) that bound the charts."""
    a, b = charts.faces.ravel(), np.roll(charts.faces, -1, 1).ravel()
    key = np.minimum(a, b) * len(charts.points) + np.maximum(a, b)
    _, first, count = np.unique(key, return_index=True, return_counts=True)
    once = first[count == 1]
    return np.stack([a[once], b[once]], 1)
