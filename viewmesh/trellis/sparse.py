"""Voxel sets and features on them: neighbours, coarser and finer sets, windows, convolution.

A `Voxels` value is a set of coordinates and everything that depends on the coordinates alone, each built once, when
first asked for, and shared by all layers. Features are plain tensors (..., L, C); `SparseTensor` pairs the two.
Knows nothing about networks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from viewmesh.trellis import conv_triton
from viewmesh.trellis.attention import WindowBucket, window_buckets

GATHER_BYTES = 256 << 20  # the most that one step of a convolution gathers


@dataclass(frozen=True)
class Voxels:
    """L distinct voxels of one or more items, the voxels of an item one after another.

    coords: (L, 4) int32, columns item, x, y, z; x, y, z in [0, resolution). counts: voxels per item.
    """

    coords: Tensor  # (L, 4)
    resolution: int
    counts: tuple[int, ...]
    _windows: dict[tuple[int, int], list[WindowBucket]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, coords: Tensor, resolution: int, items: int | None = None) -> "Voxels":
        """From coordinates grouped by item; one device-to-host copy."""
        return cls(coords.int(), resolution, tuple(coords[:, 0].long().bincount(minlength=items or 0).tolist()))

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def item(self) -> Tensor:  # (L,)
        return self.coords[:, 0].long()

    @cached_property
    def key(self) -> Tensor:
        """(L,) int64, ordered as (item, x, y, z)."""
        return voxel_key(self.coords, self.resolution)

    @cached_property
    def neighbors(self) -> Tensor:
        """(L, 27) int32 rows of the 3x3x3 neighbours, offsets -1..1 in C order of (x, y, z); L where there is none."""
        key, order = self.key.sort()
        offset = torch.tensor(list(product((-1, 0, 1), repeat=3)), device=self.coords.device)
        there = self.coords[:, None, 1:].long() + offset  # (L, 27, 3)
        in_range = ((there >= 0) & (there < self.resolution)).all(-1)
        item = self.coords[:, None, :1].long().expand(-1, 27, 1)
        wanted = voxel_key(torch.cat([item, there], -1), self.resolution)
        at = torch.searchsorted(key, wanted).clamp(max=len(self) - 1)
        found = in_range & (key[at] == wanted)
        return torch.where(found, order[at], len(self)).int()

    @cached_property
    def _coarse(self) -> tuple["Voxels", Tensor, Tensor]:
        half = torch.cat([self.coords[:, :1], self.coords[:, 1:] // 2], 1)
        key, parent, size = voxel_key(half, self.resolution).unique(return_inverse=True, return_counts=True)
        first = torch.full_like(key, len(self)).scatter_reduce_(
            0, parent, torch.arange(len(self), device=key.device), "amin"
        )
        coords = half[first]
        counts = (len(coords),) if len(self.counts) == 1 else coords[:, 0].bincount(minlength=len(self.counts)).tolist()
        return Voxels(coords, (self.resolution + 1) // 2, tuple(counts)), parent, size

    @property
    def coarse(self) -> "Voxels":
        """The voxels of twice the size that hold ours, sorted by (item, x, y, z)."""
        return self._coarse[0]

    @property
    def parent(self) -> Tensor:
        """(L,) int64, the row in `coarse` that holds each voxel."""
        return self._coarse[1]

    @property
    def children(self) -> Tensor:
        """(len(coarse),) int64, how many of ours each coarse voxel holds."""
        return self._coarse[2]

    @cached_property
    def neighbor_parents(self) -> Tensor:
        """(L, 27) int32 rows in `coarse` of each neighbour's parent; len(coarse) where there is no neighbour.

        Of a `subdivided` set: rows in the set that was subdivided.
        """
        none = self.parent.new_full((1,), len(self.coarse))
        return torch.cat([self.parent, none]).int()[self.neighbors]

    @cached_property
    def subdivided(self) -> "Voxels":
        """All 8 children of each voxel, at rows 8 i + 4 x + 2 y + z, with tables that need no search."""
        bits = torch.tensor(list(product((0, 1), repeat=3)), device=self.coords.device, dtype=torch.int32)
        item = self.coords[:, None, :1].expand(-1, 8, 1)
        coords = torch.cat([item, self.coords[:, None, 1:] * 2 + bits], -1).reshape(-1, 4)
        fine = Voxels(coords, self.resolution * 2, tuple(8 * n for n in self.counts))

        offset = torch.tensor(list(product((-1, 0, 1), repeat=3)), device=coords.device)
        place = bits[:, None].long() + offset  # (8, 27, 3) in -1..2
        weight = torch.tensor([9, 3, 1], device=coords.device)
        towards = ((place.div(2, rounding_mode="floor") + 1) * weight).sum(-1)  # which neighbour of the parent
        child = ((place & 1) * torch.tensor([4, 2, 1], device=coords.device)).sum(-1).int()
        parents = self.neighbors[:, towards.flatten()].reshape(-1, 27)  # (8 L, 27)
        rows = (parents.reshape(-1, 8, 27) * 8 + child).reshape(-1, 27)
        # seeds the cached properties: what they would compute, without the search
        fine.__dict__["neighbors"] = torch.where(parents < len(self), rows, len(fine)).int()
        fine.__dict__["neighbor_parents"] = parents
        return fine

    def windows(self, size: int, shift: int) -> list[WindowBucket]:
        """The voxels in windows of size³, laid from -shift: no wrapping, windows at the border are cut."""
        if (size, shift) not in self._windows:
            n = (self.resolution + shift) // size + 1
            at = torch.cat([self.coords[:, :1], (self.coords[:, 1:] + shift) // size], 1)
            self._windows[size, shift] = window_buckets(voxel_key(at, n))
        return self._windows[size, shift]


def voxel_key(coords: Tensor, resolution: int) -> Tensor:
    """(..., 4) item, x, y, z to int64 (...,), ordered lexicographically."""
    item, x, y, z = coords.long().unbind(-1)
    return ((item * resolution + x) * resolution + y) * resolution + z


@dataclass(frozen=True)
class SparseTensor:
    """Features (..., L, C) on L voxels; leading dimensions are passes over the same voxels."""

    feats: Tensor
    voxels: Voxels

    def with_feats(self, feats: Tensor) -> "SparseTensor":
        return replace(self, feats=feats)

    def item_feats(self) -> Sequence[Tensor]:
        """The features of each item, (..., L_i, C)."""
        return self.feats.split(list(self.voxels.counts), -2)


def downsample(feats: Tensor, voxels: Voxels) -> Tensor:
    """Features (..., L, C) to (..., len(coarse), C): the sum over children divided by one more than their number.

    Not a mean: the published network was trained with a reduction that counts its zero start as a member.
    """
    coarse = feats.new_zeros(*feats.shape[:-2], len(voxels.coarse), feats.shape[-1])
    coarse.index_add_(-2, voxels.parent, feats)
    return coarse / (voxels.children + 1).to(feats.dtype)[:, None]


def convolve(feats: Tensor, table: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Submanifold 3x3x3 convolution: feats (..., S, C), table (L, 27) of source rows (S for none) to (..., L, Cout).

    weight: (Cout, 3, 3, 3, C). Gathers before the product when the input is the narrower side, after it otherwise.
    """
    if feats.ndim > 2:
        return torch.stack([convolve(f, table, weight, bias) for f in feats])
    S, C = feats.shape
    Cout = weight.shape[0]
    if Cout < C:
        per_tap = weight.reshape(Cout, 27, C).permute(1, 0, 2).reshape(27 * Cout, C)
        spread = feats.new_empty(S * 27 + 1, Cout)  # the last row is the neighbour that is not there
        spread[-1] = 0
        torch.mm(feats, per_tap.T, out=spread[:-1].view(S, 27 * Cout))
        tap = torch.arange(27, device=table.device, dtype=table.dtype)
        rows = torch.where(table < S, table * 27 + tap, S * 27)
        return F.embedding_bag(rows, spread, mode="sum") + bias
    if conv_triton.can_run(feats, weight):
        return conv_triton.convolve(feats, table, weight, bias)
    flat = weight.reshape(Cout, 27 * C)
    padded = torch.cat([feats, feats.new_zeros(1, C)])
    step = max(1, GATHER_BYTES // (27 * C * feats.element_size()))
    parts = [
        F.linear(padded.index_select(0, part.flatten()).reshape(-1, 27 * C), flat, bias) for part in table.split(step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def group_norm(feats: Tensor, counts: Sequence[int], groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Group norm of (L, C) with statistics over each item's voxels, in float32, cast back."""

    def one(x: Tensor) -> Tensor:
        grouped = x.to(torch.float32, copy=True).reshape(len(x), groups, -1)
        var, mean = torch.var_mean(grouped, dim=(0, 2), keepdim=True, correction=0)
        normal = grouped.sub_(mean).mul_(torch.rsqrt(var + eps)).reshape(x.shape)  # in place: the largest tensor here
        return normal.mul_(weight).add_(bias).to(x.dtype)

    return one(feats) if len(counts) == 1 else torch.cat([one(x) for x in feats.split(list(counts))])
