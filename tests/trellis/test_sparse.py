"""Voxel sets and convolution on them, against dense convolution in float64."""

import pytest
import torch
from torch.nn import functional as F

from viewmesh.trellis import conv_triton
from viewmesh.trellis.sparse import Voxels, convolve, downsample, group_norm


def random_voxels(resolution: int = 9, items: int = 2, density: float = 0.3, seed: int = 0) -> Voxels:
    occupied = torch.rand(items, *(resolution,) * 3, generator=torch.Generator().manual_seed(seed)) < density
    coords = occupied.nonzero()
    shuffled = torch.cat([part[torch.randperm(len(part))] for part in coords.split(coords[:, 0].bincount().tolist())])
    return Voxels.of(shuffled, resolution)


def scattered(feats: torch.Tensor, voxels: Voxels) -> torch.Tensor:
    """(L, C) to (B, C, R, R, R)."""
    R = voxels.resolution
    dense = feats.new_zeros(len(voxels.counts), feats.shape[1], R, R, R)
    b, x, y, z = voxels.coords.long().unbind(-1)
    dense[b, :, x, y, z] = feats
    return dense


def gathered(dense: torch.Tensor, voxels: Voxels) -> torch.Tensor:
    b, x, y, z = voxels.coords.long().unbind(-1)
    return dense[b, :, x, y, z]


@pytest.mark.parametrize(("cin", "cout"), [(5, 7), (7, 5)])  # gather before, and after, the product
def test_convolution_equals_the_dense_one(cin, cout):
    voxels = random_voxels()
    feats = torch.randn(len(voxels), cin, dtype=torch.float64)
    weight, bias = torch.randn(cout, 3, 3, 3, cin, dtype=torch.float64), torch.randn(cout, dtype=torch.float64)
    ours = convolve(feats, voxels.neighbors, weight, bias)
    dense = F.conv3d(scattered(feats, voxels), weight.permute(0, 4, 1, 2, 3), bias, padding=1)
    torch.testing.assert_close(ours, gathered(dense, voxels))


def test_convolution_in_small_steps_and_over_passes_is_the_same(monkeypatch):
    voxels = random_voxels()
    feats, weight = torch.randn(3, len(voxels), 4), torch.randn(6, 3, 3, 3, 4)
    whole = convolve(feats, voxels.neighbors, weight, torch.zeros(6))
    monkeypatch.setattr("viewmesh.trellis.sparse.GATHER_BYTES", 27 * 4 * 4 * 50)
    torch.testing.assert_close(convolve(feats, voxels.neighbors, weight, torch.zeros(6)), whole)
    torch.testing.assert_close(convolve(feats[1], voxels.neighbors, weight, torch.zeros(6)), whole[1])


@pytest.mark.parametrize(("cin", "cout"), [(5, 7), (7, 5)])
def test_convolution_of_parents_copied_to_children_equals_copying_first(cin, cout):
    voxels = random_voxels(resolution=10)
    coarse_feats = torch.randn(len(voxels.coarse), cin, dtype=torch.float64)
    weight, bias = torch.randn(cout, 3, 3, 3, cin, dtype=torch.float64), torch.randn(cout, dtype=torch.float64)
    copied = convolve(coarse_feats[voxels.parent], voxels.neighbors, weight, bias)
    torch.testing.assert_close(convolve(coarse_feats, voxels.neighbor_parents, weight, bias), copied)


def test_subdivision_knows_its_neighbours_without_a_search():
    fine = random_voxels(resolution=5).subdivided
    fresh = Voxels.of(fine.coords, fine.resolution)
    assert torch.equal(fine.neighbors, fresh.neighbors)
    expected = torch.where(fresh.neighbors < len(fresh), fresh.neighbors // 8, len(fresh) // 8)
    assert torch.equal(fine.neighbor_parents, expected)
    assert fine.counts == fresh.counts


def test_downsampling_divides_by_one_more_than_the_children():
    coords = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [0, 2, 3, 2]])
    voxels = Voxels.of(coords, 4)
    feats = torch.tensor([[1.0], [2.0], [6.0], [10.0]])
    torch.testing.assert_close(downsample(feats, voxels), torch.tensor([[9 / 4], [5.0]]))
    assert voxels.coarse.coords.tolist() == [[0, 0, 0, 0], [0, 1, 1, 1]]


def test_coarse_voxels_are_sorted_within_items():
    coarse = random_voxels().coarse
    key = coarse.key
    assert (key[1:] > key[:-1]).all()
    assert sum(coarse.counts) == len(coarse)


@pytest.mark.gpu
@pytest.mark.parametrize(("cin", "cout"), [(32, 32), (96, 96), (64, 192), (128, 128)])
def test_the_triton_kernel_equals_its_torch_twin(cin, cout):
    voxels = random_voxels(resolution=12)
    generator = torch.Generator().manual_seed(1)
    feats = torch.randn(len(voxels), cin, generator=generator)
    weight, bias = torch.randn(cout, 3, 3, 3, cin, generator=generator) / 30, torch.randn(cout, generator=generator)
    twin = convolve(feats, voxels.neighbors, weight, bias)
    half = [t.cuda().half() for t in (feats, weight, bias)]
    ours = conv_triton.convolve(half[0], voxels.neighbors.cuda(), half[1], half[2])
    torch.testing.assert_close(ours.float().cpu(), twin, rtol=5e-3, atol=5e-3)


def test_group_norm_is_per_item():
    voxels = random_voxels()
    feats = torch.randn(len(voxels), 8, dtype=torch.float32)
    weight, bias = torch.randn(8), torch.randn(8)
    ours = group_norm(feats, voxels.counts, 4, weight, bias, 1e-5)
    twin = torch.cat([F.group_norm(p.T[None], 4, weight, bias, 1e-5)[0].T for p in feats.split(list(voxels.counts))])
    torch.testing.assert_close(ours, twin)
