"""Where the object is, how large, and which way is up: the similarity from the working frame to the input's world.

Knows cameras and masks as tensors; no files. The scene frame has the object's visual hull centred at the origin,
its longest side 0.9 (so 0.05 of the unit cube is left on each side), and +y up.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from viewmesh.errors import InputError
from viewmesh.geometry.camera import Cameras
from viewmesh.geometry.hull import hull_at, voxel_centers
from viewmesh.options import UpAxis
from viewmesh.views.consistency import disagreeing_views

LONGEST_SIDE = 0.9
GRID = 64
INSIDE = 0.5
SEEN_BY = 0.5  # share of the views that must see a voxel for it to count as the object's
CRUMB = 0.01
UNIT_CUBE = torch.tensor([[-1.0] * 3, [1.0] * 3], dtype=torch.float64)
MASK_SIDE = 160  # masks are looked at no finer than this: bounds to about half a percent of the view


@dataclass(frozen=True)
class Normalisation:
    """disagreeing: indices of the views whose masks contradict the others'; they had no say."""

    world_from_scene: Tensor  # (4, 4) float64
    disagreeing: tuple[int, ...] = ()


def normalise(
    cameras: Cameras,
    masks: Tensor | None,
    *,
    known: Tensor | None = None,
    up: UpAxis = "auto",
    depths: Tensor | None = None,
    aabb: Tensor | None = None,
    up_direction: Tensor | None = None,
    floor: Tensor | None = None,
    points: Tensor | None = None,
) -> Normalisation:
    """The scene frame of posed views, from the first of these that is given: masks, depths, points, aabb, the cameras.

    masks: (N, H, W) in [0, 1]; known: (N, H, W) bool, where they say something; None: all over. depths: (N, H, W)
    z-depth. points: (P, 3) on surfaces in view. aabb: (2, 3). up_direction: (3,), what `auto` means. floor: (4,) plane
    n.x + d = 0 that the object stands on, n up: nothing below it counts. All in world units.
    Raises InputError if the cameras do not look at a common place or the masks agree on no volume.
    """
    turn = rotation_to_y(up_of(cameras, up, up_direction))
    turned = cameras.moved(turn)
    bad: list[int] = []
    if floor is not None:
        floor = torch.cat([turn[:3, :3] @ floor[:3].double(), floor[3:].double()])
    if masks is not None:
        bounds, bad = hull_bounds(turned, masks, floor, known)
    elif depths is not None and bool((depths > 0).any()):
        bounds = _depth_bounds(turned, depths)
    else:
        bounds = _declared_bounds(turned, aabb, turn)
        if points is not None:
            bounds = _point_bounds(bounds, points.double() @ turn[:3, :3].T)
    center, size = bounds.mean(0), float((bounds[1] - bounds[0]).max())
    turned_from_scene = torch.eye(4, dtype=torch.float64)
    turned_from_scene[:3, :3] *= size / LONGEST_SIDE
    turned_from_scene[:3, 3] = center
    return Normalisation(torch.linalg.inv(turn) @ turned_from_scene, tuple(bad))


def up_of(cameras: Cameras, rule: UpAxis, direction: Tensor | None = None) -> Tensor:
    """(3,) float64 unit vector that is up in the cameras' world: as ruled; else the given direction; else the world
    axis nearest the mean of the cameras' own up vectors (+y if they cancel)."""
    if rule != "auto":
        axis = torch.zeros(3, dtype=torch.float64)
        axis["xyz".index(rule[1])] = 1.0 if rule[0] == "+" else -1.0
        return axis
    if direction is not None:
        return torch.nn.functional.normalize(direction.double(), dim=0)
    mean = cameras.world_from_camera[:, :3, 1].mean(0)
    axis = torch.zeros(3, dtype=torch.float64)
    largest = int((mean.abs() + torch.tensor([0, 1e-3, 0])).argmax())
    axis[largest] = 1.0 if mean[largest] > -1e-3 else -1.0
    return axis


def rotation_to_y(up: Tensor) -> Tensor:
    """(4, 4) the shortest turn that brings the unit vector up (3,) to +y."""
    y = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    axis, cos = torch.linalg.cross(up, y), float(up @ y)
    m = torch.eye(4, dtype=torch.float64)
    if cos < -1 + 1e-9:
        m[1, 1] = m[2, 2] = -1.0  # half a turn about x
        return m
    k = torch.tensor([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]], dtype=torch.float64)
    m[:3, :3] += k + k @ k / (1 + cos)
    return m


