"""The back-end in plain torch, for any device: no compiled code, gradients by autograd.

Visibility expands every triangle's bounding box into candidate pixels, in chunks of bounded memory, and keeps the
nearest by two passes of scatter-min. Same double-precision edge functions, in the same order of operations, as
`loops_raster`: see there for the geometry.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from viewmesh.render.cubemap import face_coordinates, padded
from viewmesh.render.mipmap import footprint_level, mip_chain, nearest
from viewmesh.render.rasterizer import MAX_FACES, Boundary, Filter, Raster, Topology

CANDIDATES = {"cpu": 2**20, "cuda": 2**24}  # pixels tested at once: about 150 bytes each


class TorchRasterizer:
    """Rasterizer on any device, float32 or float64."""

    name = "torch"

    def rasterize(self, clip: Tensor, faces: Tensor, height: int, width: int, *, derivatives: bool = False) -> Raster:
        if len(faces) > MAX_FACES:
            raise ValueError(f"A raster holds at most {MAX_FACES} triangles, got {len(faces)}.")
        faces = faces.long()
        B, V = clip.shape[:2]
        with torch.no_grad():
            seen, depth = _visibility(clip.detach(), faces, height, width)  # (B * H * W,)
            pixels = torch.nonzero(seen >= 0).squeeze(1)  # (P,)
            face = seen[pixels]
            b, row, col = pixels // (height * width), pixels // width % height, pixels % width
            X, Y = _ndc(col, width), _ndc(row, height)
        corners = clip.double().reshape(B * V, 4).index_select(0, (b[:, None] * V + faces[face]).reshape(-1))
        e, _ = _edges(corners.reshape(-1, 3, 4)[..., [0, 1, 3]])  # (P, 3, 3)
        a = e[..., 0] * X[:, None] + e[..., 1] * Y[:, None] + e[..., 2]  # (P, 3)
        s = a.sum(-1, keepdim=True)
        uv = a[:, :2] / s
        values = torch.cat([uv, depth[pixels, None], (face + 1)[:, None]], -1).to(clip.dtype)
        rast = values.new_zeros(B * height * width, 4).index_copy(0, pixels, values).reshape(B, height, width, 4)
        if not derivatives:
            return Raster(rast, None)
        scale = torch.tensor([2.0 / width, 2.0 / height], dtype=torch.float64, device=clip.device)
        db = (e[:, :2, :2] - uv[..., None] * e[..., :2].sum(1, keepdim=True)) / s[..., None] * scale  # (P, 2, 2)
        db = db.flatten(1).to(clip.dtype)
        return Raster(rast, db.new_zeros(B * height * width, 4).index_copy(0, pixels, db).reshape_as(rast))

    def interpolate(
        self, attributes: Tensor, rast: Tensor, faces: Tensor, *, rast_db: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        shape, C = rast.shape[:-1], attributes.shape[-1]
        flat = rast.reshape(-1, 4)
        covered = flat[:, 3:] > 0
        if len(faces) == 0:
            zero = attributes.new_zeros(*shape, C)
            return zero, None if rast_db is None else flat.new_zeros(*shape, 2 * C)
        corners = faces.long()[(flat[:, 3].long() - 1).clamp_min(0)].reshape(-1)
        a = attributes.index_select(0, corners).reshape(-1, 3, C)
        u, v = flat[:, :1], flat[:, 1:2]
        out = torch.where(covered, u * a[:, 0] + v * a[:, 1] + (1 - u - v) * a[:, 2], 0.0).reshape(*shape, C)
        if rast_db is None:
            return out, None
        db = rast_db.reshape(-1, 4, 1)
        du, dv = a[:, 0] - a[:, 2], a[:, 1] - a[:, 2]
        da = torch.stack([db[:, 0] * du + db[:, 2] * dv, db[:, 1] * du + db[:, 3] * dv], -1).flatten(1)
        return out, torch.where(covered, da, 0.0).reshape(*shape, 2 * C)

    def texture(
        self,
        texture: Tensor,
        uv: Tensor,
        *,
        uv_da: Tensor | None = None,
        boundary: Boundary = "wrap",
        filter: Filter = "linear",
        mips: Sequence[Tensor] | None = None,
        level: Tensor | None = None,
    ) -> Tensor:
        if filter == "nearest":
            return nearest(texture, uv, boundary)
        if filter == "linear":
            return _bilinear(texture, uv, boundary)
        chain = [texture, *mip_chain(texture, mips)]
        at = footprint_level(texture, uv_da, level, len(chain)).expand(uv.shape[:-1])
        out = torch.zeros((), dtype=texture.dtype, device=texture.device)
        for n, m in enumerate(chain):
            share = (1 - (at - n).abs()).clamp_min(0)
            out = out + share[..., None] * _bilinear(m, uv, boundary)
        return out

    def antialias(
        self, color: Tensor, rast: Tensor, clip: Tensor, faces: Tensor, topology: Topology | None = None
    ) -> Tensor:
        faces = faces.long()
        opposite = (topology or Topology(faces)).opposite
        C, shape = color.shape[-1], color.shape
        near, far, ends, horizontal, way = _crossings(rast.detach(), clip.detach(), faces, opposite)
        H, W = shape[1:3]
        flat = color.reshape(-1, C)
        offset = _crossing(clip, near, ends, horizontal, H, W)
        share = (way * offset - 0.5).to(color.dtype)[:, None]
        change = share * (flat.index_select(0, near) - flat.index_select(0, far))
        to = torch.where(share[:, 0] > 0, far, near)
        return flat.index_add(0, to, change).reshape(shape)


# ---------------------------------------------------------------------------------------------------- visibility


def _ndc(index: Tensor, size: int) -> Tensor:
    return (2.0 * index.double() + 1.0) / size - 1.0


def _edges(p: Tensor) -> tuple[Tensor, Tensor]:
    """p (..., 3, 3) = (x, y, w) of corners to e (..., 3, 3), signed so that D (...,) >= 0, and D. Double precision."""
    q, r = p.roll(-1, -2), p.roll(-2, -2)  # the next corner, the one after
    ex = q[..., 1] * r[..., 2] - q[..., 2] * r[..., 1]
    ey = q[..., 2] * r[..., 0] - q[..., 0] * r[..., 2]
    ew = q[..., 0] * r[..., 1] - q[..., 1] * r[..., 0]
    D = (p[..., 0, 0] * ex[..., 0] + p[..., 0, 1] * ey[..., 0]) + p[..., 0, 2] * ew[..., 0]
    sign = torch.where(D < 0, -1.0, 1.0).to(p)
    return torch.stack([ex, ey, ew], -1) * sign[..., None, None], D * sign


def _visibility(clip: Tensor, faces: Tensor, H: int, W: int) -> tuple[Tensor, Tensor]:
    """The triangle each pixel sees (-1: none) and its z/w, both (B * H * W,)."""
    B, F, device = len(clip), len(faces), clip.device
    depth = torch.full((B * H * W,), torch.inf, dtype=torch.float64, device=device)
    seen = torch.full((B * H * W,), F, dtype=torch.int64, device=device)
    for b in range(B):
        p = clip[b].double()[faces]  # (F, 3, 4)
        e, D = _edges(p[..., [0, 1, 3]])
        r0, c0, rows, cols = _boxes(p, H, W)
        keep = torch.nonzero((D > 0) & (rows > 0) & (cols > 0)).squeeze(1)
        area = rows[keep] * cols[keep]
        total = torch.cumsum(area, 0)
        # faces in chunks of a bounded number of candidates; a face alone never exceeds the image
        budget = max(CANDIDATES.get(device.type, 2**22), H * W)
        chunk = torch.div(total - area, budget, rounding_mode="floor")
        for part in torch.split(keep, torch.unique_consecutive(chunk, return_counts=True)[1].tolist()):
            n = rows[part] * cols[part]
            face = torch.repeat_interleave(part, n)
            k = torch.arange(len(face), device=device) - torch.repeat_interleave(torch.cumsum(n, 0) - n, n)
            row, col = r0[face] + k // cols[face], c0[face] + k % cols[face]
            X, Y = _ndc(col, W), _ndc(row, H)
            ef = e[face]
            inside = torch.ones_like(face, dtype=torch.bool)
            a = []
            for i in range(3):
                ai = (ef[:, i, 0] * X + ef[:, i, 1] * Y) + ef[:, i, 2]
                own = (ef[:, i, 0] > 0) | ((ef[:, i, 0] == 0) & (ef[:, i, 1] > 0))
                inside &= (ai > 0) | ((ai == 0) & own)
                a.append(ai)
            zc = p[face, :, 2]
            z = ((a[0] * zc[:, 0] + a[1] * zc[:, 1]) + a[2] * zc[:, 2]) / D[face]
            inside &= (z >= -1) & (z <= 1)
            pixel, face, z = ((b * H + row) * W + col)[inside], face[inside], z[inside]
            before = depth.clone()
            depth.scatter_reduce_(0, pixel, z, "amin")
            seen = torch.where(depth < before, F, seen)  # a nearer one will take the place
            # at equal depth an earlier chunk has the lower index, and amin keeps it
            seen.scatter_reduce_(0, pixel, torch.where(z == depth[pixel], face, F), "amin")
    return torch.where(seen < F, seen, -1), depth


def _boxes(p: Tensor, H: int, W: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First row, first column, rows and columns (F,) of the pixels that triangles p (F, 3, 4) may cover."""
    w = p[..., 3]
    front = w > 0
    safe = torch.where(front, w, 1.0)
    limits = []
    for axis, size in ((1, H), (0, W)):
        x = (p[..., axis] / safe * 0.5 + 0.5) * size - 0.5
        low = torch.ceil(torch.where(front, x, torch.inf).amin(-1) - 1e-6)
        high = torch.floor(torch.where(front, x, -torch.inf).amax(-1) + 1e-6)
        crossing = front.any(-1) & ~front.all(-1)
        low = torch.where(crossing, 0.0, low).nan_to_num(size).clamp(0, size)
        high = torch.where(crossing, size - 1.0, high).nan_to_num(-1).clamp(-1, size - 1)
        limits.append((low.long(), (high - low + 1).clamp_min(0).long()))
    (r0, rows), (c0, cols) = limits
    return r0, c0, rows, cols


