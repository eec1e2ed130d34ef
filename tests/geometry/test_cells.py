"""The nearest points by cells, against a k-d tree."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial import KDTree

from viewmesh.geometry import cells
from viewmesh.geometry.cells import NearestPoints


def on_a_sphere(count: int, seed: int = 0) -> torch.Tensor:
    points = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(points, dim=-1)


def distances(points: torch.Tensor, queries: torch.Tensor, found: torch.Tensor) -> np.ndarray:
    return (points[found] - queries[:, None]).norm(dim=-1).numpy()


def check(points: torch.Tensor, queries: torch.Tensor, k: int) -> None:
    found = NearestPoints(points).query(queries, k)
    expected, _ = KDTree(points.numpy()).query(queries.numpy(), k=range(1, min(k, len(points)) + 1))
    assert found.shape == expected.shape
    assert len(points) < k or all(len(set(row)) == k for row in found.tolist())
    np.testing.assert_allclose(distances(points, queries, found), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("off", [0.0, 0.002, 0.1, 5.0])
def test_near_and_far_from_a_surface_it_finds_what_a_tree_finds(off):
    points = on_a_sphere(4000)
    shift = off * torch.randn(500, 3, generator=torch.Generator().manual_seed(2))
    check(points, on_a_sphere(500, seed=1) + shift, k=4)


def test_a_few_far_queries_do_not_slow_the_many_near_ones(monkeypatch):
    asked = []
    query = cells._Grid.query

    def counted(grid, queries, k):
        asked.append(len(queries))
        return query(grid, queries, k)

    monkeypatch.setattr(cells._Grid, "query", counted)
    queries = torch.cat([on_a_sphere(2000, seed=1), torch.zeros(3, 3)])
    check(on_a_sphere(20000), queries, k=4)
    assert asked[0] == 2003
    assert asked[1] < 400
    assert asked[-1] == 3


@pytest.mark.parametrize("count", [1, 3, 4, 30])
def test_few_points(count):
    check(on_a_sphere(count), on_a_sphere(50, seed=1) * 3, k=4)


def test_points_in_a_plane_on_a_line_and_all_in_one_place():
    flat = on_a_sphere(3000)
    for scale in ([1.0, 1.0, 0.0], [1.0, 0.0, 0.0]):
        check(flat * torch.tensor(scale), on_a_sphere(100, seed=1), k=1)
    same = NearestPoints(torch.ones(10, 3)).query(torch.zeros(2, 3), 4)
    assert all(len(set(row)) == 4 for row in same.tolist())


def test_a_box_of_very_different_sides_keeps_to_its_memory(monkeypatch):
    monkeypatch.setattr(cells, "MOST_CELLS", 4096)
    stretched = on_a_sphere(5000) * torch.tensor([100.0, 1.0, 1.0])
    found = NearestPoints(stretched)
    check(stretched, stretched[:200] + 0.01, k=4)
    assert math.prod(found._grid(0).counts.tolist()) <= 4096


def test_what_is_looked_at_together_changes_nothing(monkeypatch):
    points, queries = on_a_sphere(3000), on_a_sphere(300, seed=1)
    whole = NearestPoints(points).query(queries, 4)
    monkeypatch.setattr(cells, "PAIRS", 50)
    assert torch.equal(NearestPoints(points).query(queries, 4), whole)


def test_a_dense_spot_makes_no_table_that_is_as_wide_for_all(monkeypatch):
    sizes = []
    nearest = cells._Grid._nearest

    def measured(grid, queries, first, length, *rest):
        sizes.append((len(queries), len(queries) * int(length.sum(1).max())))
        return nearest(grid, queries, first, length, *rest)

    monkeypatch.setattr(cells._Grid, "_nearest", measured)
    monkeypatch.setattr(cells, "PAIRS", 10_000)
    generator = torch.Generator().manual_seed(3)
    plane = torch.rand(2000, 3, generator=generator) * torch.tensor([1, 1, 0.0])
    spot = 0.5 + 0.0005 * torch.rand(2000, 3, generator=generator)
    check(torch.cat([plane, spot]), torch.cat([plane[:300] + 0.01, spot[:3], plane[300:600] - 0.01]), k=4)
    assert max(pairs for _, pairs in sizes) <= 10_000
    assert max(queries for queries, _ in sizes) > 100


@pytest.mark.gpu
def test_a_gpu_finds_what_the_cpu_finds():
    points, queries = on_a_sphere(200_000), on_a_sphere(300_000, seed=1) * 1.002
    found = NearestPoints(points.cuda()).query(queries.cuda(), 4).cpu()
    expected, _ = KDTree(points.numpy()).query(queries.numpy(), k=4)
    np.testing.assert_allclose(distances(points, queries, found), expected, rtol=1e-3, atol=1e-6)
