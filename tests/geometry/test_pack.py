"""The loops of packing, against plain Python over sets of cells, and texels, against the definition."""

import math

import numpy as np
import pytest
import torch

from viewmesh.errors import Cancelled
from viewmesh.geometry import texels
from viewmesh.geometry.pack_cells import AT_ONCE, ROWS, place
from viewmesh.geometry.texels import texels_inside, texels_of_groups

Cells = list[tuple[int, int]]


def placed_naively(charts: list[Cells], cells: int) -> tuple[list[tuple[int, int]], list[bool], int]:
    """Every position in turn, every cell of the chart at each."""
    taken: set[tuple[int, int]] = set()
    shift, turned, height = [(0, 0)] * len(charts), [False] * len(charts), 0
    for k in sorted(range(len(charts)), key=lambda k: -len(charts[k])):
        found = []
        for turn, chart in enumerate([charts[k], [(-y, x) for x, y in charts[k]]]):
            u0, v0 = min(u for u, _ in chart), min(v for _, v in chart)
            chart = [(u - u0, v - v0) for u, v in chart]
            w, h = max(u for u, _ in chart) + 1, max(v for _, v in chart) + 1
            if w > cells:
                continue
            x, y = next(
                (x, y)
                for y in range(ROWS * cells)
                for x in range(cells - w + 1)
                if not any((x + u, y + v) in taken for u, v in chart)
            )
            found.append((y + h, turn, x, y, u0, v0, chart))
        top, turn, x, y, u0, v0, chart = min(found, key=lambda one: one[:2])
        taken |= {(x + u, y + v) for u, v in chart}
        shift[k], turned[k], height = (x - u0, y - v0), bool(turn), max(height, top)
    return shift, turned, height


def random_charts(rng: np.random.Generator, count: int, side: int) -> list[Cells]:
    """Rectangles with holes and gaps, as large charts have them."""
    charts = []
    for _ in range(count):
        w, h = rng.integers(1, side, 2)
        cells = [(int(x), int(y)) for y in range(h) for x in range(w) if rng.random() < 0.8]
        charts.append(cells or [(0, 0)])
    return charts


def arrays(charts: list[Cells]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, y = np.array([cell for cells in charts for cell in sorted(cells)]).T
    return np.array([len(cells) for cells in charts]), x.copy(), y.copy()


@pytest.mark.parametrize(("cells", "count", "side"), [(20, 30, 8), (64, 12, 40), (70, 60, 12), (130, 8, 100)])
def test_charts_lie_where_a_search_of_every_position_puts_them(cells: int, count: int, side: int):
    charts = random_charts(np.random.default_rng(cells), count, side)
    placed = place(*arrays(charts), cells)
    shift, turned, height = placed_naively(charts, cells)
    assert placed.shift.tolist() == [list(at) for at in shift]
    assert placed.turned.tolist() == turned
    assert placed.height == height


def test_a_chart_that_is_too_wide_both_ways_fits_nowhere():
    chart = [(i, 0) for i in range(30)] + [(0, i) for i in range(1, 30)]
    assert place(*arrays([chart]), 20).height == ROWS * 20


def test_packing_is_stopped_between_charts():
    charts = [[(0, 0)]] * (3 * AT_ONCE)
    asked = []

    def cancelled() -> bool:
        asked.append(True)
        return len(asked) == 2

    with pytest.raises(Cancelled):
        place(*arrays(charts), 64, cancelled)
    assert len(asked) == 2


@pytest.mark.parametrize("margin", [0.0, 0.3, -1.5])
def test_texels_are_those_whose_centre_is_inside_of_every_edge(margin: float):
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    corners = 40 * random(60, 1, 2) + 12 * random(60, 3, 2) - 6
    corners[::5] = (corners[::5] * 2).round() / 2  # edges through centres
    corners[7, 2] = corners[7, 1]  # degenerate
    face, x, y, weight = texels_inside(corners, margin)
    found = set(zip(face.tolist(), x.tolist(), y.tolist(), strict=True))
    expected = set()
    for f, triangle in enumerate(corners.tolist()):
        (ax, ay), (bx, by), (cx, cy) = triangle
        area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        if area == 0:
            continue
        turn, box = math.copysign(1, area), min(margin, 0.0)
        edges = [(*a, *b, margin * math.dist(a, b)) for a, b in zip(triangle, triangle[1:] + triangle[:1], strict=True)]
        for py in range(-20, 70):
            for px in range(-20, 70):
                inside = all(
                    turn * ((ex - sx) * (py + 0.5 - sy) - (ey - sy) * (px + 0.5 - sx)) >= least
                    for sx, sy, ex, ey, least in edges
                )
                inside &= min(ax, bx, cx) + box <= px + 0.5 <= max(ax, bx, cx) - box
                inside &= min(ay, by, cy) + box <= py + 0.5 <= max(ay, by, cy) - box
                if inside:
                    expected.add((f, px, py))
    assert found == expected
    centre = (weight[..., None] * corners[face]).sum(1)
    assert torch.allclose(centre, torch.stack([x, y], 1).double() + 0.5, atol=1e-6)


@pytest.mark.parametrize("margin", [0.0, 0.01, -2.0])
def test_a_device_finds_the_same_texels_in_the_same_order(margin: float):
    generator = torch.Generator().manual_seed(1)
    corners = 200 * torch.rand(300, 1, 2, generator=generator, dtype=torch.float64)
    corners = corners + 9 * torch.randn(300, 3, 2, generator=generator, dtype=torch.float64)
    here, there = texels_inside(corners, margin), texels._on_device(corners, margin)
    assert len(here[0]) > 5000
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("margin", [0.01, -1.2])
def test_texels_of_groups_are_those_of_their_triangles_each_once(margin: float):
    rng = np.random.default_rng(2)
    corners = 30 * rng.random((80, 1, 2)) + 9 * rng.standard_normal((80, 3, 2))
    corners[11, 2] = corners[11, 1]  # degenerate
    bounds = np.array([0, 30, 30, 31, 80])
    counts, x, y = texels_of_groups(corners, bounds, margin)
    face, fx, fy, _ = (t.numpy() for t in texels_inside(torch.from_numpy(corners), margin))
    group = np.searchsorted(bounds[1:], face, side="right")
    expected = sorted(set(zip(group.tolist(), fy.tolist(), fx.tolist(), strict=True)))
    assert len(expected) < len(face)
    assert list(zip(np.repeat(np.arange(4), counts).tolist(), y.tolist(), x.tolist(), strict=True)) == expected
