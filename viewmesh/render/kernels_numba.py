"""The compiled loops of the CPU back-end, and the only importer of numba.

Every kernel `k(first, last, step, ...)` does the tasks first, first + step, ... < last and writes nothing that another
task writes, so the result does not depend on the number of threads. `launch` spreads the tasks over threads of our own:
the kernels release the GIL, compile several times faster than numba's parallel loops, may be called from several
threads at once, and do not spin against torch's thread pool.

Geometry is homogeneous (Olano and Greer 1997): with p_i = (x, y, w) of a corner and P = (X, Y, 1) of a pixel in
normalised device coordinates, a_0 = (p_1 x p_2).P and so on; the pixel is inside and in front of the camera where all
a_i / D >= 0, D = p_0.(p_1 x p_2), and u = a_0 / (a_0 + a_1 + a_2). Edge functions are evaluated in double precision
without fused operations, in an order that the torch back-end repeats, so that both agree on every pixel.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numba
import numpy as np
import torch
from torch import Tensor

jit = numba.njit(cache=True, nogil=True, boundscheck=False, error_model="numpy")
inline = numba.njit(cache=True, nogil=True, boundscheck=False, error_model="numpy", inline="always")

BANDS = 16  # tasks per image in the visibility kernel


@cache
def _pool(process: int) -> ThreadPoolExecutor:  # one per process: threads do not survive a fork
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="viewmesh-render")


def launch(kernel, tasks: int, *arguments) -> None:
    """Runs the tasks of a kernel on as many threads as torch may use."""
    threads = min(torch.get_num_threads(), tasks)
    if threads <= 1:
        kernel(0, tasks, 1, *arguments)
        return
    pool = _pool(os.getpid())
    others = [pool.submit(kernel, t, tasks, threads, *arguments) for t in range(1, threads)]
    kernel(0, tasks, threads, *arguments)
    for other in others:
        other.result()


# ---------------------------------------------------------------------------------------------------- rasterize


@inline
def _edges(clip, b, i0, i1, i2, e):
    """e (3, 3) = p1 x p2, p2 x p0, p0 x p1, signed so that D > 0; returns D (0 if degenerate)."""
    x0, y0, w0 = np.float64(clip[b, i0, 0]), np.float64(clip[b, i0, 1]), np.float64(clip[b, i0, 3])
    x1, y1, w1 = np.float64(clip[b, i1, 0]), np.float64(clip[b, i1, 1]), np.float64(clip[b, i1, 3])
    x2, y2, w2 = np.float64(clip[b, i2, 0]), np.float64(clip[b, i2, 1]), np.float64(clip[b, i2, 3])
    e[0, 0], e[0, 1], e[0, 2] = y1 * w2 - w1 * y2, w1 * x2 - x1 * w2, x1 * y2 - y1 * x2
    e[1, 0], e[1, 1], e[1, 2] = y2 * w0 - w2 * y0, w2 * x0 - x2 * w0, x2 * y0 - y2 * x0
    e[2, 0], e[2, 1], e[2, 2] = y0 * w1 - w0 * y1, w0 * x1 - x0 * w1, x0 * y1 - y0 * x1
    D = (x0 * e[0, 0] + y0 * e[0, 1]) + w0 * e[0, 2]
    if D < 0:
        for i in range(3):
            for j in range(3):
                e[i, j] = -e[i, j]
        D = -D
    return D


@jit
def bounds_kernel(first, last, step, clip, faces, height, width, chunk, box):
    """box (B, F, 4) int32: first row, last row, first column, last column; first row > last row if not drawn."""
    F = len(faces)
    for task in range(first, last, step):
        for k in range(task * chunk, min((task + 1) * chunk, len(clip) * F)):
            b, f = k // F, k % F
            r0, r1, c0, c1 = 1e30, -1e30, 1e30, -1e30
            behind = 0
            ok = True
            for c in range(3):
                i = faces[f, c]
                w = np.float64(clip[b, i, 3])
                if w <= 0:
                    behind += 1
                else:
                    col = (np.float64(clip[b, i, 0]) / w * 0.5 + 0.5) * width - 0.5
                    row = (np.float64(clip[b, i, 1]) / w * 0.5 + 0.5) * height - 0.5
                    ok = ok and np.isfinite(row) and np.isfinite(col)
                    r0, r1, c0, c1 = min(r0, row), max(r1, row), min(c0, col), max(c1, col)
            box[b, f, 0], box[b, f, 1] = 1, 0
            if behind == 3 or (not ok and behind == 0):
                continue
            if behind > 0:  # crosses the camera plane: may be anywhere
                box[b, f, 0], box[b, f, 1], box[b, f, 2], box[b, f, 3] = 0, height - 1, 0, width - 1
                continue
            if r1 < 0 or c1 < 0 or r0 > height - 1 or c0 > width - 1:
                continue
            box[b, f, 0] = max(np.ceil(r0 - 1e-6), 0.0)
            box[b, f, 1] = min(np.floor(r1 + 1e-6), height - 1.0)
            box[b, f, 2] = max(np.ceil(c0 - 1e-6), 0.0)
            box[b, f, 3] = min(np.floor(c1 + 1e-6), width - 1.0)


@jit
def rasterize_kernel(first, last, step, clip, faces, box, bands, rast, db):
    """rast (B, H, W, 4) and, unless its size is 0, db (B, H, W, 4), both zero before. A task is one band of rows."""
    H, W = rast.shape[1], rast.shape[2]
    rows = (H + bands - 1) // bands
    e = np.empty((3, 3))
    for task in range(first, last, step):
        b, top = task // bands, (task % bands) * rows
        bottom = min(top + rows, H) - 1
        if top > bottom:
            continue
        depth = np.full((rows, W), np.inf)
        seen = np.full((rows, W), -1, np.int32)
        for f in range(len(faces)):
            r0, r1 = max(box[b, f, 0], top), min(box[b, f, 1], bottom)
            c0, c1 = box[b, f, 2], box[b, f, 3]
            if r0 > r1 or c0 > c1:
                continue
            i0, i1, i2 = faces[f, 0], faces[f, 1], faces[f, 2]
            D = _edges(clip, b, i0, i1, i2, e)
            if not (D > 0):
                continue
            z0, z1, z2 = np.float64(clip[b, i0, 2]), np.float64(clip[b, i1, 2]), np.float64(clip[b, i2, 2])
            e00, e01, e02, e10, e11, e12 = e[0, 0], e[0, 1], e[0, 2], e[1, 0], e[1, 1], e[1, 2]
            e20, e21, e22 = e[2, 0], e[2, 1], e[2, 2]
            own0 = e00 > 0 or (e00 == 0 and e01 > 0)  # who owns a pixel centre that lies on the edge
            own1 = e10 > 0 or (e10 == 0 and e11 > 0)
            own2 = e20 > 0 or (e20 == 0 and e21 > 0)
            for r in range(r0, r1 + 1):
                Y = (2.0 * r + 1.0) / H - 1.0
                for c in range(c0, c1 + 1):
                    X = (2.0 * c + 1.0) / W - 1.0
                    a0 = (e00 * X + e01 * Y) + e02
                    a1 = (e10 * X + e11 * Y) + e12
                    a2 = (e20 * X + e21 * Y) + e22
                    if a0 < 0 or a1 < 0 or a2 < 0:
                        continue
                    if (a0 == 0 and not own0) or (a1 == 0 and not own1) or (a2 == 0 and not own2):
                        continue
                    z = ((a0 * z0 + a1 * z1) + a2 * z2) / D
                    if z >= -1 and z <= 1 and z < depth[r - top, c]:
                        depth[r - top, c] = z
                        seen[r - top, c] = f
        for r in range(top, bottom + 1):
            Y = (2.0 * r + 1.0) / H - 1.0
            for c in range(W):
                f = seen[r - top, c]
                if f < 0:
                    continue
                X = (2.0 * c + 1.0) / W - 1.0
                _edges(clip, b, faces[f, 0], faces[f, 1], faces[f, 2], e)
                a0 = (e[0, 0] * X + e[0, 1] * Y) + e[0, 2]
                a1 = (e[1, 0] * X + e[1, 1] * Y) + e[1, 2]
                a2 = (e[2, 0] * X + e[2, 1] * Y) + e[2, 2]
                s = a0 + a1 + a2
                u, v = a0 / s, a1 / s
                rast[b, r, c, 0], rast[b, r, c, 1], rast[b, r, c, 2] = u, v, depth[r - top, c]
                rast[b, r, c, 3] = f + 1
                if db.size:
                    sx, sy = e[0, 0] + e[1, 0] + e[2, 0], e[0, 1] + e[1, 1] + e[2, 1]
                    db[b, r, c, 0] = (e[0, 0] - u * sx) / s * (2.0 / W)
                    db[b, r, c, 1] = (e[0, 1] - u * sy) / s * (2.0 / H)
                    db[b, r, c, 2] = (e[1, 0] - v * sx) / s * (2.0 / W)
                    db[b, r, c, 3] = (e[1, 1] - v * sy) / s * (2.0 / H)


@jit
def group_by_triangle(rast, F, rows_per_image):
    """Rows of rast (P, 4) sorted by (image, triangle), stable: keys (G,), start (G + 1,), order (covered,)."""
    P = len(rast)
    images = (P + rows_per_image - 1) // rows_per_image
    count = np.zeros(images * F + 1, np.int32)
    for p in range(P):
        f = np.int64(rast[p, 3]) - 1
        if f >= 0:
            count[(p // rows_per_image) * F + f] += 1
    groups, total = 0, 0
    for k in range(images * F):
        groups += count[k] > 0
        total += count[k]
    keys, start, order = np.empty(groups, np.int64), np.empty(groups + 1, np.int64), np.empty(total, np.int64)
    g, at = 0, 0
    for k in range(images * F):
        n = count[k]
        if n > 0:
            keys[g], start[g] = k, at
            count[k] = at  # from here on: where the next row of this key goes
            at += n
            g += 1
    start[groups] = total
    for p in range(P):
        f = np.int64(rast[p, 3]) - 1
        if f >= 0:
            k = (p // rows_per_image) * F + f
            order[count[k]] = p
            count[k] += 1
    return keys, start, order


@jit
def rasterize_backward_kernel(first, last, step, chunk, clip, faces, shape, keys, start, order, g_rast, g_db, corner):
    """corner (G, 3, 3): the gradient of each triangle's corners (x, y, w). g_rast, g_db: (P, 4); g_db may be empty."""
    H, W, F = shape[0], shape[1], len(faces)
    e = np.empty((3, 3))
    ge = np.empty((3, 3))
    p = np.empty((3, 3))
    for task in range(first, last, step):
        for g in range(task * chunk, min((task + 1) * chunk, len(keys))):
            b, f = keys[g] // F, keys[g] % F
            _edges(clip, b, faces[f, 0], faces[f, 1], faces[f, 2], e)
            ge[:] = 0
            for k in range(start[g], start[g + 1]):
                q = order[k]
                r, c = (q % (H * W)) // W, q % W
                X, Y = (2.0 * c + 1.0) / W - 1.0, (2.0 * r + 1.0) / H - 1.0
                a0 = (e[0, 0] * X + e[0, 1] * Y) + e[0, 2]
                a1 = (e[1, 0] * X + e[1, 1] * Y) + e[1, 2]
                a2 = (e[2, 0] * X + e[2, 1] * Y) + e[2, 2]
                s = a0 + a1 + a2
                u, v = a0 / s, a1 / s
                gu, gv = np.float64(g_rast[q, 0]), np.float64(g_rast[q, 1])
                gs = 0.0
                if g_db.size:
                    sx, sy = e[0, 0] + e[1, 0] + e[2, 0], e[0, 1] + e[1, 1] + e[2, 1]
                    ux, uy = g_db[q, 0] * 2.0 / W / s, g_db[q, 1] * 2.0 / H / s
                    vx, vy = g_db[q, 2] * 2.0 / W / s, g_db[q, 3] * 2.0 / H / s
                    gs = -(ux * (e[0, 0] - u * sx) + uy * (e[0, 1] - u * sy)) / s
                    gs -= (vx * (e[1, 0] - v * sx) + vy * (e[1, 1] - v * sy)) / s
                    gu -= ux * sx + uy * sy
                    gv -= vx * sx + vy * sy
                    gsx, gsy = -(ux * u + vx * v), -(uy * u + vy * v)
                    ge[0, 0] += ux + gsx
                    ge[0, 1] += uy + gsy
                    ge[1, 0] += vx + gsx
                    ge[1, 1] += vy + gsy
                    ge[2, 0] += gsx
                    ge[2, 1] += gsy
                gs -= (gu * u + gv * v) / s
                ga0, ga1 = gu / s + gs, gv / s + gs
                ge[0, 0] += ga0 * X
                ge[0, 1] += ga0 * Y
                ge[0, 2] += ga0
                ge[1, 0] += ga1 * X
                ge[1, 1] += ga1 * Y
                ge[1, 2] += ga1
                ge[2, 0] += gs * X
                ge[2, 1] += gs * Y
                ge[2, 2] += gs
            for i in range(3):
                v = faces[f, i]
                p[i, 0], p[i, 1], p[i, 2] = clip[b, v, 0], clip[b, v, 1], clip[b, v, 3]
            # the sign that _edges gave e is the same for all three, and a gradient of e passes through it
            flip = e[0, 0] * (p[1, 1] * p[2, 2] - p[1, 2] * p[2, 1]) + e[0, 1] * (p[1, 2] * p[2, 0] - p[1, 0] * p[2, 2])
            flip += e[0, 2] * (p[1, 0] * p[2, 1] - p[1, 1] * p[2, 0])
            sign = 1.0 if flip >= 0 else -1.0
            for i in range(3):  # e_i = p_j x p_k: g p_j += p_k x g e_i, g p_k += g e_i x p_j
                j, k = (i + 1) % 3, (i + 2) % 3
                for m in range(3):
                    m1, m2 = (m + 1) % 3, (m + 2) % 3
                    corner[g, j, m] += sign * (p[k, m1] * ge[i, m2] - p[k, m2] * ge[i, m1])
                    corner[g, k, m] += sign * (ge[i, m1] * p[j, m2] - ge[i, m2] * p[j, m1])


