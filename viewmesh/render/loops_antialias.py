"""Silhouette edges between neighbouring pixels: found, listed, blended, and their gradients, as compiled loops."""

import numpy as np
import torch
from torch import Tensor

from viewmesh.render.kernels_numba import inline, jit


@jit
def _opposite(faces, V):
    F = len(faces)
    start = np.zeros(V + 1, np.int64)
    for f in range(F):
        for k in range(3):
            a, b = faces[f, (k + 1) % 3], faces[f, (k + 2) % 3]
            start[min(a, b) + 1] += 1
    for v in range(V):
        start[v + 1] += start[v]
    at = start[:V].copy()
    edge = np.empty(3 * F, np.int64)
    for f in range(F):
        for k in range(3):
            a, b = faces[f, (k + 1) % 3], faces[f, (k + 2) % 3]
            edge[at[min(a, b)]] = 3 * f + k
            at[min(a, b)] += 1
    out = np.full((F, 3), -1, np.int64)
    for v in range(V):
        for i in range(start[v], start[v + 1]):
            f, k = edge[i] // 3, edge[i] % 3
            end = max(faces[f, (k + 1) % 3], faces[f, (k + 2) % 3])
            found, mates = -1, 0
            for j in range(start[v], start[v + 1]):
                f2, k2 = edge[j] // 3, edge[j] % 3
                if j != i and max(faces[f2, (k2 + 1) % 3], faces[f2, (k2 + 2) % 3]) == end:
                    found, mates = faces[f2, k2], mates + 1
            if mates == 1:
                out[f, k] = found
    return out


def opposite_vertices(faces: Tensor) -> Tensor:
    """See Topology.opposite."""
    if len(faces) == 0:
        return faces.new_zeros((0, 3), dtype=torch.int64)
    f = faces.detach().to(torch.int64).contiguous().numpy()
    return torch.from_numpy(_opposite(f, int(f.max()) + 1))


@inline
def _screen(clip, b, i, H, W):
    w = np.float64(clip[b, i, 3])
    return (np.float64(clip[b, i, 0]) / w * 0.5 + 0.5) * W, (np.float64(clip[b, i, 1]) / w * 0.5 + 0.5) * H, w


@jit
def silhouette_kernel(first, last, step, chunk, clip, faces, opposite, H, W, flags):
    """flags (B, F) uint8: bit k is set where the edge across from corner k is a silhouette in image b."""
    F = len(faces)
    for task in range(first, last, step):
        for n in range(task * chunk, min((task + 1) * chunk, len(clip) * F)):
            b, f = n // F, n % F
            bits = 0
            for k in range(3):
                i, j, own, other = faces[f, (k + 1) % 3], faces[f, (k + 2) % 3], faces[f, k], opposite[f, k]
                ax, ay, aw = _screen(clip, b, i, H, W)
                bx, by, bw = _screen(clip, b, j, H, W)
                if aw <= 0 or bw <= 0:
                    continue
                if other < 0:
                    bits |= 1 << k
                    continue
                cx, cy, cw = _screen(clip, b, own, H, W)
                dx, dy, dw = _screen(clip, b, other, H, W)
                if cw <= 0 or dw <= 0:
                    continue
                c_side = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
                d_side = (bx - ax) * (dy - ay) - (by - ay) * (dx - ax)
                if (c_side > 0) == (d_side > 0):
                    bits |= 1 << k
            flags[b, f] = bits


@inline
def _crossing(clip, b, i, j, H, W, horizontal, row, col):
    """Where the edge i-j crosses the line through pixel (row, col): signed distance from its centre along the pair.

    NaN if it does not, or if the edge belongs to the other direction of pairs.
    """
    ax, ay, _ = _screen(clip, b, i, H, W)
    bx, by, _ = _screen(clip, b, j, H, W)
    ax, ay, bx, by = ax - (col + 0.5), ay - (row + 0.5), bx - (col + 0.5), by - (row + 0.5)
    if (abs(by - ay) >= abs(bx - ax)) != horizontal:
        return np.nan
    if not horizontal:
        ax, ay, bx, by = ay, ax, by, bx
    if (ay > 0) == (by > 0):
        return np.nan
    return ax - ay * (bx - ax) / (by - ay)


