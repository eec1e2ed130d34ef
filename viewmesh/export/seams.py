"""A textured mesh as formats with one index per corner want it: vertices doubled at UV seams."""

from dataclasses import dataclass

import numpy as np
import torch

from viewmesh.geometry.mesh import TexturedMesh
from viewmesh.geometry.normals import vertex_normals, vertex_tangents


@dataclass(frozen=True)
class SplitMesh:
    """positions, normals (K, 3), glTF tangents (K, 4) and uvs (K, 2) float32, row 0 of the image at v = 0; faces (F, 3)
    into them."""

    positions: np.ndarray  # (K, 3)
    normals: np.ndarray  # (K, 3)
    tangents: np.ndarray  # (K, 4)
    uvs: np.ndarray  # (K, 2)
    faces: np.ndarray  # (F, 3)


def split_at_seams(textured: TexturedMesh) -> SplitMesh:
    """Normals are those of the whole surface, so a seam does not show."""
    mesh = textured.mesh
    normals = unit_normals(textured)
    pair = mesh.faces.numpy() * len(textured.uvs) + textured.uv_faces.numpy()
    key, faces = np.unique(pair, return_inverse=True)
    vertex, uv = key // len(textured.uvs), key % len(textured.uvs)
    tangents = vertex_tangents(
        mesh.vertices.double(), mesh.faces, torch.from_numpy(normals).double(), textured.uvs.double(), textured.uv_faces
    )
    tangents = tangents.float().numpy()[uv]
    tangents[:, :3] /= np.linalg.norm(tangents[:, :3], axis=1, keepdims=True)
    positions, uvs = mesh.vertices.numpy()[vertex], textured.uvs.numpy()[uv]
    return SplitMesh(positions, normals[vertex], tangents, uvs, faces.reshape(-1, 3))


def unit_normals(textured: TexturedMesh) -> np.ndarray:
    """(V, 3) float32, one of length one for every vertex."""
    n = vertex_normals(textured.mesh.vertices.double(), textured.mesh.faces).float().numpy()
    return n / np.linalg.norm(n, axis=1, keepdims=True)