@jit
def scatter_clip(keys, faces, corner, g_clip):
    """Adds corner gradients (G, 3, 3) of (x, y, w) to g_clip (B, V, 4), in the order of keys."""
    F = len(faces)
    for g in range(len(keys)):
        b, f = keys[g] // F, keys[g] % F
        for i in range(3):
            v = faces[f, i]
            g_clip[b, v, 0] += corner[g, i, 0]
            g_clip[b, v, 1] += corner[g, i, 1]
            g_clip[b, v, 3] += corner[g, i, 2]


# -------------------------------------------------------------------------------------------------- interpolate


@jit
def interpolate_kernel(first, last, step, chunk, attributes, rast, faces, db, out, out_da):
    """rast (P, 4); out (P, C); out_da (P, 2C) or empty. Rows without a triangle are set to 0."""
    C = attributes.shape[1]
    for task in range(first, last, step):
        for p in range(task * chunk, min((task + 1) * chunk, len(rast))):
            f = np.int64(rast[p, 3]) - 1
            if f < 0:
                out[p] = 0
                if out_da.size:
                    out_da[p] = 0
                continue
            i0, i1, i2 = faces[f, 0], faces[f, 1], faces[f, 2]
            u, v = rast[p, 0], rast[p, 1]
            w = 1 - u - v
            for c in range(C):
                out[p, c] = u * attributes[i0, c] + v * attributes[i1, c] + w * attributes[i2, c]
            if out_da.size:
                for c in range(C):
                    du, dv = attributes[i0, c] - attributes[i2, c], attributes[i1, c] - attributes[i2, c]
                    out_da[p, 2 * c] = db[p, 0] * du + db[p, 2] * dv
                    out_da[p, 2 * c + 1] = db[p, 1] * du + db[p, 3] * dv