# ------------------------------------------------------------------------------------------------------- texture


def _bilinear(texture: Tensor, uv: Tensor, boundary: Boundary) -> Tensor:
    shape, C = uv.shape[:-1], texture.shape[-1]
    if boundary == "cube":
        st, face = face_coordinates(uv.reshape(-1, 3))
        R = texture.shape[1]
        texture = padded(texture).flatten(0, 1)
        x, y = st[:, 0] * R + 0.5, st[:, 1] * R + 0.5 + face * (R + 2)
        H, W = texture.shape[:2]
    else:
        H, W = texture.shape[:2]
        x, y = uv.reshape(-1, 2)[:, 0] * W - 0.5, uv.reshape(-1, 2)[:, 1] * H - 0.5
    x, y = (torch.where(t.abs() < 1e9, t, 0.0) for t in (x, y))
    if boundary == "clamp":
        x, y = x.clamp(0, W - 1), y.clamp(0, H - 1)
    x0, y0 = torch.floor(x.detach()), torch.floor(y.detach())
    fx, fy = x - x0, y - y0
    x0, y0 = x0.long(), y0.long()
    flat = texture.reshape(-1, C)
    out = torch.zeros((), dtype=texture.dtype, device=texture.device)
    for dy in range(2):
        for dx in range(2):
            ix, iy = x0 + dx, y0 + dy
            weight = (fx if dx else 1 - fx) * (fy if dy else 1 - fy)
            if boundary == "wrap":
                ix, iy = ix % W, iy % H
            elif boundary == "clamp":
                ix, iy = ix.clamp(0, W - 1), iy.clamp(0, H - 1)
            else:
                inside = (ix >= 0) & (ix < W) & (iy >= 0) & (iy < H)
                weight = torch.where(inside, weight, 0.0)
                ix, iy = ix.clamp(0, W - 1), iy.clamp(0, H - 1)
            out = out + weight[:, None] * flat.index_select(0, iy * W + ix)
    return out.reshape(*shape, C)


