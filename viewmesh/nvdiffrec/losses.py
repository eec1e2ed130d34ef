"""Losses of the fit, each a pure function. Images are linear light, premultiplied where composited."""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from viewmesh.geometry.rows import rows_at
from viewmesh.render.shading import SRGB_KNEE, linear_to_srgb


def over(color: Tensor, alpha: Tensor, background: Tensor) -> Tensor:
    """Premultiplied color (..., 3) and alpha (..., 1) over a background."""
    return color + (1 - alpha) * background


def log_srgb_l1(image: Tensor, target: Tensor) -> Tensor:
    """nvdiffrec's image loss (Munkberg et al. 2022, sec. 4): L1 after log(1 + x) and the sRGB curve."""
    ours: Tensor = _LogSrgb.apply(image)  # pyright: ignore[reportAssignmentType]
    return (ours - _LogSrgb.apply(target)).abs().mean()


class _LogSrgb(torch.autograd.Function):
    """The sRGB curve of log(1 + x), x in [0, 65535]: its slope follows from its value, for whole images a fraction of
    what autograd computes."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        clamped = x.clamp(0, 65535)
        log = torch.log1p(clamped)
        out = linear_to_srgb(log)
        if ctx.needs_input_grad[0]:
            steep = torch.where(log <= SRGB_KNEE, 12.92, (out + 0.055) / (2.4 * log))
            ctx.save_for_backward(steep / (1 + clamped) * (clamped == x))
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (slope,) = ctx.saved_tensors
        return gradient * slope


def mask_l2(alpha: Tensor, target: Tensor) -> Tensor:
    """alpha is clamped first: antialiasing may leave [0, 1]."""
    return ((alpha.clamp(0, 1) - target) ** 2).mean()


def material_l1(material: Tensor, other: Tensor) -> Tensor:
    """Mean absolute difference of two looks at P pixels' material (P, C) each; 0 where no pixel is covered."""
    return (material - other).abs().sum() / max(material.numel(), 1)


def depth_l1(depth: Tensor, target: Tensor, *, limit: float = 0.1) -> Tensor:
    """Mean absolute difference where both are known (> 0); a pixel more than `limit` off has no say beyond that."""
    known = (depth > 0) & (target > 0)
    error = (depth - target).abs().clamp(max=limit)
    return torch.where(known, error, 0).sum() / known.sum().clamp(min=1)


def sign_entropy(sdf: Tensor, crossings: Tensor) -> Tensor:
    """Pulls the ends of crossing lattice edges towards each other's sign: removes floaters. crossings, as sdf: at how
    many such edges each point is.

    DMTet, eq. 2: the mean over these edges of the cross-entropy of either end with the other's sign. For a distance d
    whose other end has the other sign that is softplus(|d|), whatever the other end is.
    """
    return (softplus(sdf.abs()) * crossings).sum() / (crossings.sum() / 2).clamp(min=1)


@torch.no_grad()
def crossings_of(sdf: Tensor, edges: Tensor) -> Tensor:
    """At how many edges (E, 2) whose ends differ in sign each point of sdf (G,) is."""
    a, b = (sdf < 0)[edges].unbind(1)
    return torch.zeros_like(sdf).index_add_(0, edges.flatten(), (a != b).to(sdf).repeat_interleave(2))


@torch.no_grad()
def box_crossings(field: Tensor) -> Tensor:
    """`crossings_of` for the edges between neighbours of a cubic lattice (X, Y, Z)."""
    inside, total = field < 0, torch.zeros_like(field)
    for axis in range(3):
        n = field.shape[axis] - 1
        crossing = inside.narrow(axis, 0, n) != inside.narrow(axis, 1, n)
        total.narrow(axis, 0, n).add_(crossing)
        total.narrow(axis, 1, n).add_(crossing)
    return total


def box_smoothness(field: Tensor, band: float) -> Tensor:
    """Mean squared Laplacian of a cubic lattice's field (X, Y, Z) at its inner points within |value| < band."""
    near = field.detach()[INNER].abs() < band
    laplacian: Tensor = _BoxLaplacian.apply(field)  # pyright: ignore[reportAssignmentType]
    return (laplacian**2 * near).sum() / near.sum().clamp(min=1)


INNER = (slice(1, -1),) * 3
AROUND = [(*INNER[:k], side, *INNER[k + 1 :]) for k in range(3) for side in (slice(2, None), slice(0, -2))]


class _BoxLaplacian(torch.autograd.Function):
    """The mean of the six neighbours less the value, (X - 2, Y - 2, Z - 2). Slices in place, both ways: autograd's own
    gradient of each is another field of zeros."""

    @staticmethod
    def forward(ctx, field: Tensor) -> Tensor:
        ctx.shape = field.shape
        total = field[AROUND[0]] + field[AROUND[1]]
        for side in AROUND[2:]:
            total += field[side]
        return torch.sub(total.div_(6), field[INNER])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        out = gradient.new_zeros(ctx.shape)
        out[INNER] = -gradient
        gradient = gradient / 6
        for side in AROUND:
            out[side] += gradient
        return out


def field_smoothness(corner: Tensor, center: Tensor, band: float) -> Tensor:
    """Mean squared Laplacian of a BCC lattice field (X+1, Y+1, Z+1), (X, Y, Z) within |value| < band; 0 if linear."""
    pool = torch.nn.functional.avg_pool3d
    at_center = pool(corner[None, None], 2, 1)[0, 0] - center
    at_corner = pool(center[None, None], 2, 1)[0, 0] - corner[1:-1, 1:-1, 1:-1]
    near_center, near_corner = center.detach().abs() < band, corner[1:-1, 1:-1, 1:-1].detach().abs() < band
    total = (at_center**2 * near_center).sum() + (at_corner**2 * near_corner).sum()
    return total / (near_center.sum() + near_corner.sum()).clamp(min=1)


def laplacian(offsets: Tensor, edges: Tensor, degree: Tensor) -> Tensor:
    """Mean squared umbrella Laplacian of per-vertex offsets (V, 3); edges (E, 2) each once, degree (V, 1)."""
    total = torch.zeros_like(offsets)
    a, b = edges.unbind(1)
    total = total.index_add(0, a, rows_at(offsets, b)).index_add(0, b, rows_at(offsets, a))
    return ((total / degree - offsets) ** 2).sum(-1).mean()


def neutral(light: Tensor) -> Tensor:
    """Mean distance of each texel of the light from grey (nvdiffrec's white-balance prior)."""
    return (light - light.mean(-1, keepdim=True)).abs().mean()


def psnr(image: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of sRGB values in [0, 1]."""
    return -10 * torch.log10(((image - target) ** 2).mean().clamp(min=1e-10))
