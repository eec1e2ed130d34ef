"""Where a fit starts: a signed distance field of the visual hull, or of the fused depth images where there are any.

A start from the hull, not from noise, is what removes the hollow and "swiss cheese" insides of random starts, and it is
several times faster: the first steps see a mesh of the final size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from viewmesh.errors import EmptyReconstruction
from viewmesh.geometry.camera import Cameras
from viewmesh.geometry.hull import agreeing_views, voxel_centers
from viewmesh.progress import check, never
from viewmesh.views.viewset import ViewSet

HALF = 0.54  # the field covers [-HALF, HALF]^3: the scene's unit cube and a margin


@dataclass(frozen=True, eq=False)
class Field:
    """values (R, R, R) float32 signed distance in scene units, negative inside, at the centres of [-HALF, HALF]^3;
    lower, upper: (3,) box of what is inside."""

    values: Tensor
    lower: Tensor
    upper: Tensor

    def at(self, points: Tensor) -> Tensor:
        """Trilinear values (P,) at scene points (P, 3), clamped at the border."""
        grid = points.flip(-1)[None, None, None] / HALF  # grid_sample wants z, y, x order and [-1, 1] over the box
        volume = self.values.to(points)[None, None]
        return torch.nn.functional.grid_sample(volume, grid, padding_mode="border", align_corners=False).reshape(-1)


def initial_field(views: ViewSet, resolution: int = 96, *, cancelled: Callable[[], bool] = never) -> Field:
    """The start of a fit from posed views. Raises EmptyReconstruction when the masks agree on no volume, and Cancelled
    between two views."""
    assert views.cameras is not None, "the fit refuses views without cameras before it comes here"
    bounds = torch.tensor([[-HALF] * 3, [HALF] * 3])
    points = voxel_centers(resolution, bounds)
    inside_count, seen_count = agreeing_views(views.cameras, views.images[..., 3], points, cancelled, known=views.known)
    # all but one in fifteen views must agree: one bad mask or pose must not erase the object; and half of the views
    # must see a point at all, or slivers appear where few cameras look
    hull = (inside_count >= seen_count - (len(views) // 15)) & (seen_count >= len(views) / 2)
    if views.depths is not None:
        voxel = 2 * HALF / resolution
        distance = torch.full((len(points),), 3 * voxel)
        distance[hull] = _fused(views.cameras, views.depths, points[hull], 3 * voxel, cancelled)
        hull = hull & (distance < 0)
    else:
        distance = None
    check(cancelled)
    inside = hull.reshape(resolution, resolution, resolution).numpy()
    inside = _biggest(inside)
    if inside.sum() < 8:
        raise EmptyReconstruction(
            "The masks agree on no volume: no point of the scene lies inside the object in all views.",
            hint="Check that masks and cameras belong together (OpenGL axes, world_from_camera).",
        )
    values = _signed_distance(inside) * (2 * HALF / resolution)
    if distance is not None:  # sub-voxel near the surfaces that depth has seen
        fused = distance.reshape(values.shape)
        near = (values.abs() < 2 * HALF / resolution * 2) & (fused.abs() < 2.9 * (2 * HALF / resolution))
        values = torch.where(near, fused, values)
    values = torch.from_numpy(ndimage.gaussian_filter(values.numpy(), 0.7)).float()
    where = torch.from_numpy(inside).nonzero()
    low = (where.amin(0).float() / resolution * 2 - 1) * HALF
    high = ((where.amax(0) + 1).float() / resolution * 2 - 1) * HALF
    return Field(values, low, high)


def _fused(
    cameras: Cameras, depths: Tensor, points: Tensor, trunc: float, cancelled: Callable[[], bool] = never
) -> Tensor:
    """Truncated signed distance (P,) of depth images at points (P, 3): Curless & Levoy 1996, negative inside.

    A point that every view has behind its surface is inside; one that a view sees well in front of it is outside.
    """
    total = torch.zeros(len(points))
    weight = torch.zeros(len(points))
    in_front = torch.zeros(len(points), dtype=torch.bool)
    H, W = depths.shape[-2:]
    for n in range(len(cameras)):
        check(cancelled)
        pixels, z = cameras[n].project(points)
        col, row = pixels[0, :, 0].floor().long(), pixels[0, :, 1].floor().long()
        visible = (z[0] > 0) & (col >= 0) & (col < W) & (row >= 0) & (row < H)
        depth = torch.zeros(len(points))
        depth[visible] = depths[n, row[visible], col[visible]]
        known = depth > 0
        ahead = torch.where(known, depth - z[0].float(), 0)  # > 0: the point lies in front of the surface
        counts = known & (ahead > -trunc)
        total += torch.where(counts, ahead.clamp(-trunc, trunc), 0)
        weight += counts
        in_front |= known & (ahead > 4 * trunc)
    mean = torch.where(weight > 0, total / weight.clamp(min=1), -trunc)
    return torch.where(in_front, torch.full_like(mean, trunc), mean)


def _biggest(inside: np.ndarray) -> np.ndarray:
    """The connected part with the most voxels, with closed cavities filled: what no view can see is solid."""
    labels, count = ndimage.label(inside)  # pyright: ignore[reportGeneralTypeIssues]
    if count > 1:
        sizes = ndimage.sum_labels(inside, labels, range(1, count + 1))
        # parts of a tenth of the biggest stay: an object may truly come in pieces
        keep = [k + 1 for k in range(count) if sizes[k] >= 0.1 * sizes.max()]
        inside = (labels[..., None] == keep).any(-1)
    return np.asarray(ndimage.binary_fill_holes(inside))


def _signed_distance(inside: np.ndarray) -> Tensor:
    """Distance in voxels to the boundary of a boolean grid, negative inside; zero on the faces between voxels."""
    out = np.asarray(ndimage.distance_transform_edt(~inside))
    into = np.asarray(ndimage.distance_transform_edt(inside))
    return torch.from_numpy((out - 0.5) * (out > 0) - (into - 0.5) * (into > 0)).float()
