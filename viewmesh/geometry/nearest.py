"""Points on surfaces: area-weighted samples, and the surface point nearest to any point."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import KDTree
from torch import Tensor

from viewmesh.geometry.mesh import Mesh

CANDIDATES = 8  # faces tried exactly per point, those of the nearest samples


@dataclass(frozen=True)
class SurfacePoints:
    """Points on a mesh: face (P,) int64 and barycentric (P, 3) float64 of each."""

    face: Tensor  # (P,)
    barycentric: Tensor  # (P, 3)

    def of(self, values: Tensor, faces: Tensor) -> Tensor:
        """values (V, C) of the corners that faces (F, 3) name, interpolated at the points: (P, C)."""
        corners = values[faces[self.face]]
        return (corners * self.barycentric[..., None].to(corners)).sum(1)


def sample_surface(mesh: Mesh, count: int, generator: torch.Generator) -> SurfacePoints:
    """count points spread evenly over the area of a mesh on the CPU."""
    p = mesh.vertices.detach().double()[mesh.faces]
    area = torch.linalg.cross(p[:, 1] - p[:, 0], p[:, 2] - p[:, 0]).norm(dim=-1)
    total = area.cumsum(0)
    at = torch.rand(count, generator=generator, dtype=torch.float64) * total[-1]
    face = torch.searchsorted(total, at).clamp(max=len(area) - 1)
    u, v = torch.rand(2, count, generator=generator, dtype=torch.float64)
    root = u.sqrt()
    return SurfacePoints(face, torch.stack([1 - root, root * (1 - v), root * v], -1))


class NearestSurface:
    """Answers which point of a mesh is nearest.

    Exact for the faces of the CANDIDATES samples nearest to the query, of samples laid about as dense as the mesh's
    faces (at least one each): so exact but for points far off a surface of very uneven triangles, where the distance
    may come out too large by up to the spacing of the samples.
    """

    def __init__(self, mesh: Mesh, samples: int = 200_000) -> None:
        self.corners = mesh.vertices.detach().cpu().double().numpy()[mesh.faces.cpu().numpy()]  # (F, 3, 3)
        p = self.corners
        area = np.linalg.norm(np.cross(p[:, 1] - p[:, 0], p[:, 2] - p[:, 0]), axis=1) / 2
        per_side = np.sqrt(area / max(area.sum(), 1e-30) * samples)
        self.face_of_sample, weights = _lattice(np.clip(np.ceil(per_side), 1, 64).astype(np.int64))
        points = np.einsum("sk,skc->sc", weights, p[self.face_of_sample])
        self.tree = KDTree(points)

    def query(self, points: Tensor) -> tuple[SurfacePoints, Tensor]:
        """The nearest surface point of each of points (P, 3), and its distance (P,) float64."""
        out = [self._query(chunk) for chunk in points.detach().cpu().double().split(100_000)]
        faces, weights, distances = (torch.from_numpy(np.concatenate(c)) for c in zip(*out, strict=True))
        return SurfacePoints(faces, weights), distances

    def _query(self, chunk: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        points = chunk.numpy()
        k = min(CANDIDATES, len(self.face_of_sample))
        _, nearest = self.tree.query(points, k=k, workers=-1)
        face = self.face_of_sample[nearest.reshape(len(points), k)]  # (P, k)
        weight = _closest_barycentric(points[:, None], self.corners[face])  # (P, k, 3)
        gap = np.linalg.norm((weight[..., None] * self.corners[face]).sum(-2) - points[:, None], axis=-1)
        best = gap.argmin(1)
        n = np.arange(len(points))
        return face[n, best], weight[n, best], gap[n, best]


def _lattice(per_side: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(face (S,), barycentric (S, 3)): for each face the centres of the upright cells of an n-by-n division."""
    faces, weights = [], []
    for n in np.unique(per_side):
        i, j = np.meshgrid(np.arange(n), np.arange(n), indexing="ij")
        i, j = i[i + j < n], j[i + j < n]
        w = np.stack([i + 1 / 3, j + 1 / 3, n - i - j - 2 / 3], -1) / n
        ids = np.flatnonzero(per_side == n)
        faces.append(np.repeat(ids, len(w)))
        weights.append(np.tile(w, (len(ids), 1)))
    return np.concatenate(faces), np.concatenate(weights)


def _closest_barycentric(p: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Weights (..., 3) of the point of triangles (..., 3, 3) nearest to p (..., 3): the foot of the perpendicular where
    it lies inside, else the nearest point of the three sides."""
    a, b, c = corners[..., 0, :], corners[..., 1, :], corners[..., 2, :]
    ab, ac, ap = b - a, c - a, p - a
    d00, d01, d11 = (ab * ab).sum(-1), (ab * ac).sum(-1), (ac * ac).sum(-1)
    d20, d21 = (ap * ab).sum(-1), (ap * ac).sum(-1)
    determinant = d00 * d11 - d01 * d01
    flat = determinant <= 1e-14 * d00 * d11
    safe = np.where(flat, 1, determinant)
    v, w = (d11 * d20 - d01 * d21) / safe, (d00 * d21 - d01 * d20) / safe
    inside = ~flat & (v >= 0) & (w >= 0) & (v + w <= 1)
    best, gap = np.stack([1 - v - w, v, w], -1), np.full(inside.shape, np.inf)
    side_best = np.zeros_like(best)
    for i in range(3):
        start, edge = corners[..., i, :], corners[..., (i + 1) % 3, :] - corners[..., i, :]
        t = (((p - start) * edge).sum(-1) / (edge * edge).sum(-1).clip(1e-300)).clip(0, 1)
        d = ((start + t[..., None] * edge - p) ** 2).sum(-1)
        weight = np.zeros_like(best)
        weight[..., i], weight[..., (i + 1) % 3] = 1 - t, t
        side_best = np.where((d < gap)[..., None], weight, side_best)
        gap = np.minimum(gap, d)
    return np.where(inside[..., None], best, side_best)
