"""Fewer triangles by quadric edge collapse."""

import numpy as np
import torch
from scipy.spatial import KDTree

from viewmesh.geometry.clean import is_watertight, split_nonmanifold, without_bad_faces
from viewmesh.geometry.collapse import collapse
from viewmesh.geometry.mesh import Mesh


def simplify(mesh: Mesh, target_faces: int) -> Mesh:
    """At most about `target_faces` triangles, by quadric error (Garland and Heckbert 1997), worked out where mesh is.

    A mesh that already has no more is returned as it is. One that is not watertight is made manifold first, without
    degenerate and double faces; a watertight mesh stays watertight. vertex_colors are blended from the nearest old
    vertices. Deterministic on a CPU.
    """
    if len(mesh.faces) <= target_faces:
        return mesh
    manifold = mesh if is_watertight(mesh) else split_nonmanifold(without_bad_faces(mesh))
    vertices, faces = collapse(manifold.vertices.detach(), manifold.faces, target_faces)
    colors = None
    if mesh.vertex_colors is not None:
        colors = torch.from_numpy(_blend(mesh.vertices, mesh.vertex_colors, vertices)).to(vertices.device)
    return Mesh(vertices, faces, colors)


def _blend(old: torch.Tensor, values: torch.Tensor, new: torch.Tensor, neighbours: int = 4) -> np.ndarray:
    """values (V, C) at old positions, carried to new ones by inverse-distance weights of the nearest."""
    distance, index = KDTree(old.detach().cpu().numpy()).query(new.cpu().numpy(), k=min(neighbours, len(old)))
    distance, index = distance.reshape(len(new), -1), index.reshape(len(new), -1)
    weight = 1 / (distance + 1e-9)
    weight = weight / weight.sum(1, keepdims=True)
    return np.einsum("vk,vkc->vc", weight, values.detach().cpu().numpy()[index]).astype(np.float32)
