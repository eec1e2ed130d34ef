"""Light from far away: a cube map of radiance, prefiltered for split-sum shading, and its lat-long images.

A base is (6, R, R, 3) linear radiance in the faces of `cubemap` (OpenGL order, +y up, in the frame that is shaded).
Prefiltering is a constant linear operator of the base (Karis 2013, "Real Shading in Unreal Engine 4"): it is computed
once per resolution, dense for small bases and sparse for large ones, and its gradient is its transpose.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from viewmesh.render.backend_torch import TorchRasterizer
from viewmesh.render.cubemap import directions, solid_angles

DENSE_UP_TO = 16  # the largest base that gets dense operators
LOBE_CUT = 2e-3  # sparse operators drop weights below this part of a lobe's peak


@dataclass(frozen=True)
class Prefiltered:
    """What shading looks up.

    diffuse: (6, D, D, 3) irradiance / pi. specular: the base itself, then maps (6, S, S, 3) of growing roughness.
    roughness: (L,) of each specular map; rougher or smoother surfaces take the last or the first.
    """

    diffuse: Tensor  # (6, D, D, 3)
    specular: tuple[Tensor, ...]
    roughness: Tensor  # (L,)

    def level(self, roughness: Tensor) -> Tensor:
        """Continuous index into specular for a roughness (P,), differentiable."""
        low = self.roughness[:, None]
        return ((roughness - low[:-1]) / (low[1:] - low[:-1])).clamp(0, 1).sum(0)


@dataclass(frozen=True, eq=False)
class Light:
    """The prefilter of bases of one resolution R.

    rows: resolutions of the maps that the operator makes: specular levels 1, 2, ..., then the diffuse map.
    operator: (sum of 6 r^2 over rows, 6 R^2), dense or sparse CSR; transpose: its transpose if sparse.
    roughness: (L,) of the specular maps, where the operator is.
    """

    resolution: int
    roughness: Tensor
    rows: tuple[int, ...]
    operator: Tensor
    transpose: Tensor | None

    def prefilter(self, base: Tensor) -> Prefiltered:
        """base: (6, R, R, 3) with the R this Light was built for. Differentiable, linear."""
        flat = base.reshape(-1, 3)
        if self.transpose is None:
            out = self.operator.to(base.dtype) @ flat
        else:
            out = _SparseProduct.apply(flat, self.operator, self.transpose)
        maps = [
            m.reshape(6, r, r, 3) for m, r in zip(out.split([6 * r * r for r in self.rows]), self.rows, strict=True)
        ]
        return Prefiltered(maps[-1], (base, *maps[:-1]), self.roughness.to(base.dtype))


def build_light(
    resolution: int, device: torch.device | str = "cpu", *, levels: Sequence[tuple[int, float]] | None = None
) -> Light:
    """The Light for bases (6, R, R, 3).

    levels: (resolution, roughness) of each specular map, roughness growing; the first must have resolution R and is the
    base itself, whose texels are wider than its lobe. None: five levels for R < 32, six above.
    """
    chosen = tuple(default_levels(resolution) if levels is None else levels)
    roughness = [r for _, r in chosen]
    if chosen[0][0] != resolution or roughness != sorted(set(roughness)):
        raise ValueError(
            f"The first of the levels must have resolution {resolution}, and roughness must grow: {chosen}"
        )
    return _build(resolution, torch.device(device), chosen)


def default_levels(resolution: int) -> tuple[tuple[int, float], ...]:
    """(resolution, roughness) of the specular maps of a base."""
    R = resolution
    if R < 32:
        sizes = ((R, 0.1), (R // 2, 0.3), (R // 2, 0.5), (R // 4, 0.75), (R // 4, 1.0))
    else:
        sizes = ((R, 0.08), (R // 2, 0.18), (R // 2, 0.3), (R // 4, 0.5), (R // 8, 0.75), (R // 8, 1.0))
    return tuple((max(r, min(4, R)), roughness) for r, roughness in sizes)


@cache
def _build(R: int, device: torch.device, levels: tuple[tuple[int, float], ...]) -> Light:
    specular = [(size, roughness) for size, roughness in levels[1:]]
    diffuse = min(R, 8 if R < 32 else 16)
    lobes = [*specular, (diffuse, None)]
    with torch.no_grad():
        if R <= DENSE_UP_TO:
            operator = torch.cat([_lobe_rows(size, rough, R, device, 0.0) for size, rough in lobes])
            transpose = None
        else:
            parts = [_lobe_rows(size, rough, R, device, LOBE_CUT) for size, rough in lobes]
            coo = torch.cat([p.to_sparse_coo() for p in parts]).coalesce()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
                operator, transpose = coo.to_sparse_csr(), coo.t().coalesce().to_sparse_csr()
    roughness = torch.tensor([r for _, r in levels]).to(device)
    return Light(R, roughness, tuple(size for size, _ in lobes), operator, transpose)


def _lobe_rows(size: int, roughness: float | None, R: int, device: torch.device, cut: float) -> Tensor:
    """Weights (6 size^2, 6 R^2) of one map, each row summing to one; roughness None is the cosine lobe.

    GGX with N = V = reflection: weight = max(N.L, 0) * D(N.H) * solid angle, alpha = roughness^2.
    """
    fine = max(1, 32 // R)  # small bases: quadrature points per texel and axis
    n = directions(size, device).reshape(-1, 3)
    light = directions(R * fine, device).reshape(-1, 3)
    area = solid_angles(R * fine, device).reshape(-1)
    rows = max(1, 2**25 // len(light))
    parts = []
    for some in n.split(rows):
        cosine = (some @ light.T).clamp_(-1, 1)
        weight = cosine.clamp_min(0) * area
        if roughness is not None:
            a2 = roughness**4
            # N.H^2 = (1 + N.L) / 2; written so that it stays exact near the peak
            weight = weight * (a2 / (a2 + (1 - a2) * (1 - cosine) / 2)) ** 2
        if fine > 1:
            weight = weight.reshape(len(some), 6, R, fine, R, fine).sum((3, 5)).reshape(len(some), -1)
        if cut > 0:
            weight = torch.where(weight < cut * weight.amax(1, keepdim=True), 0.0, weight)
        weight = weight / weight.sum(1, keepdim=True)
        parts.append(weight.to_sparse_coo() if cut > 0 else weight)
    return torch.cat(parts)


class _SparseProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, operator: Tensor, transpose: Tensor):
        ctx.transpose = transpose
        return operator @ x

    @staticmethod
    def backward(ctx, g: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.transpose @ g.contiguous(), None, None


# ------------------------------------------------------------------------------------------- latitude-longitude


def latlong_directions(height: int, device: torch.device | str = "cpu") -> Tensor:
    """Unit directions (H, 2H, 3) of a lat-long image: row 0 at +y, column of d at atan2(d.x, -d.z) / 2 pi mod 1."""
    theta = (torch.arange(height, dtype=torch.float64, device=device) + 0.5) * (math.pi / height)
    phi = (torch.arange(2 * height, dtype=torch.float64, device=device) + 0.5) * (math.pi / height)
    theta, phi = torch.meshgrid(theta, phi, indexing="ij")
    d = torch.stack([theta.sin() * phi.sin(), theta.cos(), -theta.sin() * phi.cos()], -1)
    return d.float()


def sample_latlong(image: Tensor, direction: Tensor) -> Tensor:
    """A lat-long image (H, 2H, 3) bilinearly in directions (..., 3)."""
    d = torch.nn.functional.normalize(direction, dim=-1)
    u = torch.atan2(d[..., 0], -d[..., 2]) / (2 * math.pi) % 1.0
    v = torch.arccos(d[..., 1].clamp(-1, 1)) / math.pi
    wide = torch.cat([image[:, -1:], image, image[:, :1]], 1)  # columns wrap, rows clamp
    W = image.shape[1]
    return TorchRasterizer().texture(wide, torch.stack([(u * W + 1) / (W + 2), v], -1), boundary="clamp")


def sample_cube(base: Tensor, direction: Tensor) -> Tensor:
    """A cube map (6, R, R, C) bilinearly in directions (..., 3), continuous across edges."""
    return TorchRasterizer().texture(base, direction, boundary="cube")


def latlong(base: Tensor, height: int) -> Tensor:
    """A base (6, R, R, 3) as a lat-long image (H, 2H, 3), TexturedMesh's convention."""
    return sample_cube(base, latlong_directions(height, base.device).to(base.dtype))


