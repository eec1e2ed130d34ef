"""How well a mesh matches views and how near two surfaces are.

Images are compared as NeRF-synthetic's benchmarks do: whole images, sRGB values in [0, 1], both composited on white.
"""

import math

import torch
from torch import Tensor

from viewmesh.geometry.mesh import Mesh
from viewmesh.geometry.nearest import NearestSurface, sample_surface
from viewmesh.render.shading import linear_to_srgb


def psnr(image: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of values in [0, 1], over everything in them; at most 99 (equal images)."""
    mse = float((image.double() - target.double()).square().mean())
    return 99.0 if mse < 10**-9.9 else -10 * math.log10(mse)


def ssim(image: Tensor, target: Tensor) -> float:
    """Structural similarity (Wang et al. 2004) of (H, W, C) in [0, 1]: Gaussian window 11 x 11 of sigma 1.5, K1 0.01,
    K2 0.03, windows that lie wholly within the image, mean over pixels and channels."""
    x, y = (t.double().permute(2, 0, 1)[:, None] for t in (image, target))  # (C, 1, H, W)
    offset = torch.arange(11, dtype=torch.float64, device=x.device) - 5
    g = torch.exp(-(offset**2) / (2 * 1.5**2))
    g = g / g.sum()

    def blur(t: Tensor) -> Tensor:
        t = torch.nn.functional.conv2d(t, g.view(1, 1, 11, 1))
        return torch.nn.functional.conv2d(t, g.view(1, 1, 1, 11))

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return float((((2 * mx * my + c1) * (2 * cov + c2)) / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean())


def mask_iou(coverage: Tensor, target: Tensor) -> float:
    """Intersection over union of two coverages in [0, 1] of one shape, each cut at one half; 1 if both are empty."""
    a, b = coverage >= 0.5, target >= 0.5
    union = int((a | b).sum())
    return 1.0 if union == 0 else int((a & b).sum()) / union


def on_white(rgba: Tensor) -> Tensor:
    """(..., 4) linear, premultiplied alpha, to (..., 3) sRGB values in [0, 1] composited on white."""
    alpha = rgba[..., 3:].clamp(0, 1)
    straight = (rgba[..., :3] / alpha.clamp(min=1e-6)).clamp(0, 1)
    return linear_to_srgb(straight) * alpha + 1 - alpha


def view_on_white(rgba: Tensor) -> Tensor:
    """(..., 4) uint8 sRGB, straight alpha, to (..., 3) float sRGB values in [0, 1] composited on white."""
    rgba = rgba.float() / 255
    return rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]


def chamfer(a: Mesh, b: Mesh, samples: int = 100_000, generator: torch.Generator | None = None) -> float:
    """The mean of both directions' mean distance from area-weighted samples of one mesh to the surface of the other,
    in the meshes' length unit (not squared, not summed)."""
    generator = generator or torch.Generator().manual_seed(0)
    return (point_to_surface(a, b, samples, generator) + point_to_surface(b, a, samples, generator)) / 2


def point_to_surface(source: Mesh, target: Mesh, samples: int, generator: torch.Generator) -> float:
    """Mean distance from area-weighted samples of source to the nearest point of target's surface."""
    source = source.to("cpu")
    points = sample_surface(source, samples, generator).of(source.vertices.double(), source.faces)
    return float(NearestSurface(target).query(points)[1].mean())
