"""Fewer triangles by quadric edge collapse."""

import math
import tempfile
import threading
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree

from viewmesh.geometry.child import python, run
from viewmesh.geometry.clean import split_nonmanifold, without_bad_faces
from viewmesh.geometry.collapse import collapse
from viewmesh.geometry.mesh import Mesh

APART = 100_000  # faces: above, other threads would wait for longer than a process takes to start
CHILD = python("viewmesh.geometry.collapse")
_library = threading.Lock()  # it keeps its mesh in global variables


def simplify(mesh: Mesh, target_faces: int) -> Mesh:
    """At most about `target_faces` triangles, by quadric error (Garland and Heckbert 1997).

    A mesh that already has no more is returned as it is. Slivers are collapsed first: they would block the library's
    collapses around them. What its collapses leave degenerate, double or non-manifold is dropped or split apart, so a
    watertight mesh stays watertight. vertex_colors are blended from the nearest old vertices. Deterministic.
    """
    if len(mesh.faces) <= target_faces:
        return mesh
    clean = collapse_short_edges(mesh)
    if len(clean.faces) > target_faces:
        vertices, faces = _collapsed(
            np.ascontiguousarray(clean.vertices.detach().cpu().numpy(), np.float64),
            np.ascontiguousarray(clean.faces.cpu().numpy(), np.int32),
            int(target_faces),
        )
        clean = Mesh(torch.from_numpy(vertices.astype(np.float32)), torch.from_numpy(faces.astype(np.int64)))
        clean = split_nonmanifold(collapse_short_edges(without_bad_faces(clean)))
    colors = None
    if mesh.vertex_colors is not None:
        colors = torch.from_numpy(_blend(mesh.vertices, mesh.vertex_colors, clean.vertices))
    return Mesh(clean.vertices, clean.faces, colors).to(mesh.vertices.device)


def _collapsed(vertices: np.ndarray, faces: np.ndarray, target_faces: int) -> tuple[np.ndarray, np.ndarray]:
    """A large mesh in a process of its own, while this one's other threads go on; here, should that fail."""
    if len(faces) > APART:
        with tempfile.TemporaryDirectory(prefix="viewmesh-simplify-") as folder:
            source, target = Path(folder, "in.npz"), Path(folder, "out.npz")
            np.savez(source, vertices=vertices, faces=faces)
            run([*CHILD, str(source), str(target), str(target_faces)], math.inf)
            if target.exists():
                with np.load(target) as made:
                    return made["vertices"], made["faces"]
    with _library:
        return collapse(vertices, faces, target_faces)


def collapse_short_edges(mesh: Mesh, relative: float = 1e-3) -> Mesh:
    """With both ends of every edge shorter than `relative` times the mean edge merged into one vertex."""
    vertices, faces = mesh.vertices.detach().cpu().numpy(), mesh.faces.cpu().numpy()
    start, end = faces.ravel(), np.roll(faces, -1, 1).ravel()
    length = np.linalg.norm(vertices[start].astype(np.float64) - vertices[end], axis=1)
    short = length < relative * length.mean()
    if not short.any():
        return mesh
    V = len(vertices)
    graph = coo_matrix((np.ones(short.sum(), np.int8), (start[short], end[short])), (V, V))
    _, group = connected_components(graph, directed=False)
    _, first = np.unique(group, return_index=True)
    merged = torch.from_numpy(first[group][faces].astype(np.int64)).to(mesh.faces.device)
    return split_nonmanifold(without_bad_faces(Mesh(mesh.vertices, merged, mesh.vertex_colors)))


def _blend(old: torch.Tensor, values: torch.Tensor, new: torch.Tensor, neighbours: int = 4) -> np.ndarray:
    """values (V, C) at old positions, carried to new ones by inverse-distance weights of the nearest."""
    distance, index = KDTree(old.detach().cpu().numpy()).query(new.cpu().numpy(), k=min(neighbours, len(old)))
    distance, index = distance.reshape(len(new), -1), index.reshape(len(new), -1)
    weight = 1 / (distance + 1e-9)
    weight = weight / weight.sum(1, keepdims=True)
    return np.einsum("vk,vkc->vc", weight, values.detach().cpu().numpy()[index]).astype(np.float32)