# ----------------------------------------------------------------------------------------------------- antialias


def opposite_vertices(faces: Tensor) -> Tensor:
    """See Topology.opposite."""
    faces = faces.long()
    if len(faces) == 0:
        return faces.reshape(0, 3)
    a, b, own = faces.roll(-1, 1).reshape(-1), faces.roll(-2, 1).reshape(-1), faces.reshape(-1)
    key = torch.minimum(a, b) * (faces.max() + 1) + torch.maximum(a, b)
    key, order = torch.sort(key)
    same = torch.zeros(len(key) + 3, dtype=torch.bool, device=faces.device)  # same[n + 2]: entry n equals entry n + 1
    same[2:-2] = key[1:] == key[:-1]
    n = torch.arange(len(key), device=faces.device)
    with_next = same[n + 2] & ~same[n + 1] & ~same[n + 3]
    with_last = same[n + 1] & ~same[n + 2] & ~same[n]
    sorted_own = own[order]
    mate = torch.where(with_next, sorted_own.roll(-1), torch.where(with_last, sorted_own.roll(1), -1))
    return torch.empty_like(mate).index_copy(0, order, mate).reshape(-1, 3)


def _screen(p: Tensor, H: int, W: int) -> Tensor:
    """Clip positions (..., 4) to pixels (x, y), double precision; meaningless where w <= 0."""
    p = p.double()
    w = p[..., 3:]
    size = torch.tensor([W, H], dtype=torch.float64, device=p.device)
    return (p[..., :2] / torch.where(w > 0, w, 1.0) * 0.5 + 0.5) * size


