"""What a fit is compared with: square crops of the views around the object, as tensors on the fit's device."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from viewmesh.errors import InputError
from viewmesh.geometry.camera import Cameras
from viewmesh.nvdiffrec.rendering import Viewpoint, viewpoint
from viewmesh.progress import check, never
from viewmesh.render.shading import linear_to_srgb, srgb_to_linear
from viewmesh.views.viewset import ViewSet


@dataclass(frozen=True, eq=False)
class Targets:
    """N crops of S x S pixels.

    images: (N, S, S, 4) uint8 sRGB, straight alpha. depths: (N, S, S) float32 scene units, 0 = unknown, or None.
    known: (N, S, S) bool, False where the photo has no pixel, of which a view says nothing; None where all are known.
    cameras: the crops' own intrinsics, on the CPU in float64.
    """

    images: Tensor  # (N, S, S, 4)
    depths: Tensor | None  # (N, S, S)
    known: Tensor | None  # (N, S, S)
    cameras: Cameras

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, index: Tensor) -> "Batch":
        """Crops of the given indices (B,) on the CPU, decoded to linear light."""
        rows = index.to(self.images.device, non_blocking=True)
        images = self.images[rows].float() / 255
        alpha = images[..., 3:]
        return Batch(
            color=srgb_to_linear(images[..., :3]) * alpha,
            alpha=alpha,
            depth=None if self.depths is None else self.depths[rows],
            known=None if self.known is None else self.known[rows][..., None],
            cameras=self.cameras[index],
            viewpoint=self.viewpoint[rows],
            index=index,
        )

    @cached_property
    def viewpoint(self) -> Viewpoint:
        """Of all N, once: a step takes its own from here."""
        return viewpoint(self.cameras, self.images.device)


@dataclass(frozen=True, eq=False)
class Batch:
    """color (B, S, S, 3) linear, premultiplied; alpha (B, S, S, 1); depth (B, S, S) or None; known (B, S, S, 1) bool
    or None, where all are; cameras and index (B,) on the CPU, viewpoint the same cameras on the device."""

    color: Tensor
    alpha: Tensor
    depth: Tensor | None
    known: Tensor | None
    cameras: Cameras
    viewpoint: Viewpoint
    index: Tensor


def crop_to_object(
    views: ViewSet,
    size: int,
    device: torch.device | str,
    *,
    margin: float = 0.08,
    cancelled: Callable[[], bool] = never,
) -> Targets:
    """Square crops around each view's mask, resampled to `size`: the pixels go where the object is.

    A crop is never enlarged beyond the photo's own resolution by more than it has to be, and a view whose mask is full
    keeps the whole picture. Raises InputError when the views have no cameras, and Cancelled between two views.
    """
    if views.cameras is None:
        raise InputError(
            "The views have no cameras.", hint="Give cameras.json, the six-view rig, or let SfM pose them."
        )
    crops, depths, inside, boxes = [], [], [], []
    for n in range(len(views)):
        check(cancelled)
        x, y, side = _square(views.images[n, ..., 3] > 127, margin)
        boxes.append((x, y, side))
        crops.append(_resample(_window(views.images[n], x, y, side), size))
        inside.append(_known(views, n, x, y, side, size))
        if views.depths is not None:
            depths.append(_nearest(_window(views.depths[n], x, y, side), size))
    x, y, side = torch.tensor(boxes, dtype=torch.float64).unbind(-1)
    scale = size / side
    cameras = replace(
        views.cameras,
        fx=views.cameras.fx * scale,
        fy=views.cameras.fy * scale,
        cx=(views.cameras.cx - x) * scale,
        cy=(views.cameras.cy - y) * scale,
        height=size,
        width=size,
    )
    known = torch.stack(inside)
    return Targets(
        images=torch.stack(crops).to(device),
        depths=torch.stack(depths).to(device) if depths else None,
        known=None if bool(known.all()) else known.to(device),
        cameras=cameras,
    )


def _square(mask: Tensor, margin: float) -> tuple[int, int, int]:
    """Left, top and side, in whole pixels, of a square around a mask (H, W); it may reach over the picture's edge."""
    H, W = mask.shape
    rows, cols = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    if len(rows) == 0:
        rows, cols = torch.arange(H), torch.arange(W)
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(cols[0]), int(cols[-1]) + 1
    side = int(round(max(bottom - top, right - left) * (1 + 2 * margin))) + 2
    side = min(side, max(H, W))
    return (left + right - side) // 2, (top + bottom - side) // 2, side


def _window(image: Tensor, x: int, y: int, side: int) -> Tensor:
    """The window of (H, W, ...) at (x, y), zero outside the picture."""
    H, W = image.shape[:2]
    window = image.new_zeros(side, side, *image.shape[2:])
    x0, x1, y0, y1 = max(x, 0), min(x + side, W), max(y, 0), min(y + side, H)
    window[y0 - y : y1 - y, x0 - x : x1 - x] = image[y0:y1, x0:x1]
    return window


def _known(views: ViewSet, n: int, x: int, y: int, side: int, size: int) -> Tensor:
    """(size, size) bool: which pixels of a crop come from pixels of the photo alone."""
    within = min(x, y) >= 0 and x + side <= views.width and y + side <= views.height
    if views.known is None and within:
        return torch.ones(size, size, dtype=torch.bool)
    photo = torch.ones(views.height, views.width) if views.known is None else views.known[n].float()
    return _filtered(_window(photo, x, y, side)[..., None], (size, size))[..., 0] > 0.999


def _resample(image: Tensor, size: int) -> Tensor:
    """(S, S, 4) uint8 straight alpha to (size, size, 4), filtered in linear light with premultiplied alpha."""
    if len(image) == size:
        return image
    rgba = image.float() / 255
    premultiplied = torch.cat([srgb_to_linear(rgba[..., :3]) * rgba[..., 3:], rgba[..., 3:]], -1)
    small = _filtered(premultiplied, (size, size))
    alpha = small[..., 3:].clamp(0, 1)
    straight = linear_to_srgb((small[..., :3] / alpha.clamp(min=1e-4)).clamp(0, 1))
    return (torch.cat([straight, alpha], -1) * 255).round().to(torch.uint8)


def _filtered(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(H, W, C) float to (*size, C)."""
    planes = image.permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(planes, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0)


def _nearest(depth: Tensor, size: int) -> Tensor:
    """(S, S) to (size, size) without mixing depths; pixel centres map to pixel centres."""
    index = ((torch.arange(size, dtype=torch.float64) + 0.5) * len(depth) / size).long().clamp(max=len(depth) - 1)
    return depth[index][:, index]
