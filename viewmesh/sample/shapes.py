"""Signed distances of simple solids, smooth blends and value noise, as scalar kernels.

Distances are negative inside, in the unit of the arguments. Knows nothing of any object.
Source of the distance formulas: derived from the geometry; smooth minimum: the quadratic polynomial blend.
"""

import math

from viewmesh.sample.jit import kernel


@kernel
def clamp(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


@kernel
def smoothstep(low: float, high: float, value: float) -> float:
    t = clamp((value - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


@kernel
def blend(a: float, b: float, radius: float) -> float:
    """The union of two solids with a fillet of about `radius`."""
    h = max(radius - abs(a - b), 0.0) / radius
    return min(a, b) - 0.25 * radius * h * h


@kernel
def ball(x: float, y: float, z: float, radius: float) -> float:
    return math.sqrt(x * x + y * y + z * z) - radius


@kernel
def box(x: float, y: float, z: float, hx: float, hy: float, hz: float, radius: float) -> float:
    """A box of half extents hx, hy, hz (rounding included), its edges rounded by `radius`."""
    qx, qy, qz = abs(x) - hx + radius, abs(y) - hy + radius, abs(z) - hz + radius
    ox, oy, oz = max(qx, 0.0), max(qy, 0.0), max(qz, 0.0)
    return math.sqrt(ox * ox + oy * oy + oz * oz) + min(max(qx, qy, qz), 0.0) - radius


@kernel
def disc(along: float, u: float, v: float, half_length: float, radius: float, rounding: float) -> float:
    """A cylinder about the axis `along`, its rims rounded."""
    q = math.sqrt(u * u + v * v) - radius + rounding
    w = abs(along) - half_length + rounding
    oq, ow = max(q, 0.0), max(w, 0.0)
    return math.sqrt(oq * oq + ow * ow) + min(max(q, w), 0.0) - rounding


@kernel
def ring(along: float, u: float, v: float, radius: float, thickness: float) -> float:
    """A torus about the axis `along`; `thickness` is the radius of its tube."""
    q = math.sqrt(u * u + v * v) - radius
    return math.sqrt(q * q + along * along) - thickness


@kernel
def along_segment(
    x: float, y: float, z: float, ax: float, ay: float, az: float, bx: float, by: float, bz: float
) -> tuple[float, float]:
    """Distance of (x, y, z) to the segment a to b, and how far along it the nearest point lies, 0 to 1."""
    dx, dy, dz = bx - ax, by - ay, bz - az
    px, py, pz = x - ax, y - ay, z - az
    t = clamp((px * dx + py * dy + pz * dz) / (dx * dx + dy * dy + dz * dz), 0.0, 1.0)
    px, py, pz = px - t * dx, py - t * dy, pz - t * dz
    return math.sqrt(px * px + py * py + pz * pz), t


@kernel
def groove(offset: float, width: float, depth: float) -> float:
    """How much deeper a surface lies at `offset` from the middle of a soft groove of half width `width`."""
    t = offset / width
    return depth * math.exp(-t * t)


@kernel
def lattice(i: int, j: int, k: int) -> float:
    """A hash of a lattice point, in [0, 1)."""
    h = (i * 374761393 + j * 668265263 + k * 1440662683) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 1274126177) & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 2246822519) & 0xFFFFFFFF
    return float((h ^ (h >> 15)) & 0xFFFFFF) / 16777216.0


@kernel
def noise(x: float, y: float, z: float) -> float:
    """Value noise of lattice spacing 1, in [0, 1]."""
    fx, fy, fz = math.floor(x), math.floor(y), math.floor(z)
    i, j, k = int(fx), int(fy), int(fz)
    u, v, w = x - fx, y - fy, z - fz
    u, v, w = u * u * (3 - 2 * u), v * v * (3 - 2 * v), w * w * (3 - 2 * w)
    low = (lattice(i, j, k) * (1 - u) + lattice(i + 1, j, k) * u) * (1 - v) + (
        lattice(i, j + 1, k) * (1 - u) + lattice(i + 1, j + 1, k) * u
    ) * v
    high = (lattice(i, j, k + 1) * (1 - u) + lattice(i + 1, j, k + 1) * u) * (1 - v) + (
        lattice(i, j + 1, k + 1) * (1 - u) + lattice(i + 1, j + 1, k + 1) * u
    ) * v
    return low * (1 - w) + high * w


@kernel
def speckle(x: float, y: float, z: float, spacing: float, share: float) -> float:
    """1 within small blobs strewn through space, one lattice cell of `spacing` in `share` of them, else 0."""
    qx, qy, qz = x / spacing, y / spacing, z / spacing
    i, j, k = int(math.floor(qx)), int(math.floor(qy)), int(math.floor(qz))
    if lattice(i, j, k) > share:
        return 0.0
    cx = 0.3 + 0.4 * lattice(i + 101, j, k)
    cy = 0.3 + 0.4 * lattice(i, j + 101, k)
    cz = 0.3 + 0.4 * lattice(i, j, k + 101)
    r = 0.12 + 0.18 * lattice(i + 57, j + 57, k)
    return 1.0 if ball(qx - i - cx, qy - j - cy, qz - k - cz, r) < 0 else 0.0