@jit
def interpolate_backward_kernel(
    first, last, step, chunk, attributes, rast, faces, db, keys, start, order, g_out, g_da, corner, g_rast, g_db
):
    """corner (G, 3, C) float64, g_rast (P, 4), g_db (P, 4) or empty; all zero before. g_da (P, 2C) may be empty."""
    C = attributes.shape[1]
    for task in range(first, last, step):
        for g in range(task * chunk, min((task + 1) * chunk, len(keys))):
            f = keys[g]
            i0, i1, i2 = faces[f, 0], faces[f, 1], faces[f, 2]
            for k in range(start[g], start[g + 1]):
                p = order[k]
                u, v = rast[p, 0], rast[p, 1]
                w = 1 - u - v
                gu, gv = 0.0, 0.0
                for c in range(C):
                    go = g_out[p, c]
                    corner[g, 0, c] += u * go
                    corner[g, 1, c] += v * go
                    corner[g, 2, c] += w * go
                    gu += go * (attributes[i0, c] - attributes[i2, c])
                    gv += go * (attributes[i1, c] - attributes[i2, c])
                g_rast[p, 0], g_rast[p, 1] = gu, gv
                if g_da.size:
                    gux, guy, gvx, gvy = 0.0, 0.0, 0.0, 0.0
                    for c in range(C):
                        gx, gy = g_da[p, 2 * c], g_da[p, 2 * c + 1]
                        du, dv = attributes[i0, c] - attributes[i2, c], attributes[i1, c] - attributes[i2, c]
                        ga, gb = gx * db[p, 0] + gy * db[p, 1], gx * db[p, 2] + gy * db[p, 3]
                        corner[g, 0, c] += ga
                        corner[g, 1, c] += gb
                        corner[g, 2, c] -= ga + gb
                        gux += gx * du
                        guy += gy * du
                        gvx += gx * dv
                        gvy += gy * dv
                    g_db[p, 0], g_db[p, 1], g_db[p, 2], g_db[p, 3] = gux, guy, gvx, gvy


