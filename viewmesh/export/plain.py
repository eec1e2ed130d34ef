"""mesh.ply and mesh.stl: geometry for tools that want no textures."""

import numpy as np
import torch

from viewmesh.export.seams import unit_normals
from viewmesh.geometry.mesh import TexturedMesh
from viewmesh.render.shading import linear_to_srgb


def ply_bytes(textured: TexturedMesh) -> bytes:
    """Binary little-endian PLY: positions, normals, and sRGB vertex colours looked up in the texture."""
    vertex = np.empty(len(textured.mesh.vertices), [("p", "<f4", 3), ("n", "<f4", 3), ("c", "u1", 3)])
    vertex["p"], vertex["n"] = textured.mesh.vertices.numpy(), unit_normals(textured)
    vertex["c"] = (linear_to_srgb(vertex_colors(textured)).clamp(0, 1) * 255 + 0.5).to(torch.uint8).numpy()
    face = np.empty(len(textured.mesh.faces), [("count", "u1"), ("v", "<i4", 3)])
    face["count"], face["v"] = 3, textured.mesh.faces.numpy()
    names = [f"property float {n}" for n in ("x", "y", "z", "nx", "ny", "nz")]
    names += [f"property uchar {n}" for n in ("red", "green", "blue")]
    header = [
        "ply",
        "format binary_little_endian 1.0",
        "comment viewmesh, +y up",
        f"element vertex {len(vertex)}",
        *names,
    ]
    header += [f"element face {len(face)}", "property list uchar int vertex_indices", "end_header"]
    return ("\n".join(header) + "\n").encode() + vertex.tobytes() + face.tobytes()


def stl_bytes(textured: TexturedMesh) -> bytes:
    """Binary STL."""
    corners = textured.mesh.vertices.numpy()[textured.mesh.faces.numpy()]
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    face = np.zeros(len(corners), [("n", "<f4", 3), ("v", "<f4", (3, 3)), ("a", "<u2")])
    face["n"] = normal / np.linalg.norm(normal, axis=1, keepdims=True).clip(1e-30)
    face["v"] = corners
    return b"viewmesh, +y up".ljust(80) + np.uint32(len(face)).astype("<u4").tobytes() + face.tobytes()


def vertex_colors(textured: TexturedMesh) -> torch.Tensor:
    """(V, 3) linear: the base colour at each vertex, the mean over the UVs that it has."""
    grid = textured.uvs * 2 - 1
    image = textured.material.base_color.permute(2, 0, 1)[None]
    at_uv = torch.nn.functional.grid_sample(image, grid[None, None], align_corners=False, padding_mode="border")
    at_uv = at_uv[0, :, 0].T  # (T, 3)
    V, T = len(textured.mesh.vertices), len(textured.uvs)
    pair = torch.unique(textured.mesh.faces.reshape(-1) * T + textured.uv_faces.reshape(-1))
    vertex, uv = pair // T, pair % T
    total = torch.zeros(V, 3).index_add(0, vertex, at_uv[uv])
    return total / torch.bincount(vertex, minlength=V).clamp(min=1)[:, None]
