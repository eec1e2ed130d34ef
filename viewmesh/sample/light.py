"""The studio the robot stands in: an analytic environment of soft boxes over a gradient, and how to sample it.

Linear radiance, no unit; directions point away from the object, y up. The light is at infinity, so that a
latitude-longitude map explains it exactly. Knows nothing of the robot.
"""

import functools
import math
from collections.abc import Callable

import numpy as np

from viewmesh.sample.jit import entry, fingerprint, kernel
from viewmesh.sample.shapes import smoothstep

ROWS, COLUMNS = 64, 128  # cells of the sampling table

# soft boxes: direction of the middle (need not be unit), half width and half height (tangent of the angle), radiance
BOXES = (
    (-0.75, 0.75, 0.75, 0.42, 0.36, 8.2, 7.5, 6.5),  # key: large and warm, upper left in front
    (1.0, 0.35, 0.35, 0.22, 0.62, 2.6, 3.1, 3.9),  # fill: tall and cool, from the right
    (0.55, 0.45, -1.0, 0.16, 0.70, 6.5, 6.9, 7.6),  # rim: a strip behind
    (-0.8, -0.1, -0.75, 0.30, 0.40, 2.6, 2.2, 1.8),  # back fill, warm
    (0.15, -1.0, 0.25, 0.55, 0.30, 1.3, 1.2, 1.1),  # a bounce board below
)


@kernel
def radiance(x: float, y: float, z: float) -> tuple[float, float, float]:
    """Radiance from the unit direction (x, y, z)."""
    up = 0.5 + 0.5 * y
    r, g, b = 0.20 + 0.42 * up, 0.18 + 0.47 * up, 0.17 + 0.54 * up
    horizon = 0.12 * math.exp(-y * y * 18.0)
    r, g, b = r + horizon, g + 0.9 * horizon, b + 0.75 * horizon
    for box in BOXES:
        cx, cy, cz, half_u, half_v, red, green, blue = box
        length = math.sqrt(cx * cx + cy * cy + cz * cz)
        cx, cy, cz = cx / length, cy / length, cz / length
        toward = x * cx + y * cy + z * cz
        if toward <= 0.1:
            continue
        # the box's plane: u is horizontal, v completes the frame
        flat = math.sqrt(cx * cx + cz * cz)
        ux, uz = cz / flat, -cx / flat
        u = (x * ux + z * uz) / toward
        vx, vy, vz = cy * uz, cz * ux - cx * uz, -cy * ux
        v = (x * vx + y * vy + z * vz) / toward
        shape = (1 - smoothstep(half_u - 0.06, half_u + 0.06, abs(u))) * (
            1 - smoothstep(half_v - 0.06, half_v + 0.06, abs(v))
        )
        r, g, b = r + red * shape, g + green * shape, b + blue * shape
    return r, g, b


@kernel
def direction(u: float, v: float) -> tuple[float, float, float]:
    """The unit direction of (u, v) in [0, 1)²: u around, v down from +y; u = atan2(x, -z) / 2π as elsewhere here."""
    theta, phi = math.pi * v, 2 * math.pi * u
    s = math.sin(theta)
    return s * math.sin(phi), math.cos(theta), -s * math.cos(phi)


@functools.cache
def _panorama(version: int) -> Callable:
    @entry
    def panorama(image):
        rows, columns = image.shape[0], image.shape[1] if version else 0  # see jit.fingerprint
        for i in range(rows):
            for j in range(columns):
                x, y, z = direction((j + 0.5) / columns, (i + 0.5) / rows)
                image[i, j, 0], image[i, j, 1], image[i, j, 2] = radiance(x, y, z)

    return panorama


def panorama(rows: int, columns: int) -> np.ndarray:
    """The environment as a (rows, columns, 3) float64 latitude-longitude map, row 0 = +y."""
    image = np.empty((rows, columns, 3))
    _panorama(fingerprint())(image)
    return image


@functools.cache
def sampling_table() -> np.ndarray:
    """(ROWS * COLUMNS + 1,) float64 cumulative probability of the cells, by luminance and solid angle."""
    luminance = panorama(ROWS, COLUMNS) @ np.array([0.2126, 0.7152, 0.0722])
    solid = np.sin((np.arange(ROWS) + 0.5) * math.pi / ROWS)
    weight = (luminance * solid[:, None]).ravel()
    table = np.concatenate([[0.0], np.cumsum(weight)])
    return table / table[-1]


@kernel
def sample(table, u: float, v: float) -> tuple[float, float, float, float]:
    """A direction by importance and its density per solid angle; (u, v) in [0, 1)²."""
    low, high = 0, table.shape[0] - 1
    while high - low > 1:
        middle = (low + high) // 2
        if table[middle] <= u:
            low = middle
        else:
            high = middle
    share = table[low + 1] - table[low]
    within = (u - table[low]) / share
    i, j = low // COLUMNS, low % COLUMNS
    row = (i + v) / ROWS
    x, y, z = direction((j + within) / COLUMNS, row)
    return x, y, z, share * ROWS * COLUMNS / (2 * math.pi * math.pi * max(math.sin(math.pi * row), 1e-6))


@kernel
def density(table, x: float, y: float, z: float) -> float:
    """The density per solid angle with which `sample` picks the unit direction (x, y, z)."""
    row = math.acos(min(max(y, -1.0), 1.0)) / math.pi
    u = math.atan2(x, -z) / (2 * math.pi)
    u -= math.floor(u)
    i, j = min(int(row * ROWS), ROWS - 1), min(int(u * COLUMNS), COLUMNS - 1)
    cell = i * COLUMNS + j
    share = table[cell + 1] - table[cell]
    return share * ROWS * COLUMNS / (2 * math.pi * math.pi * max(math.sin(math.pi * row), 1e-6))
