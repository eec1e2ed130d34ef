"""The ray tracer that photographs the robot: sphere tracing, GGX and Lambert, sampled light, one cached bounce.

Deliberately shares nothing with `viewmesh.render`: what that optimises is tested on pictures it could not have made.
Visibility of light goes by a trilinear grid of distances; what a camera sees goes by the exact field. Light that
reaches a point by way of the robot itself is read from `bounce.py`'s grid of radiance.
Each light sample and each BRDF sample is weighted by the balance heuristic (Veach 1997); GGX normals are sampled as
visible ones (Heitz 2018); the sample points are an additive recurrence (Roberts 2018), shifted at random per pixel.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from viewmesh.sample.fields import HALF
from viewmesh.sample.jit import entry, fingerprint, kernel
from viewmesh.sample.light import density, radiance, sample
from viewmesh.sample.paint import paint_at
from viewmesh.sample.robot import AABB, STEP, distance, normal
from viewmesh.sample.shapes import lattice

MISS = -1.0
# Roberts' recurrence for five dimensions: powers of 1 / g, g the root of g^6 = g + 1
_G = 1.1347241384015194
RECURRENCE = tuple((1 / _G**k) % 1.0 for k in range(1, 6))


@dataclass(frozen=True)
class Studio:
    """What rays need to know beside the exact field.

    grid: (n, n, n) float32 distances over [-HALF, HALF]³; glow: (m, m, m, 3) float32 radiance leaving the surface near
    each cell (`bounce.py`); table: the light's sampling table.
    """

    grid: np.ndarray
    glow: np.ndarray
    table: np.ndarray


@kernel
def trilinear(grid, x: float, y: float, z: float) -> float:
    n = grid.shape[0]
    scale = (n - 1) / (2 * HALF)
    u, v, w = (x + HALF) * scale, (y + HALF) * scale, (z + HALF) * scale
    i, j, k = min(int(u), n - 2), min(int(v), n - 2), min(int(w), n - 2)
    u, v, w = u - i, v - j, w - k
    a = (grid[i, j, k] * (1 - w) + grid[i, j, k + 1] * w) * (1 - v) + (
        grid[i, j + 1, k] * (1 - w) + grid[i, j + 1, k + 1] * w
    ) * v
    b = (grid[i + 1, j, k] * (1 - w) + grid[i + 1, j, k + 1] * w) * (1 - v) + (
        grid[i + 1, j + 1, k] * (1 - w) + grid[i + 1, j + 1, k + 1] * w
    ) * v
    return a * (1 - u) + b * u


@kernel
def escapes(grid, x: float, y: float, z: float, dx: float, dy: float, dz: float) -> tuple[bool, float, float, float]:
    """Whether a ray from near the surface leaves the robot; else also where it is stopped. By the coarse grid."""
    t = 0.008
    for _ in range(96):
        px, py, pz = x + t * dx, y + t * dy, z + t * dz
        if max(abs(px), abs(py), abs(pz)) >= HALF:
            return True, 0.0, 0.0, 0.0
        d = trilinear(grid, px, py, pz)
        if d < 0.0005:
            return False, px, py, pz
        t += max(0.9 * d, 0.0025)
    return True, 0.0, 0.0, 0.0


@kernel
def first_hit(
    grid, ox: float, oy: float, oz: float, dx: float, dy: float, dz: float, spread: float
) -> tuple[float, float]:
    """Ray parameter t where the ray (unit direction) meets the exact field, MISS if nowhere; and how nearly it missed:
    the least distance over the radius `spread * t` of a pixel. The grid only helps to skip empty space."""
    t, end, nearest = 0.0, 1e9, 1e9
    margin = max(0.01, 4.0 * spread)
    for o, d, high in ((ox, dx, AABB[1][0]), (oy, dy, AABB[1][1]), (oz, dz, AABB[1][2])):
        inverse = 1.0 / (d if abs(d) > 1e-12 else 1e-12)
        one, two = (-high - margin - o) * inverse, (high + margin - o) * inverse
        t, end = max(t, min(one, two)), min(end, max(one, two))
    if t >= end:
        return MISS, 1e9
    before = t
    for _ in range(400):
        x, y, z = ox + t * dx, oy + t * dy, oz + t * dz
        d = trilinear(grid, x, y, z) if max(abs(x), abs(y), abs(z)) < HALF else 0.0
        # the grid's own error is well below a cell
        d = d - 0.01 if d > 0.03 else distance(x, y, z)
        if d < 2e-5:
            low, high = before, t
            if d < 0:  # overstepped: halve back to the surface
                for _ in range(24):
                    middle = 0.5 * (low + high)
                    if distance(ox + middle * dx, oy + middle * dy, oz + middle * dz) < 0:
                        high = middle
                    else:
                        low = middle
                t = high
            return t, 0.0
        nearest = min(nearest, d / (spread * t))
        before = t
        t += max(STEP * d, 2e-5)
        if t > end:
            break
    return MISS, nearest


@kernel
def incoming(studio, x: float, y: float, z: float, dx: float, dy: float, dz: float) -> tuple[float, float, float]:
    """Radiance that reaches (x, y, z) from the direction: the light's, or what leaves the robot there."""
    grid, glow, _ = studio
    free, px, py, pz = escapes(grid, x, y, z, dx, dy, dz)
    if free:
        return radiance(dx, dy, dz)
    m = glow.shape[0]
    scale = m / (2 * HALF)
    i, j, k = int((px + HALF) * scale), int((py + HALF) * scale), int((pz + HALF) * scale)
    return glow[i, j, k, 0], glow[i, j, k, 1], glow[i, j, k, 2]