@jit
def find_crossings_kernel(first, last, step, rast, clip, faces, flags, code, count):
    """A task is a row of an image. code (B, H, W, 2) int8, for the pair of a pixel with its right (0) and lower (1)
    neighbour: 0 none, 1 + k if edge k of the pixel's own triangle crosses, 4 + k if one of the neighbour's does.
    count (B * H,): the number of crossings of the row.
    """
    H, W = rast.shape[1], rast.shape[2]
    for task in range(first, last, step):
        b, r = task // H, task % H
        n = 0
        for c in range(W):
            for d in range(2):
                r2, c2 = r + d, c + 1 - d
                if r2 >= H or c2 >= W or rast[b, r, c, 3] == rast[b, r2, c2, 3]:
                    continue
                f1, f2 = np.int64(rast[b, r, c, 3]) - 1, np.int64(rast[b, r2, c2, 3]) - 1
                second = f1 < 0 or (f2 >= 0 and rast[b, r2, c2, 2] < rast[b, r, c, 2])
                f, pr, pc, way = (f2, r2, c2, -1.0) if second else (f1, r, c, 1.0)
                bits = flags[b, f]
                if bits == 0:
                    continue
                for k in range(3):
                    if bits & (1 << k):
                        i, j = faces[f, (k + 1) % 3], faces[f, (k + 2) % 3]
                        t = way * _crossing(clip, b, i, j, H, W, d == 0, pr, pc)
                        if t >= 0 and t <= 1:
                            code[b, r, c, d] = (4 if second else 1) + k
                            n += 1
                            break
        count[task] = n


@jit
def list_crossings_kernel(first, last, step, rast, clip, faces, code, start, ends, index, pair, share):
    """The crossings in order. pair (X, 2): flat pixels (near, far); ends (X, 2): the edge's vertices;
    index (X, 2): direction and way; share (X,): t - 1/2.
    """
    H, W = rast.shape[1], rast.shape[2]
    for task in range(first, last, step):
        b, r = task // H, task % H
        n = start[task]
        if n == start[task + 1]:
            continue
        for c in range(W):
            for d in range(2):
                k = code[b, r, c, d]
                if k == 0:
                    continue
                r2, c2 = r + d, c + 1 - d
                second = k >= 4
                k = (k - 1) % 3
                nr, nc, fr, fc, way = (r2, c2, r, c, -1.0) if second else (r, c, r2, c2, 1.0)
                f = np.int64(rast[b, nr, nc, 3]) - 1
                i, j = faces[f, (k + 1) % 3], faces[f, (k + 2) % 3]
                pair[n, 0], pair[n, 1] = (b * H + nr) * W + nc, (b * H + fr) * W + fc
                ends[n, 0], ends[n, 1] = i, j
                index[n, 0], index[n, 1] = d, way
                share[n] = way * _crossing(clip, b, i, j, H, W, d == 0, nr, nc) - 0.5
                n += 1


@jit
def blend(color, pair, share, out):
    """out (P, C), a copy of color (P, C), blended across every crossing."""
    for n in range(len(pair)):
        near, far, a = pair[n, 0], pair[n, 1], share[n]
        to = far if a > 0 else near
        for c in range(color.shape[1]):
            out[to, c] += a * (color[near, c] - color[far, c])


@jit
def blend_backward(color, pair, share, ends, index, clip, H, W, g_out, g_color, g_clip):
    """g_color (P, C), a copy of g_out; g_clip (B, V, 4) float64, zero before."""
    for n in range(len(pair)):
        near, far, a = pair[n, 0], pair[n, 1], share[n]
        to = far if a > 0 else near
        g = 0.0
        for c in range(color.shape[1]):
            g += g_out[to, c] * (color[near, c] - color[far, c])
            g_color[near, c] += a * g_out[to, c]
            g_color[far, c] -= a * g_out[to, c]
        if g == 0:
            continue
        b, i, j, horizontal = near // (H * W), ends[n, 0], ends[n, 1], index[n, 0] == 0
        g *= index[n, 1]
        ax, ay, aw = _screen(clip, b, i, H, W)
        bx, by, bw = _screen(clip, b, j, H, W)
        centre = (near % (H * W)) // W + 0.5 if horizontal else near % W + 0.5
        major, minor, size, other = 0, 1, W, H
        if not horizontal:
            ax, ay, bx, by = ay, ax, by, bx
            major, minor, size, other = 1, 0, H, W
        s, slope = (centre - ay) / (by - ay), (bx - ax) / (by - ay)
        for m in range(2):
            v, w, part = (i, aw, 1 - s) if m == 0 else (j, bw, s)
            g0, g1 = g * part * 0.5 * size / w, -g * part * slope * 0.5 * other / w
            g_clip[b, v, major] += g0
            g_clip[b, v, minor] += g1
            g_clip[b, v, 3] -= (g0 * clip[b, v, major] + g1 * clip[b, v, minor]) / w
