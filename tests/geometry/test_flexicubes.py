"""FlexiCubes: laws of the surface, a naive twin, gradients."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from viewmesh.geometry.dual_tables import CORNERS, EDGE_CORNERS, dual_tables
from viewmesh.geometry.flexicubes import CubeGrid, FlexiMesh, dense_grid, extract, sparse_grid


def sphere(resolution: int, radius: float = 0.7):
    grid = dense_grid(resolution)
    positions = grid.points.double() / resolution * 2 - 1
    return grid, positions, positions.norm(dim=1) - radius


def noise(resolution: int, seed: int):
    """Random distances, outside at the border: every case of the table, and many ambiguous sides."""
    generator = torch.Generator().manual_seed(seed)
    grid = dense_grid(resolution)
    sdf = torch.randn(len(grid.points), generator=generator, dtype=torch.float64)
    border = ((grid.points == 0) | (grid.points == resolution)).any(1)
    weights = torch.randn(len(grid), 21, generator=generator, dtype=torch.float64)
    return grid, grid.points.double(), torch.where(border, sdf.abs() + 0.1, sdf), weights


def directed_edges(faces: torch.Tensor) -> dict[tuple[int, int], int]:
    count: dict[tuple[int, int], int] = {}
    for a, b, c in faces.tolist():
        for edge in ((a, b), (b, c), (c, a)):
            count[edge] = count.get(edge, 0) + 1
    return count


def assert_closed_and_oriented(mesh: FlexiMesh) -> None:
    count = directed_edges(mesh.faces)
    assert all(n == 1 for n in count.values())
    assert all((b, a) in count for a, b in count)


@pytest.mark.parametrize("split", ["two", "four"])
def test_a_sphere_has_its_area_volume_and_genus(split):
    mesh = extract(*sphere(48), split=split)
    corners = mesh.vertices[mesh.faces]
    normal = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    assert normal.norm(dim=1).sum() / 2 == pytest.approx(4 * math.pi * 0.7**2, rel=5e-3)
    assert (corners[:, 0] * normal).sum() / 6 == pytest.approx(4 / 3 * math.pi * 0.7**3, rel=5e-3)
    assert ((corners.mean(1) * normal).sum(1) > 0).all()  # counter-clockwise from outside
    assert len(mesh.vertices) - len(mesh.faces) / 2 == 2
    assert_closed_and_oriented(mesh)


@pytest.mark.parametrize("seed", range(4))
def test_any_distances_give_a_closed_oriented_manifold(seed):
    mesh = extract(*noise(7, seed))
    assert_closed_and_oriented(mesh)


def test_without_the_complement_rule_the_same_distances_are_not_manifold(monkeypatch):
    """Shows that the previous test can fail, and why C16 and C19 are in the tables."""
    tables = dual_tables(torch.device("cpu"))
    plain = replace(tables, invert_if=torch.zeros_like(tables.invert_if))
    monkeypatch.setattr("viewmesh.geometry.flexicubes.dual_tables", lambda device: plain)
    counts = [directed_edges(extract(*noise(7, seed)).faces) for seed in range(4)]
    assert any(n > 1 for count in counts for n in count.values())


def test_the_tables_partition_the_crossed_edges():
    tables = dual_tables(torch.device("cpu"))
    for case in range(256):
        crossed = {e for e, (a, b) in enumerate(EDGE_CORNERS) if (case >> a & 1) != (case >> b & 1)}
        listed = [set(row[row >= 0].tolist()) for row in tables.edges_of_patch[case]]
        assert set().union(*listed) == crossed
        assert sum(map(len, listed)) == len(crossed)
        assert sum(map(bool, listed)) == tables.patches[case]
        assert all(len(patch) >= 3 for patch in listed if patch)
    problem = tables.invert_if.abs().sum(1) > 0
    assert problem.sum() == 36  # C16: 12 ways, C19: 24 ways
    assert (tables.patches[255 - problem.nonzero()[:, 0]] == 2).all()  # their complements split the side in two


def naive_dual_vertices(grid: CubeGrid, positions, sdf, weights) -> list[tuple[tuple, torch.Tensor]]:
    """(cube, edges) and position of each dual vertex, by flood fill over the sides of each cube. Equations 4 to 6."""
    sign = {tuple(p): bool(s < 0) for p, s in zip(grid.points.tolist(), sdf, strict=True)}
    row = {tuple(p): i for i, p in enumerate(grid.points.tolist())}

    def ambiguous_sides(cube, keep_inside):
        """Pairs of crossed edges joined on each side of the cube; and the sides with a diagonal."""
        at = [tuple(c + o for c, o in zip(cube, corner, strict=True)) for corner in CORNERS]
        joins, diagonal = [], []
        for axis, end in product(range(3), (0, 1)):
            corners = [i for i in range(8) if CORNERS[i][axis] == end]
            crossed = [
                e
                for e, (a, b) in enumerate(EDGE_CORNERS)
                if a in corners and b in corners and sign[at[a]] != sign[at[b]]
            ]
            if len(crossed) == 2:
                joins.append(crossed)
            elif len(crossed) == 4:
                direction = tuple((2 * end - 1) if k == axis else 0 for k in range(3))
                diagonal.append((direction, crossed))
                for c in corners:
                    if sign[at[c]] == keep_inside:
                        joins.append([e for e in crossed if c in EDGE_CORNERS[e]])
        return joins, diagonal

    def components(joins):
        groups = []
        for join in joins:
            touching = [g for g in groups if g & set(join)]
            groups = [g for g in groups if not g & set(join)] + [set(join).union(*touching)]
        return groups

    def problem(cube):
        if min(cube) < 0 or max(cube) >= grid.resolution:
            return None
        joins, diagonal = ambiguous_sides(cube, True)
        for direction, crossed in diagonal:
            if any(set(crossed) <= g for g in components(joins)):
                return direction
        return None

    found = []
    for c, cube in enumerate(map(tuple, grid.coords.tolist())):
        direction = problem(cube)
        flipped = direction is not None and problem(tuple(map(sum, zip(cube, direction, strict=True)))) is not None
        joins, _ = ambiguous_sides(cube, not flipped)
        at = [tuple(k + o for k, o in zip(cube, corner, strict=True)) for corner in CORNERS]
        for patch in components(joins):
            beta = weights[c, :12].tanh() * 0.99 + 1
            alpha = weights[c, 12:20].tanh() * 0.99 + 1
            total, vertex = 0, torch.zeros(3, dtype=torch.float64)
            for e in patch:
                a, b = EDGE_CORNERS[e]
                sa, sb = alpha[a] * sdf[row[at[a]]], alpha[b] * sdf[row[at[b]]]
                crossing = (sb * positions[row[at[a]]] - sa * positions[row[at[b]]]) / (sb - sa)
                vertex += beta[e] * crossing
                total += beta[e]
            found.append(((c, tuple(sorted(patch))), vertex / total))
    return found


def test_dual_vertices_equal_the_naive_twin():
    grid, positions, sdf, weights = noise(5, 7)
    mesh = extract(grid, positions, sdf, weights)
    naive = naive_dual_vertices(grid, positions, sdf, weights)
    assert len(mesh.vertices) == len(naive)
    ours = sorted(zip(mesh.cube.tolist(), mesh.vertices.tolist(), strict=True))
    theirs = sorted((key[0], vertex.tolist()) for key, vertex in naive)
    assert [cube for cube, _ in ours] == [cube for cube, _ in theirs]
    torch.testing.assert_close(torch.tensor([v for _, v in ours]), torch.tensor([v for _, v in theirs]))


def test_a_list_of_the_surface_cubes_gives_the_same_mesh_as_all_cubes():
    grid, positions, sdf = sphere(20)
    whole = extract(grid, positions, sdf)
    touched = torch.unique(whole.cube)
    shuffled = grid.coords[touched][torch.randperm(len(touched), generator=torch.Generator().manual_seed(0))]
    sparse = sparse_grid(shuffled, 20)
    key = (sparse.points * torch.tensor([21 * 21, 21, 1])).sum(1)
    part = extract(sparse, positions[key], sdf[key])
    torch.testing.assert_close(part.vertices, whole.vertices, rtol=0, atol=0)
    assert torch.equal(part.faces, whole.faces)


def test_attributes_move_with_the_vertices():
    grid, positions, sdf = sphere(12)
    mesh = extract(grid, positions, sdf, attributes=positions * 2 + 1)
    torch.testing.assert_close(mesh.attributes, mesh.vertices * 2 + 1)


@pytest.mark.parametrize("split", ["two", "four"])
def test_gradients_equal_finite_differences(split):
    grid, positions, sdf, weights = noise(3, 3)
    sdf = torch.where(sdf.abs() < 0.05, 0.05 * sdf.sign(), sdf)  # no sign changes within the finite step
    inputs = [t.clone().requires_grad_() for t in (positions, sdf, 0.3 * weights)]

    def outputs(p, s, w):
        mesh = extract(grid, p, s, w, p, split=split)
        return mesh.vertices, mesh.attributes, mesh.l_dev

    assert torch.autograd.gradcheck(outputs, inputs, eps=1e-7, atol=1e-5, fast_mode=True)


def test_the_four_way_split_has_a_gradient_for_gamma_and_the_regulariser_for_the_rest():
    grid, positions, sdf, weights = noise(4, 1)
    weights.requires_grad_()
    mesh = extract(grid, positions, sdf, weights, split="four")
    (mesh.vertices.square().sum() + mesh.l_dev).backward()
    surface = torch.unique(mesh.cube[mesh.cube >= 0])
    assert torch.isfinite(weights.grad).all()
    assert (weights.grad[surface, 20] != 0).float().mean() > 0.5
    assert (weights.grad[surface, :20] != 0).any(1).all()


def test_no_surface_is_an_empty_mesh():
    grid, positions, _ = sphere(4)
    mesh = extract(grid, positions, torch.ones(len(positions), dtype=torch.float64))
    assert mesh.vertices.shape == (0, 3)
    assert mesh.faces.shape == (0, 3)
    assert mesh.l_dev == 0
