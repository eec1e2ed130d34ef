"""Bilinear look-up of one mip level, forward and backward, as compiled loops; cube maps by way of `cubemap.padded`."""

import numpy as np

from viewmesh.render.kernels_numba import inline, jit

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