@kernel
def frame(nx: float, ny: float, nz: float) -> tuple[float, float, float, float, float, float]:
    """Two unit tangents of a unit normal (Duff et al. 2017)."""
    sign = 1.0 if nz >= 0 else -1.0
    a = -1.0 / (sign + nz)
    b = nx * ny * a
    return 1.0 + sign * nx * nx * a, sign * b, -sign * nx, b, sign + ny * ny * a, -ny


@kernel
def visible_normal(vx: float, vy: float, vz: float, alpha: float, u: float, v: float) -> tuple[float, float, float]:
    """A GGX half vector among those seen from the tangent-space direction (vx, vy, vz) (Heitz 2018, listing 1)."""
    hx, hy, hz = alpha * vx, alpha * vy, vz
    length = math.sqrt(hx * hx + hy * hy + hz * hz)
    hx, hy, hz = hx / length, hy / length, hz / length
    flat = hx * hx + hy * hy
    if flat > 1e-12:
        ax, ay = -hy / math.sqrt(flat), hx / math.sqrt(flat)
    else:
        ax, ay = 1.0, 0.0
    bx, by, bz = -hz * ay, hz * ax, hx * ay - hy * ax
    r, phi = math.sqrt(u), 2 * math.pi * v
    p, q = r * math.cos(phi), r * math.sin(phi)
    s = 0.5 * (1 + hz)
    q = (1 - s) * math.sqrt(max(1 - p * p, 0.0)) + s * q
    w = math.sqrt(max(1 - p * p - q * q, 0.0))
    mx, my, mz = p * ax + q * bx + w * hx, p * ay + q * by + w * hy, q * bz + w * hz
    mx, my, mz = alpha * mx, alpha * my, max(mz, 1e-9)
    length = math.sqrt(mx * mx + my * my + mz * mz)
    return mx / length, my / length, mz / length


