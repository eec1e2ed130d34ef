"""Visibility, barycentrics and interpolation, forward and backward, as compiled loops over covered pixels.

Geometry is homogeneous (Olano and Greer 1997): with p_i = (x, y, w) of a corner and P = (X, Y, 1) of a pixel in
normalised device coordinates, a_0 = (p_1 x p_2).P and so on; the pixel is inside and in front of the camera where all
a_i / D >= 0, D = p_0.(p_1 x p_2), and u = a_0 / (a_0 + a_1 + a_2). Edge functions are evaluated in double precision
without fused operations, in an order that the torch back-end repeats, so that both agree on every pixel.
"""

import numpy as np

from viewmesh.render.kernels_numba import inline, jit

BANDS = 16  # tasks per image in the visibility kernel


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
