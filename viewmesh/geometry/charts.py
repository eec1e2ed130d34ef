"""Charts: patches of a surface laid flat, in the mesh's own length unit, before they are packed into an atlas.

A chart is sound when no face in it is flipped or flat and no two faces overlap; `repaired` makes any set of charts
sound. `projected` is our own way to make charts: planar projections along the six axes. Knows nothing of textures
except the length of a texel.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from viewmesh.geometry.rows import equal_rows
from viewmesh.geometry.texels import texels_inside
from viewmesh.progress import check, never

OVERLAP_CELLS = 1024  # side of the grid that overlaps are looked for on; finer textures are checked no finer


@dataclass(frozen=True)
class Charts:
    """points: (T, 2) float64, x right and y up; faces: (F, 3) into points; chart: (F,) label per face;
    vertex: (T,) the mesh vertex of each point. A point belongs to one chart."""

    points: np.ndarray  # (T, 2)
    faces: np.ndarray  # (F, 3)
    chart: np.ndarray  # (F,)
    vertex: np.ndarray  # (T,)


def from_points(points: np.ndarray, faces: np.ndarray, vertex: np.ndarray) -> Charts:
    """Charts of an index structure in which charts share no points; mirrored charts are turned over."""
    _, of_point = connected_components(_edge_graph(faces, len(points)), directed=False)
    chart = of_point[faces[:, 0]]
    points = points.astype(np.float64)
    mirrored = np.bincount(chart, _signed_areas(points[faces]), minlength=of_point.max() + 1) < 0
    points = points * np.stack([np.where(mirrored[of_point], -1.0, 1.0), np.ones(len(points))], 1)
    return _compact(Charts(points, faces, chart, vertex))


def projected(vertices: np.ndarray, faces: np.ndarray) -> Charts:
    """Charts by planar projection: each connected patch of faces that look mostly along one axis, along that axis.

    No face within a patch can flip; a patch may still overlap itself (a spiral), which `repaired` resolves.
    """
    corners = vertices[faces].astype(np.float64)
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    side = _sides(normals, faces)
    patch = _patches(faces, side)
    first, inverse = equal_rows(np.stack([np.repeat(patch, 3), faces.ravel()], 1))
    vertex = faces.ravel()[first]
    p, k = vertices[vertex].astype(np.float64), np.repeat(side, 3)[first]
    axis, positive = k % 3, k < 3
    n = np.arange(len(p))
    x, y = p[n, (axis + 1) % 3], p[n, (axis + 2) % 3]
    return Charts(np.stack([np.where(positive, x, -x), y], 1), inverse.reshape(-1, 3), patch, vertex)


def joined(parts: list[Charts]) -> Charts:
    """Charts of several parts as one; labels and points are renumbered."""
    points = np.cumsum([0] + [len(p.points) for p in parts])
    labels = np.cumsum([0] + [int(p.chart.max()) + 1 for p in parts])
    return Charts(
        np.concatenate([p.points for p in parts]),
        np.concatenate([p.faces + n for p, n in zip(parts, points, strict=False)]),
        np.concatenate([p.chart + n for p, n in zip(parts, labels, strict=False)]),
        np.concatenate([p.vertex for p in parts]),
    )


def replaced(charts: Charts, faces: np.ndarray, by: Charts) -> Charts:
    """charts with the faces (F,) bool laid out as in `by`, whose faces are those, in the same order."""
    new_faces, new_chart = charts.faces.copy(), charts.chart.copy()
    new_faces[faces] = by.faces + len(charts.points)
    new_chart[faces] = by.chart + charts.chart.max() + 1
    points, vertex = np.concatenate([charts.points, by.points]), np.concatenate([charts.vertex, by.vertex])
    return _compact(Charts(points, new_faces, new_chart, vertex))


def repaired(charts: Charts, texel: float, cancelled: Callable[[], bool] = never) -> Charts:
    """The same faces in sound charts: nothing flipped or flat, nothing overlapping where a texel could see it.

    texel: length of a texel. Faces that are flipped or thinner than four thousandths of a texel become charts of
    one triangle; a chart that overlaps itself is cut in half until its pieces do not (one face cannot).
    """
    corners = charts.points[charts.faces]
    charts = singled_out(charts, _signed_areas(corners) <= 0.002 * texel * _longest_edge(corners), texel)
    grain = max(texel, np.sqrt(flat_area(charts)) / OVERLAP_CELLS)
    suspects = np.ones(len(charts.faces), bool)
    for _ in range(64):
        check(cancelled)
        bad = _overlapping_charts(charts, suspects, grain)
        if not len(bad):
            return charts
        suspects = np.isin(charts.chart, bad)  # halving moves no other faces
        charts = _halved(charts, bad)
    return singled_out(charts, suspects, texel)


def singled_out(charts: Charts, faces: np.ndarray, texel: float) -> Charts:
    """With each of the faces (F,) bool as a chart of its own: its isometric self, made at least a texel big."""
    ids = np.flatnonzero(faces)
    if not len(ids):
        return charts
    corners = charts.points[charts.faces[ids]]
    base = np.linalg.norm(corners[:, 1] - corners[:, 0], axis=1).clip(texel)
    area = np.abs(_signed_areas(corners))
    height = (2 * area / base).clip(texel, 4 * base)
    zero = np.zeros_like(base)
    flat = np.stack([np.stack([zero, zero], 1), np.stack([base, zero], 1), np.stack([base / 2, height], 1)], 1)
    k = np.arange(len(ids))
    own = Charts(
        flat.reshape(-1, 2), np.arange(3 * len(ids)).reshape(-1, 3), k, charts.vertex[charts.faces[ids]].ravel()
    )
    return replaced(charts, faces, own)


def squashed(charts: Charts, vertices: np.ndarray) -> np.ndarray:
    """(F,) bool, the faces of charts in which more than 2 % of the surface is laid out under an eighth of its area."""
    corners = vertices[charts.vertex[charts.faces]].astype(np.float64)
    true = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1) / 2
    low = np.abs(_signed_areas(charts.points[charts.faces])) < true / 8
    share = np.bincount(charts.chart, true * low) / np.bincount(charts.chart, true).clip(1e-30)
    return share[charts.chart] > 0.02


def flat_area(charts: Charts) -> float:
    """Total area of all charts."""
    return float(np.abs(_signed_areas(charts.points[charts.faces])).sum())


def chart_of_points(charts: Charts) -> np.ndarray:
    """(T,) label of each point's chart."""
    of_point = np.empty(len(charts.points), np.int64)
    of_point[charts.faces.ravel()] = np.repeat(charts.chart, 3)
    return of_point