@jit
def scatter_attributes(keys, faces, corner, g_attributes):
    """Adds corner gradients (G, 3, C) to g_attributes (V, C), in the order of keys."""
    for g in range(len(keys)):
        f = keys[g]
        for i in range(3):
            v = faces[f, i]
            for c in range(corner.shape[2]):
                g_attributes[v, c] += corner[g, i, c]


# ------------------------------------------------------------------------------------------------------ texture

WRAP, CLAMP, ZERO = 0, 1, 2


@inline
def _coordinates(uv, p, H, W):
    """uv row p to texel coordinates x, y (a texel's centre is whole) and their scale.

    A row of three is s, t and a face of a cube map whose faces have a border of one texel and lie below each other.
    """
    if uv.shape[1] == 3:
        return uv[p, 0] * (W - 2.0) + 0.5, uv[p, 1] * (W - 2.0) + 0.5 + uv[p, 2] * W, W - 2.0, W - 2.0
    return uv[p, 0] * np.float64(W) - 0.5, uv[p, 1] * np.float64(H) - 0.5, np.float64(W), np.float64(H)


@inline
def _cell(x, n, boundary):
    """Texel coordinate x to (lower index, fraction, slope): slope 0 where x is held fixed."""
    slope = 1.0
    if not (x > -1e9 and x < 1e9):  # not finite, or too far away to have a fraction
        x, slope = 0.0, 0.0
    if boundary == WRAP:
        x = x - np.floor(x / n) * n
        if x >= n:
            x = x - n
    elif boundary == CLAMP:
        if x < 0:
            x, slope = 0.0, 0.0
        elif x > n - 1:
            x, slope = n - 1.0, 0.0
    elif not (x > -2 and x < n + 1):
        x, slope = -2.0, 0.0
    i = np.floor(x)
    return int(i), x - i, slope