@kernel
def shade(studio, x, y, z, vx, vy, vz, footprint, samples, index, shift):
    """Radiance (linear RGB) that leaves the surface point towards the unit direction (vx, vy, vz).

    `samples` pairs of a light and a BRDF sample, numbers `index`.. of the sequence shifted by `shift` (5,).
    """
    table = studio[2]
    nx, ny, nz = normal(x, y, z, footprint)
    facing = nx * vx + ny * vy + nz * vz
    if facing < 0.02:  # a rim seen from just behind: bend the normal into view
        nx, ny, nz = nx + (0.02 - facing) * vx, ny + (0.02 - facing) * vy, nz + (0.02 - facing) * vz
        length = math.sqrt(nx * nx + ny * ny + nz * nz)
        nx, ny, nz = nx / length, ny / length, nz / length
        facing = max(nx * vx + ny * vy + nz * vz, 1e-3)
    red, green, blue, rough, metal = paint_at(x, y, z)
    alpha = max(rough * rough, 0.005)
    a2 = alpha * alpha
    f0r, f0g, f0b = 0.04 + metal * (red - 0.04), 0.04 + metal * (green - 0.04), 0.04 + metal * (blue - 0.04)
    # how often the BRDF sample is a reflection: by how much of the light it carries, roughly
    gloss = 0.25 + 0.75 * metal
    tx, ty, tz, bx, by, bz = frame(nx, ny, nz)
    lvx, lvy = vx * tx + vy * ty + vz * tz, vx * bx + vy * by + vz * bz
    ox, oy, oz = x + 0.004 * nx, y + 0.004 * ny, z + 0.004 * nz
    sum_r, sum_g, sum_b = 0.0, 0.0, 0.0
    for i in range(samples):
        s = index + i + 1
        u0 = (shift[0] + s * RECURRENCE[0]) % 1.0
        u1 = (shift[1] + s * RECURRENCE[1]) % 1.0
        u2 = (shift[2] + s * RECURRENCE[2]) % 1.0
        u3 = (shift[3] + s * RECURRENCE[3]) % 1.0
        u4 = (shift[4] + s * RECURRENCE[4]) % 1.0
        for kind in range(2):
            if kind == 0:
                dx, dy, dz, _ = sample(table, u0, u1)
            else:
                if u4 < gloss:
                    mx, my, mz = visible_normal(lvx, lvy, facing, alpha, u2, u3)
                    c = 2 * (lvx * mx + lvy * my + facing * mz)
                    lx, ly, lz = c * mx - lvx, c * my - lvy, c * mz - facing
                else:
                    r, phi = math.sqrt(u2), 2 * math.pi * u3
                    lx, ly, lz = r * math.cos(phi), r * math.sin(phi), math.sqrt(max(1 - u2, 0.0))
                dx, dy, dz = lx * tx + ly * bx + lz * nx, lx * ty + ly * by + lz * ny, lx * tz + ly * bz + lz * nz
            toward = dx * nx + dy * ny + dz * nz
            if toward <= 1e-4:
                continue
            hx, hy, hz = dx + vx, dy + vy, dz + vz
            length = math.sqrt(hx * hx + hy * hy + hz * hz) + 1e-12
            hx, hy, hz = hx / length, hy / length, hz / length
            nh, vh = nx * hx + ny * hy + nz * hz, max(vx * hx + vy * hy + vz * hz, 1e-4)
            q = nh * nh * (a2 - 1) + 1
            ggx = a2 / (math.pi * q * q)
            smith_v = math.sqrt(a2 + (1 - a2) * facing * facing)
            smith_l = math.sqrt(a2 + (1 - a2) * toward * toward)
            visibility = 0.5 / (toward * smith_v + facing * smith_l)
            # Heitz: D_v = G1 D vh / facing, over 4 vh for the reflection
            pdf_gloss = 2 * facing / (facing + smith_v) * ggx / (4 * facing)
            pdf = density(table, dx, dy, dz) + gloss * pdf_gloss + (1 - gloss) * toward / math.pi
            lr, lg, lb = incoming(studio, ox, oy, oz, dx, dy, dz)
            schlick = (1 - vh) ** 5
            fr, fg, fb = f0r + (1 - f0r) * schlick, f0g + (1 - f0g) * schlick, f0b + (1 - f0b) * schlick
            spec, lambert = ggx * visibility, (1 - metal) / math.pi
            weight = toward / pdf
            sum_r += weight * lr * (fr * spec + (1 - fr) * lambert * red)
            sum_g += weight * lg * (fg * spec + (1 - fg) * lambert * green)
            sum_b += weight * lb * (fb * spec + (1 - fb) * lambert * blue)
    return sum_r / samples, sum_g / samples, sum_b / samples