def extents(points: np.ndarray, of_point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower corner and size of each chart's bounding box, (K, 2) each."""
    K = int(of_point.max()) + 1
    low, high = np.full((K, 2), np.inf), np.full((K, 2), -np.inf)
    np.minimum.at(low, of_point, points)
    np.maximum.at(high, of_point, points)
    return low, high - low


def _overlapping_charts(charts: Charts, suspects: np.ndarray, texel: float) -> np.ndarray:
    """Labels of the charts in which some texel centre lies in two of the suspect faces (F,) bool."""
    ids = np.flatnonzero(suspects)
    corners = charts.points[charts.faces[ids]] / texel
    face, x, y = (t.numpy() for t in texels_inside(torch.from_numpy(corners), margin=0.01)[:3])
    if not len(face):
        return np.zeros(0, np.int64)
    face, x, y = ids[face], x - x.min(), y - y.min()
    key = (charts.chart[face] * (y.max() + 1) + y) * (x.max() + 1) + x
    order = np.argsort(key)
    key = key[order]
    twice = np.flatnonzero(key[1:] == key[:-1])
    return np.unique(charts.chart[face[order[twice]]])


def _halved(charts: Charts, labels: np.ndarray) -> Charts:
    """With each named chart cut in two along its longer side, at the median face."""
    chart, following = charts.chart.copy(), int(charts.chart.max()) + 1
    centres = charts.points[charts.faces].mean(1)
    order = np.argsort(charts.chart, kind="stable")
    first, last = (np.searchsorted(charts.chart[order], labels, side) for side in ("left", "right"))
    for i, (a, b) in enumerate(zip(first, last, strict=True)):
        ids = order[a:b]
        c = centres[ids]
        axis = int(np.argmax(np.ptp(c, axis=0)))
        chart[ids[np.argsort(c[:, axis], kind="stable")[len(ids) // 2 :]]] = following + i
    first, inverse = equal_rows(np.stack([np.repeat(chart, 3), charts.faces.ravel()], 1))
    point = charts.faces.ravel()[first]
    return Charts(charts.points[point], inverse.reshape(-1, 3), chart, charts.vertex[point])


def _compact(charts: Charts) -> Charts:
    """Without points that no face names, charts numbered 0.. without gaps."""
    used, faces = np.unique(charts.faces, return_inverse=True)
    _, chart = np.unique(charts.chart, return_inverse=True)
    return Charts(charts.points[used], faces.reshape(-1, 3), chart.reshape(-1), charts.vertex[used])


def _sides(normals: np.ndarray, faces: np.ndarray, rounds: int = 4) -> np.ndarray:
    """(F,) 0..5 for +x +y +z -x -y -z: the axis of the smoothed normal, where the face itself leans that way enough."""
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    unit = normals / length.clip(1e-30)
    F = len(faces)
    a, b = _neighbours(faces)
    graph = coo_matrix((np.ones(2 * len(a)), (np.r_[a, b], np.r_[b, a])), (F, F)).tocsr()
    smooth = normals.copy()
    for _ in range(rounds):
        smooth = smooth + graph @ smooth
    smooth_side = np.concatenate([smooth, -smooth], 1).argmax(1)
    own = np.concatenate([unit, -unit], 1)
    return np.where(own[np.arange(F), smooth_side] > 0.35, smooth_side, own.argmax(1))


def _patches(faces: np.ndarray, side: np.ndarray) -> np.ndarray:
    """(F,) label of the patch: faces of one side joined over edges."""
    a, b = _neighbours(faces)
    same = side[a] == side[b]
    graph = coo_matrix((np.ones(same.sum(), np.int8), (a[same], b[same])), (len(faces), len(faces)))
    return connected_components(graph, directed=False)[1]


def _neighbours(faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of faces that share an edge."""
    V = int(faces.max()) + 1
    a, b = faces.ravel(), np.roll(faces, -1, 1).ravel()
    key = np.minimum(a, b) * V + np.maximum(a, b)
    order = np.argsort(key, kind="stable")
    twin = np.flatnonzero(key[order][1:] == key[order][:-1])
    return order[twin] // 3, order[twin + 1] // 3


def _edge_graph(faces: np.ndarray, n: int):
    rows, cols = faces[:, [0, 1]].ravel(), faces[:, [1, 2]].ravel()
    return coo_matrix((np.ones(len(rows), np.int8), (rows, cols)), (n, n))


def _signed_areas(corners: np.ndarray) -> np.ndarray:
    a, b = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    return (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]) / 2


def _longest_edge(corners: np.ndarray) -> np.ndarray:
    return np.linalg.norm(corners - np.roll(corners, -1, 1), axis=2).max(1)
