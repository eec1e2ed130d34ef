"""Marching tetrahedra: laws of the lattice and of the surface, gradients against finite differences."""

import pytest
import torch

from viewmesh.geometry.tets import TetGrid, bcc_grid, marching_tets, narrowed


@pytest.fixture(scope="module")
def grid() -> TetGrid:
    return bcc_grid(torch.tensor([-0.6, -0.6, -0.6]), torch.tensor([0.6, 0.6, 0.6]), 20)


def volumes(vertices, tets):
    a, b, c, d = vertices[tets].double().unbind(1)
    return (torch.linalg.cross(b - a, c - a) * (d - a)).sum(-1) / 6


def test_all_tets_are_congruent_and_positively_oriented(grid):
    v = volumes(grid.vertices, grid.tets)
    torch.testing.assert_close(v, torch.full_like(v, grid.cell**3 / 12), rtol=1e-4, atol=0)


def test_edges_are_numbered_once_and_right(grid):
    assert len(torch.unique(grid.edges, dim=0)) == len(grid.edges)
    pairs = torch.tensor([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])
    expected = grid.tets[:, pairs].sort(-1).values
    assert torch.equal(grid.edges[grid.tet_edges], expected)


def test_a_box_that_is_not_a_cube_has_cubic_cells():
    grid = bcc_grid(torch.tensor([0.0, 0.0, 0.0]), torch.tensor([1.0, 0.5, 0.25]), 8)
    assert grid.shape == (8, 4, 2)
    assert grid.cell == pytest.approx(1 / 8)


def sphere(grid, radius=0.45):
    center = torch.tensor([0.01, -0.02, 0.03])
    surface = marching_tets(grid, grid.vertices, (grid.vertices - center).norm(dim=-1) - radius, grid.vertices)
    return surface, center


def test_sphere_is_closed_round_and_faces_outwards(grid):
    surface, center = sphere(grid)
    edges = surface.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)
    forward = {tuple(e) for e in edges.tolist()}
    assert len(forward) == len(edges)  # every directed edge once
    assert all((b, a) in forward for a, b in forward)  # and its opposite: closed, consistently oriented
    assert len(surface.vertices) - len(forward) // 2 + len(surface.faces) == 2  # Euler: a sphere
    radii = (surface.vertices - center).norm(dim=-1)
    assert float((radii - 0.45).abs().max()) < 0.1 * grid.cell
    a, b, c = (surface.vertices - center)[surface.faces].unbind(1)
    signed = (torch.linalg.cross(a, b) * c).sum(-1) / 6
    assert float(signed.sum()) == pytest.approx(4 / 3 * torch.pi * 0.45**3, rel=0.02)
    assert float(signed.min()) > 0


def test_a_band_around_the_surface_gives_the_same_surface(grid):
    sdf = grid.vertices.norm(dim=-1) - 0.45
    whole = marching_tets(grid, grid.vertices, sdf)
    band = narrowed(grid, (sdf.abs() < 1.5 * grid.cell)[grid.tets].any(-1))
    assert len(band.tets) < 0.5 * len(grid.tets)
    part = marching_tets(band, grid.vertices, sdf)
    assert torch.equal(part.vertices, whole.vertices)
    assert torch.equal(part.faces, whole.faces)


def test_values_are_interpolated_like_positions(grid):
    surface, _ = sphere(grid)
    torch.testing.assert_close(surface.values, surface.vertices)


def test_nothing_inside_gives_nothing(grid):
    surface = marching_tets(grid, grid.vertices, torch.ones(len(grid.vertices)))
    assert surface.vertices.shape == (0, 3)
    assert surface.faces.shape == (0, 3)


def test_gradients_match_finite_differences():
    grid = bcc_grid(torch.tensor([-1.0, -1, -1]), torch.tensor([1.0, 1, 1]), 4)
    generator = torch.Generator().manual_seed(0)
    positions = grid.vertices.double() + 0.05 * torch.randn(
        grid.vertices.shape, dtype=torch.float64, generator=generator
    )
    sdf = positions.norm(dim=-1) - 0.6
    values = torch.randn(len(positions), 2, dtype=torch.float64, generator=generator)

    def outputs(p, s, v):
        surface = marching_tets(grid, p, s, v)
        return surface.vertices, surface.values

    inputs = tuple(t.requires_grad_() for t in (positions, sdf, values))
    assert torch.autograd.gradcheck(outputs, inputs, fast_mode=True)