def hull_bounds(
    cameras: Cameras, masks: Tensor, floor: Tensor | None = None, known: Tensor | None = None
) -> tuple[Tensor, list[int]]:
    """(2, 3) float64 bounds of the visual hull, and the views whose masks were left out because they contradict the
    others'. Raises InputError."""
    masks, known = coarse(masks), None if known is None else _coarsely_known(known)
    cameras = cameras.resized(*masks.shape[-2:])
    region = _region(cameras, masks)
    bad = disagreeing_views(cameras.moved(torch.linalg.inv(region)), masks, 1.5 * UNIT_CUBE, known)
    if bad:
        kept = [i for i in range(len(cameras)) if i not in bad]
        cameras, masks, known = cameras[kept], masks[kept], None if known is None else known[kept]
        region = _region(cameras, masks)
    radius, center = region[0, 0], region[:3, 3]
    if floor is not None:  # in units of the region: float32 has its best digits there, whatever the world's units
        floor = torch.cat([floor[:3], (floor[:3] @ center + floor[3:]) / radius])
    bounds = _carved(cameras.moved(torch.linalg.inv(region)), masks, known, floor)
    if bounds is None:
        raise InputError(
            "the masks and cameras agree on no volume; check that transform_matrix is camera to world with OpenGL "
            "axes, that each mask belongs to its view, and that the object is white (255) in it."
        )
    return bounds * radius + center, bad


def coarse(masks: Tensor, side: int = MASK_SIDE) -> Tensor:
    """masks (N, H, W) with specks removed by a 3x3 opening and no more than about `side` pixels a side; a coarse pixel
    holds the largest value in it, so that nothing thin is lost."""
    pool = torch.nn.functional.max_pool2d
    x = masks[:, None].float()
    opened = pool(-pool(-x, 3, 1, 1), 3, 1, 1)
    kept = opened.amax((1, 2, 3), keepdim=True) >= INSIDE  # an object thinner than three pixels stays as it is
    x = torch.where(kept, opened, x)
    return _largest(x, side)[:, 0]


def _coarsely_known(known: Tensor, side: int = MASK_SIDE) -> Tensor:
    """known (N, H, W) bool of the size that `coarse` makes: a coarse pixel is known where all in it are."""
    return _largest((~known)[:, None].float(), side)[:, 0] == 0


