"""The distance field and the paint in bulk: at given points, and on a regular grid over the world. Threads live here.

Kernels release the GIL and each writes its own slice, so the result does not depend on the number of threads.
"""

import functools
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from viewmesh import cpus
from viewmesh.sample.jit import entry, fingerprint
from viewmesh.sample.paint import paint_at
from viewmesh.sample.robot import distance

HALF = 0.53  # the grid covers [-HALF, HALF]³, a little more than the robot


def in_threads(work: Callable[..., None], jobs: Iterable[tuple]) -> None:
    """Runs `work(*job)` for each job on all cores of this process, and waits."""
    with ThreadPoolExecutor(cpus.usable()) as pool:
        for done in [pool.submit(work, *job) for job in jobs]:
            done.result()


def world_axis(cells: int) -> np.ndarray:
    """(cells + 1,) float64: the grid's points along each axis of the world."""
    return np.linspace(-HALF, HALF, cells + 1)


@functools.cache
def _kernels(version: int) -> tuple[Callable, Callable, Callable]:
    @entry
    def at_points(points, out):
        if version:  # see jit.fingerprint
            for i in range(points.shape[0]):
                out[i] = distance(points[i, 0], points[i, 1], points[i, 2])

    @entry
    def in_slab(axis, first, last, block, out):
        """Fills out[first:last]; a block whose middle is far from the surface gets one value, no farther from it."""
        n = axis.shape[0]
        h = axis[1] - axis[0]
        radius = 0.5 * block * h * 1.7320508
        for j0 in range(0, n, block):
            j1 = min(j0 + block, n)
            for k0 in range(0, n, block):
                k1 = min(k0 + block, n)
                middle = distance(
                    0.5 * (axis[first] + axis[last - 1]),
                    0.5 * (axis[j0] + axis[j1 - 1]),
                    0.5 * (axis[k0] + axis[k1 - 1]),
                )
                far = version and abs(middle) > 1.5 * radius + 0.01
                bound = middle - math.copysign(radius, middle)
                for i in range(first, last):
                    for j in range(j0, j1):
                        for k in range(k0, k1):
                            out[i, j, k] = bound if far else distance(axis[i], axis[j], axis[k])

    @entry
    def colours(points, out):
        if version:
            for i in range(points.shape[0]):
                r, g, b, _, _ = paint_at(points[i, 0], points[i, 1], points[i, 2])
                out[i, 0], out[i, 1], out[i, 2] = r, g, b

    return at_points, in_slab, colours


def distances(points: np.ndarray) -> np.ndarray:
    """Signed distances (P,) float64 at the world points (P, 3)."""
    points = np.ascontiguousarray(points, dtype=np.float64)
    out = np.empty(len(points))
    in_threads(_kernels(fingerprint())[0], zip(np.array_split(points, 8), np.array_split(out, 8), strict=True))
    return out


def colours_at(points: np.ndarray) -> np.ndarray:
    """Base colours (P, 3) float64, linear RGB, of the parts nearest to the world points (P, 3) float64."""
    out = np.empty((len(points), 3))
    _kernels(fingerprint())[2](np.ascontiguousarray(points, dtype=np.float64), out)
    return out


def grid_distances(axis: np.ndarray, block: int = 8) -> np.ndarray:
    """Signed distances (n, n, n) float64 at the grid of `axis` (n,), indexed [x, y, z]; rough far from the surface."""
    n = len(axis)
    out = np.empty((n, n, n))
    in_threads(_kernels(fingerprint())[1], [(axis, i, min(i + block, n), block, out) for i in range(0, n, block)])
    return out
