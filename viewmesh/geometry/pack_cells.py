"""Where the charts of an atlas go on a grid of cells: each in turn, lowest first, as bits in words of 64 cells.

`taken[j, row]` has a bit for every cell from which some of the next 2^j cells of the row are taken, so a run of cells
of any length is tested at all positions of a row by two shifts and ORs. The loops release the GIL: six thousand charts
take more than half a second, in which other threads of a replica work.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from viewmesh.geometry.jit import inline, jit
from viewmesh.progress import check, never

AT_ONCE = 128  # charts between two questions whether to go on
ROWS = 4  # of the grid per row of the atlas: more than charts that are too large by far can fill
ZERO, ONE, ALL = np.uint64(0), np.uint64(1), np.uint64(2**64 - 1)


@dataclass(frozen=True)
class Placed:
    """shift: (K, 2) float64 cells; turned: (K,) bool, by 90 degrees; height: rows that were needed."""

    shift: np.ndarray
    turned: np.ndarray
    height: int


def place(
    counts: np.ndarray, x: np.ndarray, y: np.ndarray, cells: int, cancelled: Callable[[], bool] = never
) -> Placed:
    """The charts, from the largest to the smallest, each where it fits lowest, as it is or turned.

    counts: (K,) int64, how many cells each chart has; x, y: (N,) int64, those of the first one, of the second one and
    so on, each once. A chart wider than the grid both ways ends it with a height of ROWS * cells. Raises Cancelled.
    """
    bounds = np.r_[0, np.cumsum(counts)]
    order = np.argsort(-counts, kind="stable")
    K = len(order)
    shift, turned = np.zeros((K, 2)), np.zeros(K, np.bool_)
    levels, words = int(cells).bit_length(), -(-cells // 64)
    taken = np.zeros((levels, ROWS * cells, words + 1), np.uint64)  # a word more, so that shifts need no border
    height = 0
    for first in range(0, K, AT_ONCE):
        check(cancelled)
        height = _place(order[first : first + AT_ONCE], bounds, x, y, cells, taken, shift, turned, height)
        if height >= ROWS * cells:
            break
    return Placed(shift, turned, height)


@jit
def _place(order, bounds, x, y, cells, taken, shift, turned, height):
    for k in order:
        cx, cy = x[bounds[k] : bounds[k + 1]], y[bounds[k] : bounds[k + 1]]
        top, at_x, at_y, turn = taken.shape[1], -1, -1, 0
        u0, v0 = 0, 0
        best = np.zeros((0, 3), np.int64)
        for t in range(2):
            u, v = (cx, cy) if t == 0 else (-cy, cx)
            low_u, low_v = u.min(), v.min()
            w, h = u.max() - low_u + 1, v.max() - low_v + 1
            if w > cells:
                continue
            runs = _runs(u - low_u, v - low_v, w, h)
            found_x, found_y = _lowest(runs, taken, cells, w, min(top, taken.shape[1]) - h)
            if found_y >= 0 and found_y + h < top:
                top, at_x, at_y, turn, u0, v0, best = found_y + h, found_x, found_y, t, low_u, low_v, runs
        if at_y < 0:
            return taken.shape[1]
        height = max(height, top)
        shift[k, 0], shift[k, 1], turned[k] = at_x - u0, at_y - v0, turn == 1
        for r in range(len(best)):
            _take(taken, at_y + best[r, 0], at_x + best[r, 1], best[r, 2])
    return height


@jit
def _runs(u, v, w, h):
    """Horizontal runs (row, start, length) of a chart's cells, the longest first: they rule most positions out."""
    mask = np.zeros((h, w + 1), np.bool_)
    for i in range(len(u)):
        mask[v[i], u[i]] = True
    found = np.empty((len(u), 3), np.int64)
    n = 0
    for row in range(h):
        start = -1
        for column in range(w + 1):
            if mask[row, column]:
                if start < 0:
                    start = column
            elif start >= 0:
                found[n, 0], found[n, 1], found[n, 2] = row, start, column - start
                n, start = n + 1, -1
    for i in range(1, n):
        row, start, length, j = found[i, 0], found[i, 1], found[i, 2], i
        while j > 0 and found[j - 1, 2] < length:
            found[j] = found[j - 1]
            j -= 1
        found[j, 0], found[j, 1], found[j, 2] = row, start, length
    return found[:n]


@jit
def _lowest(runs, taken, cells, w, last_row):
    """The first position (x, y), row by row up to last_row, at which no run meets a taken cell; (-1, -1) for none."""
    words = taken.shape[2] - 1
    allowed = np.zeros(words, np.uint64)  # positions from which w cells are left in the row
    for p in range(cells - w + 1):
        allowed[p >> 6] |= ONE << np.uint64(p & 63)
    free = np.empty(words, np.uint64)
    for y in range(last_row + 1):
        free[:] = allowed
        for r in range(len(runs)):
            row, start, length = runs[r, 0], runs[r, 1], runs[r, 2]
            j = 0
            while 2 << j <= length:
                j += 1
            level = taken[j, y + row]
            left = _rule_out(free, level, start)
            if length != 1 << j and left != ZERO:
                left = _rule_out(free, level, start + length - (1 << j))
            if left == ZERO:
                break
        else:
            for word in range(words):
                if free[word] != ZERO:
                    bit = 0
                    while (free[word] >> np.uint64(bit)) & ONE == ZERO:
                        bit += 1
                    return 64 * word + bit, y
    return -1, -1


@inline
def _rule_out(free, level, shift):
    """free & ~(level >> shift), in place; returns the bits that are left, ORed."""
    words = len(free)
    whole, part = shift >> 6, np.uint64(shift & 63)
    left = ZERO
    for word in range(words - whole):
        bits = level[word + whole] >> part
        if part != ZERO:
            bits |= level[word + whole + 1] << (np.uint64(64) - part)
        free[word] &= ~bits
        left |= free[word]
    for word in range(words - whole, words):
        left |= free[word]
    return left


@inline
def _take(taken, row, start, length):
    end = start + length
    for j in range(taken.shape[0]):
        first = max(0, start - (1 << j) + 1)
        for word in range(first >> 6, ((end - 1) >> 6) + 1):
            low, high = max(first - 64 * word, 0), min(end - 64 * word, 64)
            taken[j, row, word] |= (ALL >> np.uint64(64 - (high - low))) << np.uint64(low)
