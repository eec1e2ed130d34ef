"""Closed meshes for the tests: a ball, a bumpy one, a torus, boxes that touch."""

import numpy as np
import torch
import trimesh

from viewmesh.geometry.mesh import Mesh


def mesh_of(t: trimesh.Trimesh) -> Mesh:
    return Mesh(torch.from_numpy(np.array(t.vertices, np.float32)), torch.from_numpy(np.array(t.faces, np.int64)))


def ball(subdivisions: int = 3, radius: float = 0.4) -> Mesh:
    return mesh_of(trimesh.creation.icosphere(subdivisions=subdivisions, radius=radius))


def bumpy(subdivisions: int = 4) -> Mesh:
    m = ball(subdivisions)
    v = m.vertices
    return Mesh(v * (1 + 0.12 * torch.sin(17 * v).prod(-1, keepdim=True)), m.faces)


def torus() -> Mesh:
    return mesh_of(trimesh.creation.torus(0.35, 0.12, major_sections=48, minor_sections=24))


def cube(at=(0.0, 0.0, 0.0), side: float = 1.0) -> Mesh:
    box = trimesh.creation.box((side,) * 3)
    box.apply_translation(at)
    return mesh_of(box)


def together(*meshes: Mesh) -> Mesh:
    starts = np.cumsum([0] + [len(m.vertices) for m in meshes])
    return Mesh(
        torch.cat([m.vertices for m in meshes]),
        torch.cat([m.faces + int(n) for m, n in zip(meshes, starts, strict=False)]),
    )


def spiral(turns: float = 3, steps: int = 120) -> Mesh:
    """An open helical ramp: seen from above it covers itself several times."""
    a = np.linspace(0, 2 * np.pi * turns, steps)
    rows = [np.stack([r * np.cos(a), 0.04 * a, r * np.sin(a)], 1) for r in (0.2, 0.5)]
    i = np.arange(steps - 1)
    faces = np.concatenate([np.stack([i, i + 1, i + steps], 1), np.stack([i + 1, i + 1 + steps, i + steps], 1)])
    return Mesh(torch.from_numpy(np.concatenate(rows).astype(np.float32)), torch.from_numpy(faces))


def volume(mesh: Mesh) -> float:
    p = mesh.vertices.double()[mesh.faces]
    return float((p[:, 0] * torch.linalg.cross(p[:, 1], p[:, 2])).sum() / 6)