def _largest(x: Tensor, side: int) -> Tensor:
    """(N, 1, H, W) of no more than about `side` pixels a side: each the largest value in it."""
    H, W = x.shape[-2:]
    factor = max(1, round(max(H, W) / side))
    if factor == 1:
        return x
    return torch.nn.functional.adaptive_max_pool2d(x, (max(1, H // factor), max(1, W // factor)))


def center_of_view(cameras: Cameras, targets: Tensor) -> Tensor:
    """(3,) the point nearest to the rays through one pixel (x, y) of each view, (N, 2), in the least squares sense."""
    x = (targets[:, 0] - cameras.cx) / cameras.fx
    y = -(targets[:, 1] - cameras.cy) / cameras.fy
    rays = torch.stack([x, y, -torch.ones_like(x)], -1)  # (N, 3) camera frame
    rays = torch.nn.functional.normalize((cameras.world_from_camera[:, :3, :3] @ rays[..., None])[..., 0], dim=-1)
    across = torch.eye(3, dtype=torch.float64) - rays[:, :, None] * rays[:, None, :]
    # rays that are (nearly) parallel leave the distance open: the point nearest the world's origin decides
    weak = 1e-6 * len(cameras)
    left = across.sum(0) + weak * torch.eye(3, dtype=torch.float64)
    center = torch.zeros(3, dtype=torch.float64)
    for _ in range(2):  # the second time from there, so that a far origin does not pull where the rays do decide
        center = center + torch.linalg.solve(left, (across @ (cameras.centers - center)[..., None])[..., 0].sum(0))
    return center


def _region(cameras: Cameras, masks: Tensor) -> Tensor:
    """(4, 4) float64 from the cube [-1, 1]^3 to one that holds the object: what the masks' boxes span at the centre of
    view."""
    boxes = _mask_boxes(masks)  # (N, 4) x0 y0 x1 y1
    usable = ~boxes.isnan().any(-1)
    if not usable.any():
        raise InputError("every mask is empty; mark the object white (255) in the masks.")
    cameras, boxes = cameras[usable.nonzero()[:, 0]], boxes[usable]
    center = center_of_view(cameras, (boxes[:, :2] + boxes[:, 2:]) / 2)
    depth = _depth_of(cameras, center)
    half_x = (boxes[:, 2] - boxes[:, 0]) / 2 / cameras.fx * depth
    half_y = (boxes[:, 3] - boxes[:, 1]) / 2 / cameras.fy * depth
    half = torch.hypot(half_x, half_y)[depth > 0]
    region = torch.eye(4, dtype=torch.float64)
    region[:3, :3] *= torch.minimum(half.max(), 2 * half.median())
    region[:3, 3] = center
    return region


def _depth_of(cameras: Cameras, center: Tensor) -> Tensor:
    """(N,) z-depth of a point. Raises InputError if most cameras have it behind them."""
    depth = cameras.project(center[None])[1][:, 0]
    if int((depth > 0).sum()) * 2 <= len(depth):
        raise InputError(
            "the cameras do not look at a common place; check that transform_matrix is camera to world with OpenGL "
            "camera axes (+x right, +y up, looks along -z), not OpenCV's."
        )
    return depth


def _mask_boxes(masks: Tensor) -> Tensor:
    """(N, 4) float64 x0, y0, x1, y1 of the pixels that are inside, in pixels; NaN for an empty mask."""
    boxes = torch.full((len(masks), 4), float("nan"), dtype=torch.float64)
    for n, mask in enumerate(masks >= INSIDE):
        rows, cols = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        if len(rows):
            boxes[n] = torch.tensor([cols[0], rows[0], cols[-1] + 1, rows[-1] + 1], dtype=torch.float64)
    return boxes


def _carved(cameras: Cameras, masks: Tensor, known: Tensor | None, floor: Tensor | None) -> Tensor | None:
    """(2, 3) hull bounds by carving the cube [-1, 1]^3, made larger while the hull touches it, then once
    more finely; None if empty."""
    for grow in (1.1, 1.7, 2.6):
        cube = grow * UNIT_CUBE
        bounds = _occupied(cameras, masks, known, cube, floor)
        if bounds is None:
            return None
        margin = 1.01 * (cube[1] - cube[0]) / GRID
        if ((bounds[0] > cube[0] + margin) & (bounds[1] < cube[1] - margin)).all():
            break
    else:  # too few directions to close the hull: what lies within the masks' own extent
        cube = UNIT_CUBE
        bounds = torch.stack([torch.maximum(bounds[0], cube[0]), torch.minimum(bounds[1], cube[1])])
    voxel = (cube[1] - cube[0]) / GRID
    finer = torch.stack([bounds[0] - voxel, bounds[1] + voxel])
    refined = _occupied(cameras, masks, known, finer, floor)
    return bounds if refined is None else torch.stack([
        torch.maximum(refined[0], finer[0]), torch.minimum(refined[1], finer[1])])  # fmt: skip


def _occupied(
    cameras: Cameras, masks: Tensor, known: Tensor | None, bounds: Tensor, floor: Tensor | None
) -> Tensor | None:
    """Bounds of the voxels of a grid over `bounds` that are in the hull, outer edges; None if there are none."""
    points = voxel_centers(GRID, bounds)
    solid = hull_at(cameras, masks, points, known=known, seen_by=SEEN_BY) >= INSIDE
    half = (bounds[1] - bounds[0]) / GRID / 2
    if floor is not None:
        solid &= points.double() @ floor[:3] + floor[3] > -half.max()
    inside = points[_without_crumbs(solid)].double()
    if not len(inside):
        return None
    return torch.stack([inside.amin(0) - half, inside.amax(0) + half])


def _without_crumbs(solid: Tensor) -> Tensor:
    """(GRID^3,) bool without the components that are below a hundredth of the largest."""
    grid = solid.reshape(GRID, GRID, GRID).numpy()
    labels = np.zeros(grid.shape, np.int32)
    if ndimage.label(grid, np.ones((3, 3, 3)), output=labels) < 2:  # pyright: ignore[reportOperatorIssue]
        return solid
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return torch.from_numpy((sizes >= CRUMB * sizes.max())[labels].ravel())


def _depth_bounds(cameras: Cameras, depths: Tensor) -> Tensor:
    """Bounds of the measured points, without the outermost half percent on each side."""
    points = cameras.unproject(depths.double())[depths > 0]
    low, high = (torch.quantile(points[torch.randperm(len(points), generator=_seeded())[:100_000]], q, dim=0)
                 for q in (0.005, 0.995))  # fmt: skip
    if not bool((high - low).max() > 0):
        raise InputError("all depth values are one point; check depth_unit_scale and the depth maps.")
    return torch.stack([low, high])


def _point_bounds(region: Tensor, points: Tensor) -> Tensor:
    """Bounds of the points within the region that the cameras look at; the region itself if they are few."""
    inside = points[((points >= region[0]) & (points <= region[1])).all(-1)]
    if len(inside) < 50:
        return region
    return torch.stack([torch.quantile(inside, 0.01, dim=0), torch.quantile(inside, 0.99, dim=0)])


def _declared_bounds(cameras: Cameras, aabb: Tensor | None, turn: Tensor) -> Tensor:
    """The declared box if at least half of the cameras see its centre; else what all cameras look at."""
    if aabb is not None:
        corners = torch.cartesian_prod(*aabb.double().T) @ turn[:3, :3].T
        box = torch.stack([corners.amin(0), corners.amax(0)])
        pixels, depth = cameras.project(box.mean(0)[None])
        size = torch.tensor([cameras.width, cameras.height], dtype=torch.float64)
        seen = (depth[:, 0] > 0) & (pixels[:, 0] >= 0).all(-1) & (pixels[:, 0] <= size).all(-1)
        if int(seen.sum()) * 2 >= len(cameras):
            return box
    axes = torch.stack([cameras.cx, cameras.cy], -1)
    center = center_of_view(cameras, axes)
    depth = _depth_of(cameras, center)
    shorter = torch.minimum(cameras.width / cameras.fx, cameras.height / cameras.fy) / 2
    radius = float((depth * shorter)[depth > 0].median()) * 0.7  # a photographer leaves some room around the object
    return torch.stack([center - radius, center + radius])


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
