"""Which faces of a mesh some camera sees: what no camera sees is an inner wall, or dust inside."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from viewmesh.geometry.camera import Cameras, fibonacci_sphere, look_at, pinhole
from viewmesh.geometry.mesh import Mesh
from viewmesh.progress import check, never
from viewmesh.render.rasterizer import Rasterizer


def all_around(views: int, fov_y_rad: float, size: int) -> Cameras:
    """Cameras spread over a sphere of radius 2.2 that look at the unit cube; images of size x size pixels."""
    eyes = 2.2 * fibonacci_sphere(views)
    return pinhole(look_at(eyes, torch.zeros(3), torch.tensor([0.0, 1.0, 0.0])), fov_y_rad, size, size)


@torch.no_grad()
def visible_faces(
    mesh: Mesh,
    cameras: Iterable[Cameras],
    rasterizer: Rasterizer,
    *,
    near: float | Tensor,
    far: float | Tensor,
    cancelled: Callable[[], bool] = never,
) -> Tensor:
    """(F,) bool on the mesh's device: some pixel of some camera shows the face. near, far: z-depths of the clip,
    one for all cameras or (N,) of each.

    Raises Cancelled between a few pictures.
    """
    seen = torch.zeros(len(mesh.faces) + 1, dtype=torch.bool, device=mesh.vertices.device)
    vertices = torch.cat([mesh.vertices, torch.ones_like(mesh.vertices[:, :1])], -1)
    for some in cameras:
        for clip_from_mesh in (some.clip_from_camera(near, far) @ some.camera_from_world).to(vertices).split(4):
            check(cancelled)
            clip = vertices @ clip_from_mesh.mT
            rast = rasterizer.rasterize(clip, mesh.faces, some.height, some.width).rast
            seen[rast[..., 3].reshape(-1).long()] = True
    return seen[1:]
