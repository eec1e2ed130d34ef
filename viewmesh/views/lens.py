"""Lenses: intrinsics with distortion, and the photo as a pinhole would have seen it."""

from dataclasses import dataclass, replace
from typing import Literal

import cv2
import numpy as np

LensModel = Literal["pinhole", "opencv", "fisheye"]


@dataclass(frozen=True)
class Lens:
    """One view's intrinsics, pixels; pixel (row i, column j) has its centre at (i + 0.5, j + 0.5).

    radial: k1 to k4, tangential: p1, p2 of OpenCV's models: with `opencv` the distorted radius is
    r (1 + k1 r^2 + k2 r^4 + k3 r^6 + k4 r^8) plus the tangential terms (Brown-Conrady), with `fisheye` it is
    t (1 + k1 t^2 + k2 t^4 + k3 t^6 + k4 t^8) of the angle t to the axis (Kannala-Brandt).
    """

    fx: float
    fy: float
    cx: float
    cy: float
    width: int
    height: int
    model: LensModel = "pinhole"
    radial: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    tangential: tuple[float, float] = (0.0, 0.0)

    @property
    def distorted(self) -> bool:
        return self.model == "fisheye" or (self.model == "opencv" and any(self.radial + self.tangential))

    def resized(self, width: int, height: int) -> "Lens":
        sx, sy = width / self.width, height / self.height
        return replace(
            self, fx=self.fx * sx, fy=self.fy * sy, cx=self.cx * sx, cy=self.cy * sy, width=width, height=height
        )

    def as_pinhole(self) -> "Lens":
        return replace(self, model="pinhole", radial=(0.0,) * 4, tangential=(0.0, 0.0))


def distorted_pixels(lens: Lens) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel of the undistorted image lies in the photo: x, y (H, W) float32; -1e4 where it saw nothing.

    The undistorted image keeps the lens's focal length, principal point and size.
    """
    x = ((np.arange(lens.width) + 0.5 - lens.cx) / lens.fx)[None, :]
    y = ((np.arange(lens.height) + 0.5 - lens.cy) / lens.fy)[:, None]
    radius = np.hypot(x, y)
    r = np.arctan(radius) if lens.model == "fisheye" else radius
    factor, valid = _radial(r, lens.radial)
    if lens.model == "fisheye":
        factor = factor * np.where(radius > 1e-9, r / np.maximum(radius, 1e-9), 1.0)
    p1, p2 = lens.tangential if lens.model == "opencv" else (0.0, 0.0)
    r2 = radius**2
    dx = x * factor + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)
    dy = y * factor + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y
    u = np.where(valid, dx * lens.fx + lens.cx, -1e4)
    v = np.where(valid, dy * lens.fy + lens.cy, -1e4)
    return np.clip(u, -1e4, 1e5).astype(np.float32), np.clip(v, -1e4, 1e5).astype(np.float32)


def resample(image: np.ndarray, pixels: tuple[np.ndarray, np.ndarray], *, nearest: bool = False) -> np.ndarray:
    """image (H, W) or (H, W, C) looked up at `distorted_pixels`; 0 where the lens saw nothing."""
    x, y = (p - 0.5 for p in pixels)  # OpenCV's pixel centres are integers
    how = cv2.INTER_NEAREST if nearest else cv2.INTER_LINEAR
    return cv2.remap(image, x, y, how, borderMode=cv2.BORDER_CONSTANT, borderValue=0)


def seen(lens: Lens, pixels: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """(H, W) bool: the undistorted pixels that lie inside the photo."""
    u, v = pixels
    return (u >= 0) & (u <= lens.width) & (v >= 0) & (v <= lens.height)


def _radial(r: np.ndarray, k: tuple[float, float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """1 + k1 r^2 + k2 r^4 + k3 r^6 + k4 r^8, and whether r lies before the radius where the polynomial folds back."""
    r2 = r * r
    factor = 1 + r2 * (k[0] + r2 * (k[1] + r2 * (k[2] + r2 * k[3])))
    probe = np.linspace(0, float(r.max()), 512)
    p2 = probe * probe
    slope = 1 + p2 * (3 * k[0] + p2 * (5 * k[1] + p2 * (7 * k[2] + p2 * 9 * k[3])))
    folds = np.flatnonzero(slope <= 0)
    limit = probe[folds[0]] if len(folds) else np.inf
    return factor, r < limit
