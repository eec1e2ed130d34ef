"""The optional CUDA back-end, and the only importer of nvdiffrast.

nvdiffrast is NVIDIA's and licensed for non-commercial use only, which is why it is neither a dependency nor a default
that anyone gets without installing it. This file only calls its public interface.
"""

import weakref
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from viewmesh.errors import MissingModel
from viewmesh.render.mipmap import footprint_level, mip_chain, nearest
from viewmesh.render.rasterizer import MAX_FACES, Boundary, Filter, Raster, Topology

INSTALL = (
    "pip install setuptools wheel ninja && "
    "pip install git+https://github.com/NVlabs/nvdiffrast --no-build-isolation  (licence: non-commercial use only)"
)


def _module() -> Any:
    try:
        import nvdiffrast.torch as dr
    except ImportError as error:
        raise MissingModel("The rasterizer nvdiffrast is not installed.", hint=INSTALL) from error
    return dr


class NvdiffrastRasterizer:
    """Rasterizer on one CUDA device, float32."""

    name = "nvdiffrast"

    def __init__(self, device: torch.device) -> None:
        self._dr = _module()
        self._context = self._dr.RasterizeCudaContext(device=device)
        self._hashes: weakref.WeakKeyDictionary[Topology, Any] = weakref.WeakKeyDictionary()

    def rasterize(self, clip: Tensor, faces: Tensor, height: int, width: int, *, derivatives: bool = False) -> Raster:
        if len(faces) > MAX_FACES:
            raise ValueError(f"A raster holds at most {MAX_FACES} triangles, got {len(faces)}.")
        if len(faces) == 0:
            rast = clip.new_zeros(len(clip), height, width, 4)
            return Raster(rast, torch.zeros_like(rast) if derivatives else None)
        # the CUDA rasterizer wants sides that are multiples of 8: draw a larger viewport and cut it
        H, W = -(-height // 8) * 8, -(-width // 8) * 8
        sx, sy = width / W, height / H
        if sx < 1 or sy < 1:
            x, y, z, w = clip.unbind(-1)
            clip = torch.stack([(x + w) * sx - w, (y + w) * sy - w, z, w], -1)
        rast, db = self._dr.rasterize(
            self._context, clip.contiguous(), faces.int().contiguous(), (H, W), grad_db=derivatives
        )
        rast = rast[:, :height, :width].contiguous()
        return Raster(rast, db[:, :height, :width].contiguous() if derivatives else None)

    def interpolate(
        self, attributes: Tensor, rast: Tensor, faces: Tensor, *, rast_db: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        shape, C = rast.shape[:-1], attributes.shape[-1]
        if rast.numel() == 0 or len(faces) == 0:
            zero = attributes.new_zeros(*shape, C)
            return zero, None if rast_db is None else attributes.new_zeros(*shape, 2 * C)
        out, da = self._dr.interpolate(
            attributes[None].contiguous(),
            _row(rast),
            faces.int().contiguous(),
            rast_db=None if rast_db is None else _row(rast_db),
            diff_attrs=None if rast_db is None else "all",
        )
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
        shape, C = uv.shape[:-1], texture.shape[-1]
        if uv.numel() == 0:
            return texture.new_zeros(*shape, C)
        if filter == "linear":
            return self._dr.texture(
                texture[None].contiguous(), _row(uv), filter_mode="linear", boundary_mode=boundary
            ).reshape(*shape, C)  # fmt: skip
        chain = [texture, *mip_chain(texture, mips)]
        at = footprint_level(texture, uv_da, level, len(chain)).expand(shape)
        if not _halves(chain):  # nvdiffrast knows no other stacks: blend the levels here
            out = texture.new_zeros(*shape, C)
            for n, m in enumerate(chain):
                share = (1 - (at - n).abs()).clamp_min(0)
                out = out + share[..., None] * self.texture(m, uv, boundary=boundary)
            return out
        return self._dr.texture(
            texture[None].contiguous(),
            _row(uv),
            mip_level_bias=at.reshape(1, 1, -1).contiguous(),
            mip=[m[None].contiguous() for m in chain[1:]],
            filter_mode="linear-mipmap-linear",
            boundary_mode=boundary,
        ).reshape(*shape, C)

    def antialias(
        self, color: Tensor, rast: Tensor, clip: Tensor, faces: Tensor, topology: Topology | None = None
    ) -> Tensor:
        if len(faces) == 0:
            return color
        tri = faces.int().contiguous()
        around = None
        if topology is not None:
            around = self._hashes.get(topology)
            if around is None:
                around = self._hashes[topology] = self._dr.antialias_construct_topology_hash(tri)
        return self._dr.antialias(
            color.contiguous(), rast.contiguous(), clip.contiguous(), tri, topology_hash=around
        )  # fmt: skip


def _row(flat: Tensor) -> Tensor:
    """(..., C) as one image of one row, (1, 1, P, C): its kernels run over x first, a column would leave them idle."""
    return flat.reshape(1, 1, -1, flat.shape[-1]).contiguous()


def _halves(chain: Sequence[Tensor]) -> bool:
    sizes = [m.shape[-3:-1] for m in chain]
    return all(
        b == (max(a[0] // 2, 1), max(a[1] // 2, 1)) and (a[0] % 2 == 0 or a[0] == 1) and (a[1] % 2 == 0 or a[1] == 1)
        for a, b in pairwise(sizes)
    )
