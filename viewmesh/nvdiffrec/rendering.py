"""One differentiable picture: vertices and a material function in, premultiplied colour, coverage and depth out.

Only covered pixels are shaded, as a flat list of P samples; the list is what makes a CPU fit bearable.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from viewmesh.geometry.camera import Cameras
from viewmesh.geometry.normals import unit, vertex_normals
from viewmesh.geometry.rows import rows_at
from viewmesh.render.rasterizer import Rasterizer, Topology

NEAR, FAR = 0.05, 20.0  # z-depths, scene units, of cameras outside the scene's unit cube or close by: see `planes`


@dataclass(frozen=True, eq=False)
class Viewpoint:
    """B cameras as the rasteriser and the shading want them, float32 on the fit's device.

    clip_from_scene: (B, 4, 4). center: (B, 3) camera positions. axis: (B, 4) so that axis . (p, 1) is p's z-depth.
    """

    clip_from_scene: Tensor
    center: Tensor
    axis: Tensor

    def __getitem__(self, index: Tensor) -> "Viewpoint":
        """Some of them, by an index on their device."""
        return Viewpoint(self.clip_from_scene[index], self.center[index], self.axis[index])


@dataclass(frozen=True, eq=False)
class Samples:
    """The P covered pixels of a batch, in image order.

    rast: (P, 4) as the rasteriser gives it. image: (P,) which image. points, normals: (P, 3) scene units, unit length.
    view: (P, 3) unit vectors towards the camera.
    """

    rast: Tensor
    image: Tensor
    points: Tensor
    normals: Tensor
    view: Tensor


@dataclass(frozen=True, eq=False)
class Picture:
    """color (B, S, S, 3) linear premultiplied; alpha (B, S, S, 1), not clamped; depth (B, S, S), 0 = empty."""

    color: Tensor
    alpha: Tensor
    depth: Tensor


def planes(cameras: Cameras) -> tuple[Tensor, Tensor]:
    """Near and far z-depths (N,) float64, scene units, of a scene in the unit cube around the origin.

    They follow a camera that stands far away, as one with a long lens does: planes from NEAR to there would leave
    float32 too few steps of depth within the object.
    """
    origin = (cameras.centers * cameras.world_from_camera[:, :3, 2]).sum(-1)  # its z-depth
    return (origin - FAR / 2).clamp(min=NEAR), (origin + FAR / 2).clamp(min=FAR)


def viewpoint(cameras: Cameras, device: torch.device | str, correction: Tensor | None = None) -> Viewpoint:
    """correction: (B, 6) small rotation (radians) and translation of each camera in its own frame, differentiable."""
    camera_from_scene = cameras.camera_from_world.to(device, non_blocking=True)
    projection = cameras.clip_from_camera(*planes(cameras)).to(device, non_blocking=True)
    if correction is not None:
        camera_from_scene = torch.matrix_exp(_twist(correction.double())) @ camera_from_scene
    rotation, translation = camera_from_scene[:, :3, :3], camera_from_scene[:, :3, 3:]
    return Viewpoint(
        clip_from_scene=(projection @ camera_from_scene).float(),
        center=-(rotation.mT @ translation)[..., 0].float(),
        axis=-camera_from_scene[:, 2].float(),
    )


def _twist(correction: Tensor) -> Tensor:
    """se(3) matrices (B, 4, 4) of (rotation vector, translation), (B, 6)."""
    x, y, z, a, b, c = correction.unbind(-1)
    o = torch.zeros_like(x)
    return torch.stack([o, -z, y, a, z, o, -x, b, -y, x, o, c, o, o, o, o], -1).reshape(-1, 4, 4)


def picture(
    rasterizer: Rasterizer,
    cameras: Viewpoint,
    vertices: Tensor,
    faces: Tensor,
    shade: Callable[[Samples], Tensor],
    size: int,
    topology: Topology | None = None,
) -> Picture:
    """Rasterises vertices (V, 3) and faces (F, 3) from B cameras, shades the covered pixels, antialiases the edges."""
    clip = torch.cat([vertices, torch.ones_like(vertices[:, :1])], -1) @ cameras.clip_from_scene.mT  # (B, V, 4)
    faces = faces.int() if faces.is_cuda else faces  # what its rasteriser works with
    rast = rasterizer.rasterize(clip, faces, size, size).rast
    covered = (rast[..., 3].flatten() > 0).nonzero()[:, 0]  # a GPU is waited for here, and nowhere else
    flat, of_image = rows_at(rast.flatten(0, 2), covered), covered // (size * size)
    attributes = torch.cat([vertices, vertex_normals(vertices, faces)], -1)
    mixed, _ = rasterizer.interpolate(attributes, flat, faces)
    points, normals, view, z = _seen_from(cameras.center[of_image], cameras.axis[of_image], mixed)
    color = shade(Samples(flat, of_image, points, normals, view))

    def canvas(values: Tensor) -> Tensor:
        empty = values.new_zeros(rast[..., 0].numel(), values.shape[1])
        return empty.index_put((covered,), values).reshape(*rast.shape[:3], -1)

    rgba = canvas(torch.cat([color, torch.ones_like(z)], -1))
    smooth, alpha = rasterizer.antialias(rgba, rast, clip, faces, topology).split((3, 1), -1)
    return Picture(smooth, alpha, canvas(z).squeeze(-1))


def _seen_from(center: Tensor, axis: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Points, unit normals and view directions (P, 3), z-depth (P, 1), of points and normals (P, 6)."""
    points, normals = mixed.split(3, -1)
    view = unit(center - points)
    z = (points * axis[:, :3]).sum(-1, keepdim=True) + axis[:, 3:]
    return points, unit(normals), view, z