def _crossings(rast: Tensor, clip: Tensor, faces: Tensor, opposite: Tensor) -> tuple[Tensor, ...]:
    """Every crossing: near and far pixel (flat), the edge's two vertices (flat over B * V), direction and way."""
    B, H, W = rast.shape[:3]
    V = clip.shape[1]
    pixel = torch.arange(B * H * W, device=rast.device).reshape(B, H, W)
    pairs = [(pixel[:, :, :-1], pixel[:, :, 1:]), (pixel[:, :-1], pixel[:, 1:])]
    first = torch.cat([p.reshape(-1) for p, _ in pairs])
    second = torch.cat([q.reshape(-1) for _, q in pairs])
    horizontal = torch.arange(len(first), device=rast.device) < pairs[0][0].numel()
    ids, z = rast[..., 3].reshape(-1), rast[..., 2].reshape(-1)
    differ = torch.nonzero(ids[first] != ids[second]).squeeze(1)
    first, second, horizontal = first[differ], second[differ], horizontal[differ]
    swap = (ids[first] == 0) | ((ids[second] > 0) & (z[second] < z[first]))
    near, far = torch.where(swap, second, first), torch.where(swap, first, second)
    way = torch.where(swap, -1.0, 1.0).double()
    face, base = ids[near].long() - 1, near // (H * W) * V
    corners, other = faces[face], opposite[face]  # (Q, 3)
    flat = clip.reshape(-1, 4)
    taken = torch.zeros_like(swap)
    ends = torch.zeros(len(near), 2, dtype=torch.int64, device=rast.device)
    for k in range(3):
        i, j, own, mate = corners[:, (k + 1) % 3], corners[:, (k + 2) % 3], corners[:, k], other[:, k]
        at = torch.stack([i, j, own, mate.clamp_min(0)], -1) + base[:, None]
        p = flat[at]  # (Q, 4, 4)
        xy, front = _screen(p, H, W), p[..., 3] > 0
        ab, ac, ad = xy[:, 1] - xy[:, 0], xy[:, 2] - xy[:, 0], xy[:, 3] - xy[:, 0]
        c_side, d_side = ab[:, 0] * ac[:, 1] - ab[:, 1] * ac[:, 0], ab[:, 0] * ad[:, 1] - ab[:, 1] * ad[:, 0]
        fold = front[:, 2] & front[:, 3] & ((c_side > 0) == (d_side > 0))
        silhouette = front[:, 0] & front[:, 1] & ((mate < 0) | fold)
        offset = way * _crossing(clip, near, at[:, :2], horizontal, H, W)
        belongs = _belongs(clip, near, at[:, :2], horizontal, H, W)
        hit = silhouette & belongs & (offset >= 0) & (offset <= 1) & ~taken
        ends = torch.where(hit[:, None], at[:, :2], ends)
        taken |= hit
    hit = torch.nonzero(taken).squeeze(1)
    return near[hit], far[hit], ends[hit], horizontal[hit], way[hit]


def _relative(clip: Tensor, near: Tensor, ends: Tensor, horizontal: Tensor, H: int, W: int) -> Tensor:
    """The edge's ends (Q, 2, 2) relative to the near pixel's centre, as (along the pair, across it)."""
    xy = _screen(clip.reshape(-1, 4).index_select(0, ends.reshape(-1)).reshape(-1, 2, 4), H, W)
    centre = torch.stack([near % W, near // W % H], -1).double() + 0.5
    xy = xy - centre[:, None]
    return torch.where(horizontal[:, None, None], xy, xy.flip(-1))


def _belongs(clip: Tensor, near: Tensor, ends: Tensor, horizontal: Tensor, H: int, W: int) -> Tensor:
    """Whether the edge crosses the line of the pair and is steeper across it than along it."""
    xy = _relative(clip, near, ends, horizontal, H, W)
    along, across = (xy[:, 1] - xy[:, 0]).abs().unbind(-1)
    steeper = torch.where(horizontal, across >= along, across > along)
    return steeper & ((xy[:, 0, 1] > 0) != (xy[:, 1, 1] > 0))


def _crossing(clip: Tensor, near: Tensor, ends: Tensor, horizontal: Tensor, H: int, W: int) -> Tensor:
    """Signed distance from the near pixel's centre to the edge, along the pair."""
    a, b = _relative(clip, near, ends, horizontal, H, W).unbind(1)
    rise = b[:, 1] - a[:, 1]
    safe = torch.where(rise == 0, 1.0, rise)
    return a[:, 0] - a[:, 1] * (b[:, 0] - a[:, 0]) / safe
