"""Attention in its several shapes against softmax over explicit pairs, float64."""

import pytest
import torch

from viewmesh.trellis.attention import attend_to_context, attend_within_items, attend_within_windows
from viewmesh.trellis.sparse import Voxels


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """q (L, H, D), k and v (T, H, D), allowed (L, T)."""
    scores = torch.einsum("lhd,thd->hlt", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hlt,thd->lhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("counts", [[7], [4, 4, 4], [5, 1, 6]])
def test_items_attend_within_themselves(counts):
    L = sum(counts)
    item = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    q, k, v = torch.randn(3, 2, L, 3, 4, dtype=torch.float64)
    ours = attend_within_items(q, k, v, torch.tensor(counts))
    for p in range(2):
        torch.testing.assert_close(ours[p], naive(q[p], k[p], v[p], item[:, None] == item))


@pytest.mark.parametrize("counts", [[7], [4, 4, 4], [5, 1, 6]])
@pytest.mark.parametrize("views", [1, 3])
def test_items_attend_to_their_views_on_average(counts, views):
    L, B, T = sum(counts), len(counts), 5
    q = torch.randn(2, L, 3, 4, dtype=torch.float64)
    kv = torch.randn(2, B, views, 2, T, 3, 4, dtype=torch.float64)
    ours = attend_to_context(q, kv, torch.tensor(counts))
    start = 0
    for b, n in enumerate(counts):
        for p in range(2):
            part = q[p, start : start + n]
            allowed = torch.ones(n, T, dtype=torch.bool)
            mean = sum(naive(part, kv[p, b, i, 0], kv[p, b, i, 1], allowed) for i in range(views)) / views
            torch.testing.assert_close(ours[p, start : start + n], mean)
        start += n


@pytest.mark.parametrize("shift", [0, 2])
def test_windows_attend_within_themselves(shift):
    occupied = torch.rand(2, 10, 10, 10, generator=torch.Generator().manual_seed(1)) < 0.4
    occupied[1, :4, :4, :4] = True  # a full window beside sparse ones: more than one bucket
    voxels = Voxels.of(occupied.nonzero(), 10)
    qkv = torch.randn(len(voxels), 3, 2, 4, dtype=torch.float64)
    window = torch.cat([voxels.coords[:, :1], (voxels.coords[:, 1:] + shift) // 4], 1)
    same = (window[:, None] == window).all(-1)
    ours = attend_within_windows(qkv, voxels.windows(4, shift))
    torch.testing.assert_close(ours, naive(qkv[:, 0], qkv[:, 1], qkv[:, 2], same))
    assert len(voxels.windows(4, shift)) > 1
