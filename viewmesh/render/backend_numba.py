"""The CPU back-end: autograd functions around the compiled loops. Bit-exact for any number of threads."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from viewmesh.render import loops_antialias, loops_raster, loops_texture
from viewmesh.render.cubemap import padded
from viewmesh.render.kernels_numba import launch
from viewmesh.render.mipmap import footprint_level, mip_chain, nearest
from viewmesh.render.rasterizer import MAX_FACES, Boundary, Filter, Raster, Topology

CHUNK = 512  # rows or triangles per task
_BOUNDARY = {
    "wrap": loops_texture.WRAP,
    "clamp": loops_texture.CLAMP,
    "zero": loops_texture.ZERO,
    "cube": loops_texture.ZERO,
}


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _faces(faces: Tensor) -> np.ndarray:
    return _array(faces.to(torch.int64))  # one type, so that the loops are compiled once


def _tasks(n: int) -> int:
    return (n + CHUNK - 1) // CHUNK


def _none(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype)


class NumbaRasterizer:
    """Rasterizer on the CPU, float32 or float64."""

    name = "numba"

    def rasterize(self, clip: Tensor, faces: Tensor, height: int, width: int, *, derivatives: bool = False) -> Raster:
        if len(faces) > MAX_FACES:
            raise ValueError(f"A raster holds at most {MAX_FACES} triangles, got {len(faces)}.")
        rast, db = _Rasterize.apply(clip, faces, height, width, derivatives)
        return Raster(rast, db if derivatives else None)

    def interpolate(
        self, attributes: Tensor, rast: Tensor, faces: Tensor, *, rast_db: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        dtype = torch.promote_types(attributes.dtype, rast.dtype)
        shape = rast.shape[:-1]
        db = _none(dtype, 0, 4) if rast_db is None else rast_db.to(dtype).reshape(-1, 4)
        out, da = _Interpolate.apply(attributes.to(dtype), rast.to(dtype).reshape(-1, 4), faces, db)
        C = attributes.shape[1]
        return out.reshape(*shape, C), None if rast_db is None else da.reshape(*shape, 2 * C)

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
        dtype = torch.promote_types(texture.dtype, uv.dtype)
        shape = uv.shape[:-1]
        chain = [texture, *mip_chain(texture, mips)] if filter == "trilinear" else [texture]
        levels = _none(dtype, 0)
        if filter == "trilinear":
            levels = footprint_level(texture, uv_da, level, len(chain)).to(dtype).expand(shape).reshape(-1)
        flat = uv.to(dtype).reshape(-1, uv.shape[-1])
        if boundary == "cube":
            flat = _CubeCoordinates.apply(flat)
            chain = [padded(m).flatten(0, 1) for m in chain]
        out = _Texture.apply(flat, levels, _BOUNDARY[boundary], *(m.to(dtype) for m in chain))
        return out.reshape(*shape, texture.shape[-1])

    def antialias(
        self, color: Tensor, rast: Tensor, clip: Tensor, faces: Tensor, topology: Topology | None = None
    ) -> Tensor:
        around = topology or Topology(faces)
        return _Antialias.apply(color, rast.detach(), clip, faces, around.opposite)


class _Rasterize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, clip: Tensor, faces: Tensor, height: int, width: int, derivatives: bool):
        c, f = _array(clip), _faces(faces)
        box = np.empty((len(c), len(f), 4), np.int32)
        launch(loops_raster.bounds_kernel, _tasks(len(c) * len(f)), c, f, height, width, CHUNK, box)
        rast = torch.zeros(len(c), height, width, 4, dtype=clip.dtype)
        db = torch.zeros_like(rast) if derivatives else _none(clip.dtype, 0, 0, 0, 0)
        bands = min(loops_raster.BANDS, height)
        launch(loops_raster.rasterize_kernel, len(c) * bands, c, f, box, bands, rast.numpy(), db.numpy())
        ctx.save_for_backward(clip, faces, rast)
        ctx.set_materialize_grads(False)
        return rast, db

    @staticmethod
    @once_differentiable
    def backward(ctx, g_rast: Tensor | None, g_db: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        clip, faces, rast = ctx.saved_tensors
        if g_rast is None and (g_db is None or g_db.numel() == 0):
            return None, None, None, None, None
        c, f, r = _array(clip), _faces(faces), _array(rast).reshape(-1, 4)
        H, W = rast.shape[1:3]
        keys, start, order = loops_raster.group_by_triangle(r, len(f), H * W)
        corner = np.zeros((len(keys), 3, 3))
        gr = _array(torch.zeros_like(rast) if g_rast is None else g_rast).reshape(-1, 4)
        gd = _array(_none(clip.dtype, 0) if g_db is None else g_db).reshape(-1, 4)
        launch(
            loops_raster.rasterize_backward_kernel,
            _tasks(len(keys)), CHUNK, c, f, np.array([H, W]), keys, start, order,
            gr, gd, corner,
        )  # fmt: skip
        g_clip = np.zeros(c.shape)
        loops_raster.scatter_clip(keys, f, corner, g_clip)
        return torch.from_numpy(g_clip).to(clip.dtype), None, None, None, None


class _Interpolate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attributes: Tensor, rast: Tensor, faces: Tensor, db: Tensor):
        P, C = len(rast), attributes.shape[1]
        out = torch.empty(P, C, dtype=rast.dtype)
        da = torch.empty(P if len(db) else 0, 2 * C, dtype=rast.dtype)
        launch(
            loops_raster.interpolate_kernel,
            _tasks(P), CHUNK, _array(attributes), _array(rast), _faces(faces), _array(db),
            out.numpy(), da.numpy(),
        )  # fmt: skip
        ctx.save_for_backward(attributes, rast, faces, db)
        ctx.set_materialize_grads(False)
        return out, da

    @staticmethod
    @once_differentiable
    def backward(ctx, g_out: Tensor | None, g_da: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        attributes, rast, faces, db = ctx.saved_tensors
        a, r, f = _array(attributes), _array(rast), _faces(faces)
        g = _array(torch.zeros(len(r), a.shape[1], dtype=rast.dtype) if g_out is None else g_out)
        gda = _array(_none(rast.dtype, 0, 2 * a.shape[1]) if g_da is None else g_da)
        keys, start, order = loops_raster.group_by_triangle(r, len(f), max(len(r), 1))
        corner = np.zeros((len(keys), 3, a.shape[1]))
        g_rast, g_db = torch.zeros_like(rast), torch.zeros_like(db)
        launch(
            loops_raster.interpolate_backward_kernel,
            _tasks(len(keys)), CHUNK, a, r, f, _array(db), keys, start, order, g,
            gda, corner, g_rast.numpy(), g_db.numpy(),
        )  # fmt: skip
        g_attributes = np.zeros(a.shape)
        loops_raster.scatter_attributes(keys, f, corner, g_attributes)
        return torch.from_numpy(g_attributes).to(attributes.dtype), g_rast, None, g_db


class _CubeCoordinates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, direction: Tensor):
        out = torch.empty(direction.shape, dtype=direction.dtype)
        launch(loops_texture.cube_coordinates_kernel, _tasks(len(out)), CHUNK, _array(direction), out.numpy())
        ctx.save_for_backward(direction)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g_out: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (direction,) = ctx.saved_tensors
        g = torch.zeros(direction.shape, dtype=direction.dtype)
        launch(
            loops_texture.cube_coordinates_backward_kernel,
            _tasks(len(g)),
            CHUNK,
            _array(direction),
            _array(g_out),
            g.numpy(),
        )
        return g


class _Texture(torch.autograd.Function):
    @staticmethod
    def forward(ctx, uv: Tensor, levels: Tensor, boundary: int, *chain: Tensor):
        out = torch.zeros(len(uv), chain[0].shape[-1], dtype=uv.dtype)
        u, lv = _array(uv), _array(levels)
        for n, m in enumerate(chain):
            launch(loops_texture.texture_kernel, _tasks(len(u)), CHUNK, _array(m), u, boundary, lv, n, out.numpy())
        ctx.save_for_backward(uv, levels, *chain)
        ctx.boundary = boundary
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g_out: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        uv, levels, *chain = ctx.saved_tensors
        u, lv, g = _array(uv), _array(levels), _array(g_out)
        g_uv, g_levels = torch.zeros(uv.shape, dtype=uv.dtype), torch.zeros(levels.shape, dtype=uv.dtype)
        g_chain: list[Tensor | None] = []
        for n, m in enumerate(chain):
            if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
                launch(
                    loops_texture.texture_backward_uv_kernel,
                    _tasks(len(u)), CHUNK, _array(m), u, ctx.boundary, lv, n, g,
                    g_uv.numpy(), g_levels.numpy(),
                )  # fmt: skip
            if not ctx.needs_input_grad[3 + n]:
                g_chain.append(None)
                continue
            g_texture = torch.zeros(m.shape, dtype=m.dtype)
            start, order = loops_texture.group_by_row(u, m.shape[0], m.shape[1], ctx.boundary, lv, n)
            launch(
                loops_texture.texture_backward_kernel,
                len(m),
                u,
                ctx.boundary,
                lv,
                n,
                start,
                order,
                g,
                g_texture.numpy(),
            )
            g_chain.append(g_texture)
        return g_uv, g_levels, None, *g_chain


class _Antialias(torch.autograd.Function):
    @staticmethod
    def forward(ctx, color: Tensor, rast: Tensor, clip: Tensor, faces: Tensor, opposite: Tensor):
        col, r, c, f, o = _array(color), _array(rast), _array(clip), _faces(faces), _array(opposite)
        B, H, W = r.shape[:3]
        flags = np.zeros((B, len(f)), np.uint8)
        launch(loops_antialias.silhouette_kernel, _tasks(B * len(f)), CHUNK, c, f, o, H, W, flags)
        code, count = np.zeros((B, H, W, 2), np.int8), np.zeros(B * H, np.int64)
        launch(loops_antialias.find_crossings_kernel, B * H, r, c, f, flags, code, count)
        start = np.concatenate([[0], np.cumsum(count)])
        n = int(start[-1])
        ends, index, pair = np.empty((n, 2), np.int64), np.empty((n, 2), np.int8), np.empty((n, 2), np.int64)
        share = np.empty(n)
        launch(loops_antialias.list_crossings_kernel, B * H, r, c, f, code, start, ends, index, pair, share)
        out = color.detach().clone(memory_format=torch.contiguous_format)
        C = color.shape[-1]
        loops_antialias.blend(col.reshape(-1, C), pair, share, out.numpy().reshape(-1, C))
        ctx.save_for_backward(color, clip)
        ctx.crossings = (pair, share, ends, index, H, W)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g_out: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        color, clip = ctx.saved_tensors
        pair, share, ends, index, H, W = ctx.crossings
        C = color.shape[-1]
        g_color = g_out.detach().clone(memory_format=torch.contiguous_format)
        g_clip = np.zeros(clip.shape)
        loops_antialias.blend_backward(
            _array(color).reshape(-1, C), pair, share, ends, index, _array(clip), H, W, _array(g_out).reshape(-1, C),
            g_color.numpy().reshape(-1, C), g_clip,
        )  # fmt: skip
        return g_color, None, torch.from_numpy(g_clip).to(clip.dtype), None, None
