"""Rows of arrays: which are equal, and how to take them so that gradients come back cheaply."""

import numpy as np
import torch
from torch import Tensor


def rows_at(values: Tensor, index: Tensor) -> Tensor:
    """`values[index]` for an index of any shape into the first dimension, none negative.

    Its gradient is added up where it belongs; that of `values[index]` sorts the index first, and on a GPU waits for it.
    """
    return values.index_select(0, index.flatten()).reshape(*index.shape, *values.shape[1:])


def contains(sorted_keys: Tensor, keys: Tensor) -> Tensor:
    """(N,) bool: which of keys (N,) are among sorted_keys (M,), M > 0 unless N = 0."""
    at = torch.searchsorted(sorted_keys, keys).clamp(max=len(sorted_keys) - 1)
    return sorted_keys[at] == keys


def equal_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """rows: (N, K) integers, none negative. Where each different row is first, in the rows' order, (U,); and which of
    those each row equals, (N,).

    `rows[first], inverse` is np.unique(rows, axis=0, return_inverse=True) in a tenth of its time: that compares rows as
    Python would, and keeps the interpreter's lock meanwhile, so that a replica's other threads wait.
    """
    if not len(rows):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    key, values = np.zeros(len(rows), np.int64), 1
    for column in rows.T:
        width = int(column.max()) + 1
        if values * width >= 2**63:  # their ranks serve as well
            (_, key), (_, column) = _equal(key), _equal(column)
            values = width = len(rows)
        key, values = key * width + column, values * width
    return _equal(key)


def _equal(key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    new = np.r_[True, ordered[1:] != ordered[:-1]]
    inverse = np.empty(len(key), np.int64)
    inverse[order] = np.cumsum(new) - 1
    return order[new], inverse