def from_latlong(image: Tensor, resolution: int) -> Tensor:
    """A lat-long image (H, 2H, 3) as a base (6, R, R, 3), averaged over texels: a small light keeps its energy."""
    R = resolution
    fine = max(2, -(-image.shape[0] // R))  # about two points per pixel of the image
    d = directions(R * fine, image.device).to(image.dtype)
    area = solid_angles(R * fine, image.device).to(image.dtype)[..., None]
    value = sample_latlong(image, d) * area
    split = (6, R, fine, R, fine, -1)
    return value.reshape(split).sum((2, 4)) / area.reshape(split).sum((2, 4))


def rotate(environment: Tensor, rotation: Tensor) -> Tensor:
    """The environment, a base (6, R, R, 3) or a lat-long image (H, 2H, 3), turned by rotation (3, 3).

    Light from d comes from rotation @ d afterwards.
    """
    turn = rotation.to(environment)
    if environment.ndim == 4:
        d = directions(environment.shape[1], environment.device).to(environment.dtype)
        return sample_cube(environment, d @ turn)
    return sample_latlong(environment, latlong_directions(environment.shape[0], environment.device).to(turn) @ turn)


def studio(resolution: int = 16, device: torch.device | str = "cpu") -> Tensor:
    """A neutral base (6, R, R, 3) for objects whose light is unknown: bright above and in front, dim below."""
    d = directions(resolution, device)
    key = torch.nn.functional.normalize(torch.tensor([0.4, 0.7, 0.6]), dim=0).to(d)
    value = 0.75 + 0.25 * d[..., 1] + 1.5 * (d @ key).clamp_min(0) ** 8
    return value[..., None].expand(-1, -1, -1, 3).contiguous()
