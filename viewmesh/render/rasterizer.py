"""START HERE: what a differentiable rasterizer is, and which back-end draws on which device.

Four primitives (Laine et al. 2020, "Modular Primitives for High-Performance Differentiable Rendering"): rasterize,
interpolate, texture, antialias. Three back-ends with the same results: `numba` (CPU, compiled loops over covered
pixels), `torch` (any device), `nvdiffrast` (CUDA, optional, non-commercial licence).

Row order: clip y = -1 is row 0; `Cameras.clip_from_camera` flips y, so row 0 is the top of the image. Both windings
are visible. Pixels where the surface has w <= 0 or z/w outside [-1, 1] are not drawn, so triangles may cross the
camera plane. Of two triangles at one depth the lower index wins; degenerate triangles are never drawn; a pixel centre
on an edge shared by two triangles belongs to exactly one of them.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from viewmesh.errors import OptionError

Boundary = Literal["wrap", "clamp", "zero", "cube"]
Filter = Literal["nearest", "linear", "trilinear"]

MAX_FACES = 2**24  # a triangle id + 1 must be exact in float32


@dataclass(frozen=True)
class Raster:
    """What each pixel of B images sees.

    rast: (B, H, W, 4): u, v, z/w, triangle id + 1 (0 = empty). An attribute at the pixel is
        u * a0 + v * a1 + (1 - u - v) * a2, perspective-correct. u and v carry gradients to the clip positions; z/w
        and the id carry none.
    rast_db: (B, H, W, 4): du/dX, du/dY, dv/dX, dv/dY per pixel; None unless asked for.
    """

    rast: Tensor  # (B, H, W, 4)
    rast_db: Tensor | None  # (B, H, W, 4)


@dataclass(frozen=True, eq=False)
class Topology:
    """Which triangles meet at which edge, for one set of faces.

    opposite: (F, 3) int64: for the edge of face f across from its corner k (that is, between corners k+1 and k+2), the
        corner of the neighbouring face that is not on the edge. -1 where there is no neighbour, or more than one.
    """

    faces: Tensor  # (F, 3)

    @cached_property
    def opposite(self) -> Tensor:  # (F, 3)
        if self.faces.device.type == "cpu":
            from viewmesh.render.loops_antialias import opposite_vertices
        else:
            from viewmesh.render.backend_torch import opposite_vertices
        return opposite_vertices(self.faces)


class Rasterizer(Protocol):
    """The four primitives. Every method is differentiable in its floating-point inputs except where it says not."""

    name: str

    def rasterize(
        self, clip: Tensor, faces: Tensor, height: int, width: int, *, derivatives: bool = False
    ) -> Raster:  # fmt: skip
        """Visibility and barycentrics. clip: (B, V, 4) positions in clip space; faces: (F, 3) int64 or int32."""
        ...

    def interpolate(
        self, attributes: Tensor, rast: Tensor, faces: Tensor, *, rast_db: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Vertex attributes (V, C), shared by all images, at each row of rast.

        rast has any leading shape (an image batch, or a flat (P, 4) list of covered pixels). Returns (..., C) and, with
        rast_db, screen derivatives (..., 2C) in the order dA0/dX, dA0/dY, dA1/dX, ... (else None). Rows that see no
        triangle give 0.
        """
        ...

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
        """Texture look-up, (..., C).

        texture: (H, W, C), uv: (..., 2) with (0, 0) the top-left corner of row 0; any leading shape. With
        boundary="cube": texture (6, R, R, C) in the face order of `render.light`, uv a direction (..., 3) of any
        length; look-ups are continuous across the cube's edges.
        "trilinear" blends two mip levels: level is given explicitly (...,), 0 = texture, or follows from uv_da
        (..., 4) = du/dX, du/dY, dv/dX, dv/dY as the long axis of the pixel's footprint. mips are the levels below
        texture and get their own gradients; None averages 2x2 texels down to one, and then (only then) both sides of
        the texture must be powers of two. Every other filter takes any size.
        """
        ...

    def antialias(
        self, color: Tensor, rast: Tensor, clip: Tensor, faces: Tensor, topology: Topology | None = None
    ) -> Tensor:
        """color (B, H, W, C) blended across silhouettes; the only source of gradients at them.

        A pair of neighbouring pixels that see different triangles is blended where a silhouette edge of the nearer
        triangle crosses the segment between their centres. Values may leave the range of color slightly: clamp an
        alpha before a loss that needs it in [0, 1]. Vertices must be shared: a duplicated vertex makes every edge
        at it a silhouette. Silhouette edges with a vertex behind the camera are left alone.
        """
        ...


def topology(faces: Tensor) -> Topology:
    """The Topology of faces (F, 3), to be built once per set of faces and handed to every `antialias`."""
    return Topology(faces)


def get_rasterizer(device: torch.device | str, name: str | None = None) -> Rasterizer:
    """The back-end for a device: numba on the CPU, nvdiffrast on CUDA where it is installed, torch otherwise.

    name ("numba", "torch", "nvdiffrast") asks for one. Raises OptionError if it cannot run on the device, MissingModel
    if its package is missing.
    """
    kind = torch.device(device).type
    if name is None:
        if kind == "cpu":
            name = "numba"
        elif kind == "cuda" and importlib.util.find_spec("nvdiffrast"):
            name = "nvdiffrast"
        else:
            name = "torch"
    if name == "torch":
        from viewmesh.render.backend_torch import TorchRasterizer

        return TorchRasterizer()
    if name == "numba" and kind == "cpu":
        from viewmesh.render.backend_numba import NumbaRasterizer

        return NumbaRasterizer()
    if name == "nvdiffrast" and kind == "cuda":
        from viewmesh.render.backend_nvdiffrast import NvdiffrastRasterizer

        return NvdiffrastRasterizer(torch.device(device))
    raise OptionError(
        f"There is no rasterizer {name!r} for {kind}.",
        hint="numba runs on cpu, nvdiffrast on cuda, torch on any device",
    )
