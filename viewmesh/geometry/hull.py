"""The visual hull: the largest solid whose silhouettes lie inside every mask. Pure torch, no files, no thresholds.

Laurentini, "The visual hull concept for silhouette-based image understanding", PAMI 1994.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from viewmesh.geometry.camera import Cameras
from viewmesh.progress import check, never

NEGLIGIBLE = 1e-3  # a voxel below this agreement is outside: later views need not look at it


def voxel_centers(resolution: int, bounds: Tensor) -> Tensor:
    """(R^3, 3) float32 centres of a grid over bounds (2, 3), x slowest, z fastest."""
    low, high = bounds.to(torch.float32)
    steps = (torch.arange(resolution, dtype=torch.float32, device=bounds.device) + 0.5) / resolution
    axes = [low[i] + steps * (high[i] - low[i]) for i in range(3)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


def hull_at(
    cameras: Cameras, masks: Tensor, points: Tensor, *, known: Tensor | None = None, seen_by: float = 0.0
) -> Tensor:
    """The least mask value over the views that see each point; points (P, 3) in the cameras' world, returns (P,).

    A view that has the point outside its image, where it is not `known` (N, H, W) bool, or behind it says nothing about
    it. A point that no view sees is 0: nothing speaks for it. So is one that less than the share `seen_by` of the views
    see: where most cameras do not look, a few masks cross by chance. Agreement below 0.001 is returned as 0.
    """
    H, W = masks.shape[-2:]
    device, cameras = points.device, cameras.resized(H, W)
    agreement = torch.zeros(len(points), dtype=torch.float32, device=device)
    alive = torch.arange(len(points), device=device)
    least = torch.full((len(points),), 2.0, device=device)  # 2 = not yet seen
    seeing = torch.zeros(len(points), device=device)
    for n in range(len(cameras)):
        knows = None if known is None else known[n].to(device)
        values, seen = _looked_up(cameras[n], masks[n].to(device, torch.float32), knows, points[alive])
        least = torch.where(seen, torch.minimum(least, values), least)
        seeing += seen
        keep = least > NEGLIGIBLE
        alive, least, seeing = alive[keep], least[keep], seeing[keep]
    agreement[alive] = torch.where(seeing >= max(1.0, seen_by * len(cameras)), least.clamp(max=1.0), 0.0)
    return agreement


def agreeing_views(
    cameras: Cameras,
    masks: Tensor,
    points: Tensor,
    cancelled: Callable[[], bool] = never,
    *,
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """How many views hold each point (P, 3) inside their mask (>= 0.5), and how many see it at all; (P,) each.

    masks: (N, H, W) in [0, 1], or uint8 up to 255. known: (N, H, W) bool, where a view does see; None: all over.
    Raises Cancelled between two views.
    """
    H, W = masks.shape[-2:]
    cameras = cameras.resized(H, W)
    inside = torch.zeros(len(points), device=points.device)
    seeing = torch.zeros(len(points), device=points.device)
    for n in range(len(cameras)):
        check(cancelled)
        mask = masks[n].to(points.device, torch.float32)
        knows = None if known is None else known[n].to(points.device)
        values, seen = _looked_up(cameras[n], mask / 255 if masks.dtype == torch.uint8 else mask, knows, points)
        inside += (seen & (values >= 0.5)).float()
        seeing += seen.float()
    return inside, seeing


def _looked_up(camera: Cameras, mask: Tensor, known: Tensor | None, points: Tensor) -> tuple[Tensor, Tensor]:
    """One view's mask at the points, bilinear, and whether the view sees them: all the pixels that go into it are
    known; both (P,)."""
    pixels, depth = camera.to(points.device).project(points)
    H, W = mask.shape
    size = torch.tensor([W, H], dtype=points.dtype, device=points.device)
    grid = pixels[0] / size * 2 - 1  # (P, 2), -1 and 1 are the image's outer edges
    seen = (depth[0] > 0) & (grid.abs() <= 1).all(-1)
    planes = mask[None] if known is None else torch.stack([mask, known.to(mask)])
    values = torch.nn.functional.grid_sample(
        planes[None], grid[None, :, None].clamp(-2, 2), padding_mode="border", align_corners=False
    )[0, :, :, 0]
    return values[0], seen if known is None else seen & (values[1] > 0.999)
