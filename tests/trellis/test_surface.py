"""Extraction over the active voxels against FlexiCubes over the whole lattice."""

import pytest
import torch

from viewmesh.errors import EmptyReconstruction
from viewmesh.geometry.dual_tables import CORNERS
from viewmesh.geometry.flexicubes import dense_grid, extract, point_key
from viewmesh.trellis.surface import surface_mesh

R = 14


def shell(channels: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Voxels about a sphere with noisy distances, in random order; some on the lattice's border."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.arange(R)
    coords = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    corners = coords[:, None] + torch.tensor(CORNERS)
    distance = (corners / R - 0.5).norm(dim=-1) - 0.42
    active = distance.abs().min(1).values < 0.08
    coords, distance = coords[active], distance[active]
    order = torch.randperm(len(coords), generator=generator)
    noise = torch.randn(len(coords), channels - 8, generator=generator)
    return coords[order], torch.cat([distance[order] + 0.02 * noise[:, :8], noise], 1)


def dense_mesh(coords: torch.Tensor, feats: torch.Tensor):
    """The published rule, literally: means over voxels onto dense volumes, outside = +1, no voxel = zero weights."""
    points = (R + 1) ** 3
    key = point_key(coords[:, None] + torch.tensor(CORNERS), R).flatten()
    values = torch.cat([feats[:, :8].reshape(-1, 1), feats[:, 8:32].reshape(-1, 3), feats[:, 53:].reshape(-1, 6)], 1)
    values[:, 0] -= 1 / R
    total = torch.zeros(points, 10).index_add_(0, key, values)
    count = torch.zeros(points).index_add_(0, key, torch.ones(len(key)))
    mean = total / count.clamp(min=1)[:, None]
    mean[count == 0, 0] = 1
    weights = torch.zeros(R**3, 21)
    weights[(coords[:, 0] * R + coords[:, 1]) * R + coords[:, 2]] = feats[:, 32:53]
    grid = dense_grid(R)
    positions = grid.points / R - 0.5 + (1 - 1e-8) / (2 * R) * mean[:, 1:4].tanh()
    return extract(grid, positions, mean[:, 0], weights, mean[:, 4:].sigmoid())


@pytest.mark.parametrize("seed", range(3))
def test_the_active_voxels_give_the_dense_mesh_in_its_order(seed):
    coords, feats = shell(101, seed)
    ours, dense = surface_mesh(coords, feats, R), dense_mesh(coords, feats)
    assert torch.equal(ours.faces, dense.faces)
    torch.testing.assert_close(ours.vertices, dense.vertices)
    torch.testing.assert_close(ours.attributes, dense.attributes)


def test_the_surface_of_a_full_block_lies_in_the_ring_around_it():
    axis = torch.arange(4, 8)
    coords = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    mesh = surface_mesh(coords, torch.full((64, 53), 0.0) - torch.eye(53)[:8].sum(0), R)
    assert mesh.attributes is None
    outside = ((mesh.vertices < 4 / R - 0.5) | (mesh.vertices > 8 / R - 0.5)).any(1)
    assert outside.all()
    assert len(mesh.vertices) - len(mesh.faces) / 2 == 2


def test_nothing_inside_is_an_error():
    coords, feats = shell(53)
    with pytest.raises(EmptyReconstruction):
        surface_mesh(coords, feats.abs() + 1, R)