@inline
def _tap(i, n, boundary):
    """The texel that index i (from _cell, or one more) names, or -1."""
    if i >= 0 and i < n:
        return i
    if boundary == WRAP:
        return 0
    if boundary == CLAMP:
        return n - 1
    return -1


@inline
def _share(levels, p, level):
    """The share of a mip level in a row, and its slope in the row's level. No levels: 1."""
    if levels.size == 0:
        return 1.0, 0.0
    d = np.float64(levels[p]) - level
    if d <= -1 or d >= 1:
        return 0.0, 0.0
    return (1.0 - d, -1.0) if d >= 0 else (1.0 + d, 1.0)


@jit
def texture_kernel(first, last, step, chunk, texture, uv, boundary, levels, level, out):
    """Adds one mip level's share. texture (H, W, C), uv (P, 2 or 3), levels (P,) or empty, out (P, C)."""
    H, W, C = texture.shape
    for task in range(first, last, step):
        for p in range(task * chunk, min((task + 1) * chunk, len(uv))):
            share, _ = _share(levels, p, level)
            if share == 0:
                continue
            x, y, _, _ = _coordinates(uv, p, H, W)
            x0, fx, _ = _cell(x, W, boundary)
            y0, fy, _ = _cell(y, H, boundary)
            for dy in range(2):
                iy = _tap(y0 + dy, H, boundary)
                wy = (fy if dy else 1 - fy) * share
                for dx in range(2):
                    ix = _tap(x0 + dx, W, boundary)
                    w = (fx if dx else 1 - fx) * wy
                    if ix >= 0 and iy >= 0 and w != 0:
                        for c in range(C):
                            out[p, c] += w * texture[iy, ix, c]


