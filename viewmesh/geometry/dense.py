"""Nearest points on a mesh of very many, very small triangles, for very many queries: what baking a texture asks for.

NearestSurface is exact for triangles of any size; this one is made for an iso-surface, whose triangles are all about
as large as the lattice's cells, and answers a million queries in a second or two.
"""

import threading

import numpy as np
import torch
from scipy.spatial import KDTree
from torch import Tensor
from torch.nn.functional import normalize

from viewmesh.geometry.cells import NearestPoints
from viewmesh.geometry.mesh import Mesh
from viewmesh.geometry.nearest import SurfacePoints
from viewmesh.geometry.normals import face_normals

CHUNK = 200_000


class DenseSurface:
    """Candidates are the faces with the nearest centroids. Among them the nearest point wins, faces that look the
    query's way before those that look away: the two sides of a thin wall do not bleed into each other.

    A candidate's nearest point is the foot of the perpendicular, its barycentrics clamped to the triangle; the error
    stays within the triangle. A mesh on a GPU is searched there; on a CPU a tree is, which is built in a thread: the
    constructor returns at once.
    """

    def __init__(self, mesh: Mesh, candidates: int = 4) -> None:
        self.mesh, self.candidates = mesh, min(candidates, len(mesh.faces))
        self.normals = normalize(face_normals(mesh.vertices, mesh.faces), dim=-1)
        centroids = mesh.vertices[mesh.faces].mean(1)
        self._near = NearestPoints(centroids) if centroids.is_cuda else _Tree(centroids)

    def query(self, points: Tensor, normals: Tensor) -> tuple[SurfacePoints, Tensor]:
        """The surface point of each of points (P, 3) with unit normals (P, 3), and its distance (P,), float32."""
        answers = [self._query(p, n) for p, n in zip(points.split(CHUNK), normals.split(CHUNK), strict=True)]
        faces, weights, distances = (torch.cat(column) for column in zip(*answers, strict=True))
        return SurfacePoints(faces, weights), distances

    def _query(self, points: Tensor, normals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        near = self._near.query(points, self.candidates)
        corners = self.mesh.vertices[self.mesh.faces[near]]  # (P, K, 3, 3)
        weights = _clamped_barycentric(points[:, None], corners)
        gap = (torch.einsum("pki,pkic->pkc", weights, corners) - points[:, None]).norm(dim=-1)  # (P, K)
        away = (self.normals[near] * normals[:, None]).sum(-1) <= 0
        best = (gap + away * 1e6).argmin(1)
        at = torch.arange(len(points), device=points.device)
        return near[at, best], weights[at, best], gap[at, best]


class _Tree:
    """`NearestPoints` on the CPU."""

    def __init__(self, points: Tensor) -> None:
        self.points = points.numpy()
        self.building = threading.Thread(target=self._build, daemon=True)
        self.building.start()

    def _build(self) -> None:
        self.tree = KDTree(self.points, balanced_tree=False, compact_nodes=False)

    def query(self, queries: Tensor, k: int) -> Tensor:
        self.building.join()
        _, near = self.tree.query(queries.numpy(), k=k, workers=torch.get_num_threads())
        return torch.from_numpy(np.asarray(near, np.int64).reshape(len(queries), k))


def _clamped_barycentric(point: Tensor, corners: Tensor) -> Tensor:
    """Weights (..., 3) of the foot of the perpendicular from point (..., 3) on triangles (..., 3, 3), made >= 0."""
    a, ab, ac = corners[..., 0, :], corners[..., 1, :] - corners[..., 0, :], corners[..., 2, :] - corners[..., 0, :]
    ap = point - a
    d00, d01, d11 = (ab * ab).sum(-1), (ab * ac).sum(-1), (ac * ac).sum(-1)
    d20, d21 = (ap * ab).sum(-1), (ap * ac).sum(-1)
    scale = (d00 * d11 - d01 * d01).clamp(min=1e-24)
    v, w = (d11 * d20 - d01 * d21) / scale, (d00 * d21 - d01 * d20) / scale
    weights = torch.stack([1 - v - w, v, w], -1).clamp(0, 1)
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)
