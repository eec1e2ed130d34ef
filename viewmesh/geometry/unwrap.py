"""A UV atlas for any mesh: xatlas makes the charts, we repair and pack them.

xatlas's time grows faster than the mesh and it may crash, so the mesh is cut into spatial parts of about a thousand
faces, unwrapped by processes of their own, several at a time. A part at which its process fails gets planar charts of
our own. Every atlas is checked and repaired before it is returned.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from viewmesh import cpus
from viewmesh.geometry.charts import (
    Charts,
    chart_of_points,
    extents,
    flat_area,
    from_points,
    joined,
    projected,
    repaired,
    replaced,
    singled_out,
    squashed,
)
from viewmesh.geometry.child import python, run
from viewmesh.geometry.mesh import Mesh
from viewmesh.geometry.pack import pack
from viewmesh.progress import check, never

PART_FACES = 1000
CHILD = python("viewmesh.geometry.xatlas_child")


@dataclass(frozen=True)
class Atlas:
    """uvs: (T, 2) float32 in [0, 1], (0, 0) the image's top-left corner; uv_faces: (F, 3) int64, one row per face of
    the mesh; vertex_of_uv: (T,) int64, the mesh vertex that each UV belongs to.

    Seen in the image, every face is counter-clockwise, as it is seen from outside: no chart is mirrored.
    """

    uvs: Tensor  # (T, 2)
    uv_faces: Tensor  # (F, 3)
    vertex_of_uv: Tensor  # (T,)


def unwrap(
    mesh: Mesh,
    texture_size: int,
    *,
    padding: int = 4,
    timeout_s: float = 120,
    fallback_only: bool = False,
    cancelled: Callable[[], bool] = never,
) -> Atlas:
    """UVs for every face: of positive area, in [0, 1], not overlapping on a texture_size square, charts `padding`
    texels apart (fewer only if the charts would not fit otherwise, or would cover less than a tenth of it).

    timeout_s: for all of xatlas's work; parts not done by then get planar charts, as all do with `fallback_only`.
    Degenerate faces get a texel-sized triangle of their own. Faces keep their order. Same mesh, same atlas, unless a
    part ran out of time. cancelled: asked several times a second; no child outlives the call.
    Raises InvalidMesh, Cancelled.
    """
    mesh.validate()
    vertices = mesh.vertices.detach().cpu().numpy().astype(np.float64)
    vertices = (vertices - vertices.mean(0)) / max(float(np.ptp(vertices, axis=0).max()), 1e-30)
    faces = mesh.faces.cpu().numpy()
    parts = _spatial_parts(vertices[faces].mean(1))
    charts = _charts_of_parts(vertices, faces, parts, timeout_s, fallback_only, cancelled)
    charts = _in_old_order(charts, np.concatenate(parts))
    texel = _side(charts) / texture_size
    charts = repaired(charts, texel, cancelled)
    for _ in range(4):
        uvs = np.clip(pack(charts, texture_size, padding, cancelled), 0, 1).astype(np.float32)
        uvs[:, 1] = 1 - uvs[:, 1]
        flat = _not_counter_clockwise(uvs, charts.faces)  # slivers that float32 has lost
        if not flat.any():
            break
        charts = singled_out(charts, flat, texel)
    device = mesh.vertices.device
    return Atlas(
        torch.from_numpy(uvs).to(device),
        torch.from_numpy(charts.faces.astype(np.int64)).to(device),
        torch.from_numpy(charts.vertex.astype(np.int64)).to(device),
    )


def build_loops() -> None:
    """Compiles what `unwrap` needs of numba, which keeps it on disk: seconds, once per installation."""
    corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    faces = torch.tensor([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
    unwrap(Mesh(corners, faces), 64, fallback_only=True)


def _charts_of_parts(vertices, faces, parts, timeout_s: float, fallback_only: bool, cancelled) -> Charts:
    meshes = []
    for part in parts:
        used, local = np.unique(faces[part], return_inverse=True)
        meshes.append((used, local.reshape(-1, 3)))
    found: list[Charts | None] = [None] * len(meshes)
    if not fallback_only:
        found = _xatlas([(vertices[used], local) for used, local in meshes], time.monotonic() + timeout_s, cancelled)
    made = []
    for (used, local), charts in zip(meshes, found, strict=True):
        check(cancelled)
        if charts is None:
            charts = projected(vertices[used], local)
        elif (bad := squashed(charts, vertices[used])).any():
            charts = replaced(charts, bad, projected(vertices[used], local[bad]))
        made.append(Charts(charts.points, charts.faces, charts.chart, used[charts.vertex]))
    return joined(made)


def _xatlas(
    meshes: Sequence[tuple[np.ndarray, np.ndarray]], deadline: float, cancelled: Callable[[], bool]
) -> list[Charts | None]:
    """xatlas's charts of each mesh (vertices, faces), or None if it crashed, ran out of time or gave something else."""
    with tempfile.TemporaryDirectory(prefix="viewmesh-unwrap-") as name:
        folder = Path(name)
        for i, (vertices, faces) in enumerate(meshes):
            np.savez(folder / f"{i:04d}.in.npz", vertices=vertices.astype(np.float32), faces=faces.astype(np.uint32))
        run([*CHILD, name, str(cpus.usable())], deadline, cancelled)
        return [_read(folder / f"{i:04d}.out.npz", faces) for i, (_, faces) in enumerate(meshes)]


def _side(charts: Charts) -> float:
    """Of the square that an atlas will be, about: there must be room for all charts, and for the longest one."""
    longest = float(extents(charts.points, chart_of_points(charts))[1].max())
    return max(float(np.sqrt(flat_area(charts) / 0.7)), longest, 1e-9)


def _read(file: Path, faces: np.ndarray) -> Charts | None:
    try:
        with np.load(file) as out:
            points, uv_faces, vertex = out["points"], out["faces"].astype(np.int64), out["vertex"].astype(np.int64)
    except (OSError, KeyError, ValueError):
        return None
    same = uv_faces.shape == faces.shape and bool((vertex[uv_faces] == faces).all())
    return from_points(points, uv_faces, vertex) if same and bool(np.isfinite(points).all()) else None


def _spatial_parts(centres: np.ndarray) -> list[np.ndarray]:
    """Face indices in parts of at most PART_FACES, by halving the longest side at the median."""

    def split(ids: np.ndarray) -> list[np.ndarray]:
        if len(ids) <= PART_FACES:
            return [ids]
        axis = int(np.argmax(np.ptp(centres[ids], axis=0)))
        ids = ids[np.argsort(centres[ids, axis], kind="stable")]
        return split(np.sort(ids[: len(ids) // 2])) + split(np.sort(ids[len(ids) // 2 :]))

    return split(np.arange(len(centres)))


def _in_old_order(charts: Charts, order: np.ndarray) -> Charts:
    faces, chart = np.empty_like(charts.faces), np.empty_like(charts.chart)
    faces[order], chart[order] = charts.faces, charts.chart
    return Charts(charts.points, faces, chart, charts.vertex)


def _not_counter_clockwise(uvs: np.ndarray, faces: np.ndarray) -> np.ndarray:
    p = uvs.astype(np.float64)[faces]
    a, b = p[:, 1] - p[:, 0], p[:, 2] - p[:, 0]
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0] >= 0  # v grows downwards