@jit
def texture_backward_uv_kernel(first, last, step, chunk, texture, uv, boundary, levels, level, g_out, g_uv, g_levels):
    """Adds to g_uv (P, 2 or 3) and, unless it is empty, g_levels (P,)."""
    H, W, C = texture.shape
    for task in range(first, last, step):
        for p in range(task * chunk, min((task + 1) * chunk, len(uv))):
            share, slope = _share(levels, p, level)
            if share == 0 and slope == 0:
                continue
            x, y, scale_x, scale_y = _coordinates(uv, p, H, W)
            x0, fx, sx = _cell(x, W, boundary)
            y0, fy, sy = _cell(y, H, boundary)
            gx, gy, gl = 0.0, 0.0, 0.0
            for dy in range(2):
                iy = _tap(y0 + dy, H, boundary)
                wy = fy if dy else 1 - fy
                for dx in range(2):
                    ix = _tap(x0 + dx, W, boundary)
                    wx = fx if dx else 1 - fx
                    if ix >= 0 and iy >= 0:
                        dot = 0.0
                        for c in range(C):
                            dot += g_out[p, c] * texture[iy, ix, c]
                        gl += dot * wx * wy
                        gx += dot * wy if dx else -dot * wy
                        gy += dot * wx if dy else -dot * wx
            g_uv[p, 0] += gx * sx * share * scale_x
            g_uv[p, 1] += gy * sy * share * scale_y
            if g_levels.size:
                g_levels[p] += gl * slope


