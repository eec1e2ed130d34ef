"""Photo: one view while it is being prepared, and what is done to it before all views share one size."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np

from viewmesh.views import lens as optics
from viewmesh.views.lens import Lens


@dataclass(frozen=True)
class Photo:
    """rgb: (H, W, 3) uint8. coverage: (H, W) uint8 mask of the object, None if not known; 0 where the photo has no
    pixel. known: (H, W) bool, False there, of which the photo says nothing; None if it has all. depth: (H, W) float32
    in world units, 0 = unknown: z-depth, or the distance if depth_along_ray. lens, world_from_camera (4, 4): None until
    posed. focal_px: EXIF's."""

    name: str
    rgb: np.ndarray
    coverage: np.ndarray | None = None
    known: np.ndarray | None = None
    depth: np.ndarray | None = None
    depth_along_ray: bool = False
    lens: Lens | None = None
    world_from_camera: np.ndarray | None = None
    focal_px: float | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.rgb.shape[1], self.rgb.shape[0]


def shrunk(photo: Photo, max_size: int) -> Photo:
    """The photo with its long side at most max_size pixels; depth is sampled, never blended."""
    width, height = photo.size
    factor = max_size / max(width, height)
    if factor >= 1:
        return photo
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return replace(
        photo,
        rgb=_colour(photo, lambda image: cv2.resize(image, size, interpolation=cv2.INTER_AREA)),
        coverage=None if photo.coverage is None else cv2.resize(photo.coverage, size, interpolation=cv2.INTER_AREA),
        known=None if photo.known is None else _all_of(photo.known, size),
        depth=None if photo.depth is None else cv2.resize(photo.depth, size, interpolation=cv2.INTER_NEAREST_EXACT),
        lens=None if photo.lens is None else photo.lens.resized(*size),
        focal_px=None if photo.focal_px is None else photo.focal_px * factor,
    )


def undistorted(photo: Photo) -> Photo:
    """The photo, once it has a lens, as a pinhole of the same focal length would have seen it, its depth along the
    axis; what the lens did not see is masked out."""
    lens = photo.lens
    if lens is None:
        return photo
    if lens.distorted:
        photo = _by_pinhole(photo, lens)
    if photo.depth is None or not photo.depth_along_ray:
        return photo
    return replace(photo, depth=photo.depth * _z_per_ray(lens), depth_along_ray=False)


def _by_pinhole(photo: Photo, lens: Lens) -> Photo:
    pixels = optics.distorted_pixels(lens)
    seen = optics.seen(lens, pixels)
    coverage = photo.coverage
    if coverage is not None:
        coverage = optics.resample(coverage, pixels) * seen
    elif not seen.all():
        coverage = np.where(seen, np.uint8(255), np.uint8(0))
    return replace(
        photo,
        rgb=_colour(photo, lambda image: optics.resample(image, pixels)),
        coverage=coverage,
        known=None if seen.all() else seen.astype(bool),
        depth=None if photo.depth is None else optics.resample(photo.depth, pixels, nearest=True) * seen,
        lens=lens.as_pinhole(),
    )


def _z_per_ray(lens: Lens) -> np.ndarray:
    """cos of the angle between each pixel's ray and the optical axis, (H, W) float32; of a pinhole."""
    x = ((np.arange(lens.width) + 0.5 - lens.cx) / lens.fx)[None, :]
    y = ((np.arange(lens.height) + 0.5 - lens.cy) / lens.fy)[:, None]
    return (1 / np.sqrt(1 + x * x + y * y)).astype(np.float32)


def padded(photo: Photo, width: int, height: int) -> Photo:
    """The photo on a canvas of width x height, top left; what is added is black, masked out, and not known."""
    right, bottom = width - photo.size[0], height - photo.size[1]
    if right == 0 and bottom == 0:
        return photo

    def pad(image: np.ndarray) -> np.ndarray:
        return np.pad(image, [(0, bottom), (0, right)] + [(0, 0)] * (image.ndim - 2))

    return replace(
        photo,
        rgb=pad(photo.rgb),
        coverage=pad(np.full_like(photo.rgb[..., 0], 255) if photo.coverage is None else photo.coverage),
        known=pad(np.ones(photo.rgb.shape[:2], bool) if photo.known is None else photo.known),
        depth=None if photo.depth is None else pad(photo.depth),
        lens=None if photo.lens is None else replace(photo.lens, width=width, height=height),
    )


def _all_of(known: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which pixels of a smaller size come from known ones alone."""
    return cv2.resize(known.astype(np.float32), size, interpolation=cv2.INTER_AREA) > 0.999


def _colour(photo: Photo, resampled: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Resampled colour; where there is a mask, of the object's pixels alone, so that no background bleeds in."""
    if photo.coverage is None:
        return resampled(photo.rgb)
    weight = photo.coverage.astype(np.float32)[..., None] / 255 + 1e-4
    colour, total = resampled(photo.rgb * weight), resampled(weight)
    return np.clip(colour / np.maximum(total, 1e-6)[..., None] + 0.5, 0, 255).astype(np.uint8)
