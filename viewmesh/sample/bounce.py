"""Light that the robot throws on itself: a grid of the radiance that leaves its surface, diffuse and averaged.

Two passes of gathering: the first sees only the studio, the second also what the first found, so three reflections in
all are accounted for. Metals count as diffuse here: a blurred reflection of a reflection.
"""

import functools
import math
from collections.abc import Callable

import numpy as np

from viewmesh.sample.fields import HALF, grid_distances, in_threads, world_axis
from viewmesh.sample.jit import entry, fingerprint
from viewmesh.sample.light import sampling_table
from viewmesh.sample.paint import paint_at
from viewmesh.sample.robot import distance, normal
from viewmesh.sample.shapes import lattice
from viewmesh.sample.tracer import RECURRENCE, Studio, frame, incoming


@functools.cache
def _gather(version: int) -> Callable:
    @entry
    def gather(studio, rays, first, last, out):
        m = out.shape[0]
        h = 2 * HALF / m * (1.0 if version else 0.0)  # see jit.fingerprint
        for i in range(first, last):
            for j in range(m):
                for k in range(m):
                    x, y, z = (i + 0.5) * h - HALF, (j + 0.5) * h - HALF, (k + 0.5) * h - HALF
                    d = distance(x, y, z)
                    if abs(d) > 1.6 * h:
                        continue
                    nx, ny, nz = normal(x, y, z, 0.003)
                    for _ in range(2):
                        x, y, z = x - 0.9 * d * nx, y - 0.9 * d * ny, z - 0.9 * d * nz
                        d = distance(x, y, z)
                    nx, ny, nz = normal(x, y, z, 0.003)
                    tx, ty, tz, bx, by, bz = frame(nx, ny, nz)
                    r, g, b = 0.0, 0.0, 0.0
                    s0, s1 = lattice(i, j, k), lattice(k, i, j)
                    for s in range(rays):
                        u, v = (s0 + s * RECURRENCE[0]) % 1.0, (s1 + s * RECURRENCE[1]) % 1.0
                        p, q, w = (
                            math.sqrt(u) * math.cos(2 * math.pi * v),
                            math.sqrt(u) * math.sin(2 * math.pi * v),
                            math.sqrt(1 - u),
                        )
                        dx, dy, dz = p * tx + q * bx + w * nx, p * ty + q * by + w * ny, p * tz + q * bz + w * nz
                        lr, lg, lb = incoming(studio, x + 0.004 * nx, y + 0.004 * ny, z + 0.004 * nz, dx, dy, dz)
                        r, g, b = r + lr, g + lg, b + lb
                    red, green, blue, _, _ = paint_at(x, y, z)
                    out[i, j, k, 0], out[i, j, k, 1], out[i, j, k, 2] = (
                        red * r / rays,
                        green * g / rays,
                        blue * b / rays,
                    )

    return gather


@functools.cache
def studio(cells: int = 128, glow_cells: int = 64, rays: int = 32) -> Studio:
    """The light and the robot's grids, ready for `tracer.photograph`. Deterministic."""
    grid = grid_distances(world_axis(cells - 1)).astype(np.float32)
    table = sampling_table()
    glow = np.zeros((glow_cells,) * 3 + (3,), dtype=np.float32)
    for _ in range(2):
        seen, glow = glow, np.zeros_like(glow)
        rows = range(0, glow_cells, 2)
        in_threads(_gather(fingerprint()), [((grid, seen, table), rays, i, i + 2, glow) for i in rows])
    return Studio(grid, glow, table)