@jit
def group_by_row(uv, H, W, boundary, levels, level):
    """Rows of uv with a share in this level, by lower texel row: start (H + 2,) and order; bin k is texel row k - 1."""
    start = np.zeros(H + 2, np.int64)
    bins = np.full(len(uv), -1, np.int32)
    for p in range(len(uv)):
        share, _ = _share(levels, p, level)
        if share != 0:
            _, y, _, _ = _coordinates(uv, p, H, W)
            y0, _, _ = _cell(y, H, boundary)
            if y0 >= -1 and y0 < H:
                bins[p] = y0 + 1
                start[y0 + 2] += 1
    for k in range(H + 1):
        start[k + 1] += start[k]
    at = start.copy()
    order = np.empty(start[H + 1], np.int64)
    for p in range(len(uv)):
        if bins[p] >= 0:
            order[at[bins[p]]] = p
            at[bins[p]] += 1
    return start, order


@jit
def texture_backward_kernel(first, last, step, uv, boundary, levels, level, start, order, g_out, g_texture):
    """g_texture (H, W, C), zero before: a task is one row of texels, which gathers what samples it."""
    H, W, C = g_texture.shape
    for row in range(first, last, step):
        for dy in range(2):  # clamped rows at the bottom have no fraction, so no second tap to gather
            low = row - dy if row > 0 or dy == 0 or boundary != WRAP else H - 1
            for k in range(start[low + 1], start[low + 2]):
                p = order[k]
                share, _ = _share(levels, p, level)
                x, y, _, _ = _coordinates(uv, p, H, W)
                x0, fx, _ = _cell(x, W, boundary)
                _, fy, _ = _cell(y, H, boundary)
                wy = (fy if dy else 1 - fy) * share
                for dx in range(2):
                    ix = _tap(x0 + dx, W, boundary)
                    w = (fx if dx else 1 - fx) * wy
                    if ix >= 0 and w != 0:
                        for c in range(C):
                            g_texture[row, ix, c] += w * g_out[p, c]


@jit
def cube_coordinates_kernel(first, last, step, chunk, direction, out):
    """out (P, 3): s, t in [0, 1] and the face of each direction (P, 3), in OpenGL's layout."""
    for task in range(first, last, step):
        for p in range(task * chunk, min((task + 1) * chunk, len(direction))):
            x, y, z = direction[p, 0], direction[p, 1], direction[p, 2]
            ax, ay, az = abs(x), abs(y), abs(z)
            if ax >= ay and ax >= az:
                face, m, sc, tc = (0, ax, -z, -y) if x >= 0 else (1, ax, z, -y)
            elif ay >= az:
                face, m, sc, tc = (2, ay, x, z) if y >= 0 else (3, ay, x, -z)
            else:
                face, m, sc, tc = (4, az, x, -y) if z >= 0 else (5, az, -x, -y)
            out[p, 2] = face
            if m > 0:
                out[p, 0], out[p, 1] = 0.5 * sc / m + 0.5, 0.5 * tc / m + 0.5
            else:
                out[p, 0], out[p, 1] = 0.5, 0.5


@jit
def cube_coordinates_backward_kernel(first, last, step, chunk, direction, g_out, g):
    """g (P, 3), zero before: the gradient of the directions."""
    for task in range(first, last, step):
        for p in range(task * chunk, min((task + 1) * chunk, len(direction))):
            x, y, z = direction[p, 0], direction[p, 1], direction[p, 2]
            ax, ay, az = abs(x), abs(y), abs(z)
            if ax >= ay and ax >= az:
                major, s_axis, t_axis, ss, ts = 0, 2, 1, -1.0 if x >= 0 else 1.0, -1.0
            elif ay >= az:
                major, s_axis, t_axis, ss, ts = 1, 0, 2, 1.0, 1.0 if y >= 0 else -1.0
            else:
                major, s_axis, t_axis, ss, ts = 2, 0, 1, 1.0 if z >= 0 else -1.0, -1.0
            m = abs(direction[p, major])
            if m > 0:
                gs, gt = 0.5 * g_out[p, 0] * ss / m, 0.5 * g_out[p, 1] * ts / m
                g[p, s_axis], g[p, t_axis] = gs, gt
                g[p, major] = -(gs * direction[p, s_axis] + gt * direction[p, t_axis]) / direction[p, major]


# ---------------------------------------------------------------------------------------------------- antialias


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