@kernel
def ray(pose, focal: float, size: int, row: float, column: float) -> tuple[float, float, float, float]:
    """The unit direction through an image point, and its length per unit of z-depth."""
    x, y = (column - 0.5 * size) / focal, (0.5 * size - row) / focal
    norm = math.sqrt(x * x + y * y + 1)
    dx = (pose[0, 0] * x + pose[0, 1] * y - pose[0, 2]) / norm
    dy = (pose[1, 0] * x + pose[1, 1] * y - pose[1, 2]) / norm
    dz = (pose[2, 0] * x + pose[2, 1] * y - pose[2, 2]) / norm
    return dx, dy, dz, norm


@functools.cache
def _photograph(version: int) -> Callable:
    @entry
    def photograph(studio, pose, focal, size, samples, seed, first, last, rgba, depth):
        """`photograph` below, of rows first..last."""
        ex, ey, ez = pose[0, 3], pose[1, 3], pose[2, 3]
        shift, met = np.empty(5), np.empty(25)
        spread = (0.75 if version else 1.0) / focal  # see jit.fingerprint
        for row in range(first, last):
            for column in range(size):
                for k in range(5):
                    shift[k] = lattice(row * 8 + k, column, seed)
                # the ray through the middle decides depth; it and 2 x 2 others whether the pixel is all one
                inner, edge = 0, False
                for probe in range(5):
                    px = 0.5 if probe == 0 else 0.25 + 0.5 * ((probe - 1) % 2)
                    py = 0.5 if probe == 0 else 0.25 + 0.5 * ((probe - 1) // 2)
                    dx, dy, dz, norm = ray(pose, focal, size, row + py, column + px)
                    t, near = first_hit(studio[0], ex, ey, ez, dx, dy, dz, spread)
                    if probe == 0:
                        depth[row, column] = t / norm if t > 0 else 0.0
                        if t < 0 and near > 1.0:
                            break
                    else:
                        met[probe - 1] = t
                    inner += t > 0
                    edge = edge or t < 0
                if inner == 0 and not edge:
                    continue  # the middle is more than a pixel away from the robot
                side = 5 if edge else 2
                if edge:
                    for k in range(25):
                        px, py = (k % 5 + 0.5) / 5, (k // 5 + 0.5) / 5
                        dx, dy, dz, _ = ray(pose, focal, size, row + py, column + px)
                        met[k] = first_hit(studio[0], ex, ey, ez, dx, dy, dz, spread)[0]
                covered = 0
                for k in range(side * side):
                    covered += met[k] > 0
                share = max(1, round(samples / max(covered, 1)))  # a sliver of the robot gets no fewer samples
                index, r, g, b = 0, 0.0, 0.0, 0.0
                for k in range(side * side):
                    t = met[k]
                    if t < 0:
                        continue
                    px, py = (k % side + 0.5) / side, (k // side + 0.5) / side
                    dx, dy, dz, _ = ray(pose, focal, size, row + py, column + px)
                    x, y, z = ex + t * dx, ey + t * dy, ez + t * dz
                    lr, lg, lb = shade(studio, x, y, z, -dx, -dy, -dz, 0.25 * t / focal, share, index, shift)
                    index += share
                    r, g, b = r + lr, g + lg, b + lb
                if covered:
                    rgba[row, column, 0], rgba[row, column, 1] = r / covered, g / covered
                    rgba[row, column, 2], rgba[row, column, 3] = b / covered, covered / (side * side)

    return photograph


def photograph(
    studio: Studio,
    pose: np.ndarray,
    focal: float,
    size: int,
    samples: int,
    seed: int,
    rows: range,
    rgba: np.ndarray,
    depth: np.ndarray,
) -> None:
    """Fills `rows` of one view of the robot: rgba (S, S, 4) and depth (S, S), float64 and given as 0.

    rgba is linear radiance divided by coverage, and coverage; depth is z-depth, 0 where the middle of the pixel misses.
    pose: world_from_camera (4, 4), OpenGL axes; focal in pixels; `samples` pairs of light and BRDF samples per pixel.
    """
    kernels = (studio.grid, studio.glow, studio.table)
    _photograph(fingerprint())(kernels, pose, focal, size, samples, seed, rows.start, rows.stop, rgba, depth)
