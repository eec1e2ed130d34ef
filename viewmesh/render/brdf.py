"""The split-sum table: how much a GGX surface reflects under constant light, by N.V and roughness.

reflectance = f0 * scale + bias (Karis 2013), for Smith's height-correlated GGX (Heitz 2014) and Schlick's Fresnel.
Integrated here over the distribution of visible normals (Heitz 2018), on a fixed lattice of sample points.
"""

import math
from functools import cache

import torch
from torch import Tensor

from viewmesh.render.rasterizer import Rasterizer

SIZE = 64


@cache
def table(device: torch.device, points: int = 610) -> Tensor:
    """(roughness, N.V, 2) = (64, 64, 2) float32 scale and bias at texel centres (i + 0.5) / 64; within 2e-3."""
    grid = (torch.arange(SIZE, dtype=torch.float64, device=device) + 0.5) / SIZE
    i = torch.arange(points, dtype=torch.float64, device=device)  # a Fibonacci lattice
    u1, u2 = (i + 0.5) / points, i * ((math.sqrt(5) - 1) / 2) % 1.0
    radius, phi = u1.sqrt(), math.pi * (u2 - 0.5)  # half the disc: the integrand is even in t1
    t1, t2 = radius * phi.cos(), radius * phi.sin()
    return torch.stack([_integrate(grid[:, None], roughness**2, t1, t2) for roughness in grid]).float()


def _integrate(mu: Tensor, alpha: Tensor, t1: Tensor, t2: Tensor) -> Tensor:
    """Scale and bias (n, 2) at N.V mu (n, 1) for one alpha, over points (t1, t2) of the unit disc."""
    sine = (1 - mu * mu).sqrt()
    # the stretched view direction (x, 0, z); the disc is projected onto the hemisphere around it
    length = ((alpha * sine) ** 2 + mu * mu).sqrt()
    x, z = alpha * sine / length, mu / length
    share = 0.5 * (1 + z)
    along = (1 - share) * (1 - t1 * t1).sqrt() + share * t2
    up = (1 - t1 * t1 - along * along).clamp_min(0).sqrt()
    hx, hy, hz = alpha * (-z * along + x * up), alpha * t1, (x * along + z * up).clamp_min(0)
    norm = (hx * hx + hy * hy + hz * hz).sqrt()
    v_dot_h = ((sine * hx + mu * hz) / norm).clamp(0, 1)
    n_dot_l = 2 * v_dot_h * hz / norm - mu
    towards, away = _lambda(mu, alpha), _lambda(n_dot_l, alpha)
    weight = torch.where(n_dot_l > 0, (1 + towards) / (1 + towards + away), 0.0)  # G2 / G1
    fresnel = (1 - v_dot_h) ** 5
    return torch.stack([((1 - fresnel) * weight).mean(-1), (fresnel * weight).mean(-1)], -1)


def _lambda(cosine: Tensor, alpha: Tensor) -> Tensor:
    """Smith's auxiliary function: G1 = 1 / (1 + lambda)."""
    c2 = (cosine * cosine).clamp(1e-12, 1)
    return 0.5 * ((1 + alpha * alpha * (1 - c2) / c2).sqrt() - 1)


def environment_brdf(n_dot_v: Tensor, roughness: Tensor, rasterizer: Rasterizer) -> Tensor:
    """Scale and bias (P, 2) at N.V and roughness (P,), both clamped to the table; differentiable in both."""
    uv = torch.stack([n_dot_v, roughness], -1)
    return rasterizer.texture(table(uv.device).to(uv.dtype), uv, boundary="clamp")
