"""Cleaning a triangle mesh: components, floaters, hidden shells, holes, welding, manifoldness.

Everything here is topology on index arrays plus areas; what is *visible* is decided by whoever renders and comes in as
a boolean per face. Nothing here opens a surface that was closed.
"""

from dataclasses import replace

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from viewmesh.geometry.mesh import Mesh
from viewmesh.geometry.normals import face_normals
from viewmesh.geometry.rows import equal_rows


def components(mesh: Mesh) -> Tensor:
    """Connected components over shared vertices: a label per face, (F,) int64, numbered from 0 by falling area."""
    root = _connected(mesh.faces[:, 0], mesh.faces[:, 1:], len(mesh.vertices))
    _, labels = root[mesh.faces[:, 0]].unique(return_inverse=True)
    areas = torch.bincount(labels, _areas(mesh))
    rank = torch.empty_like(areas, dtype=torch.int64)
    rank[areas.argsort(descending=True, stable=True)] = torch.arange(len(areas), device=rank.device)
    return rank[labels]


def drop_floaters(mesh: Mesh, *, keep: float = 0.01, labels: Tensor | None = None) -> Mesh:
    """Without the components that do not matter. labels: `components(mesh)`, if known.

    The rule: the component of the largest area stays, and every other whose area is at least `keep` times that.
    Volume is not asked: a closed component of relative volume k has at least about k^(2/3) of the area of a round one,
    so a bulky part always passes the area test, and a thin sheet (no volume at all) may be wanted.
    """
    labels = components(mesh) if labels is None else labels
    areas = torch.bincount(labels, _areas(mesh))
    return select_faces(mesh, (areas >= keep * areas[0])[labels])


def drop_hidden(mesh: Mesh, visible_faces: Tensor, *, seen: float = 0.01, labels: Tensor | None = None) -> Mesh:
    """Without the components that no view sees: inner shells, bubbles, double walls.

    visible_faces: (F,) bool, True where some pixel of some view shows the face. labels: `components(mesh)`, if known.
    The rule: a component is dropped as a whole when the faces seen make up less than `seen` of its area (a stray pixel
    through a crack does not save a bubble). Hidden parts of a component that is seen stay: cutting them out would open
    the surface. If nothing at all is seen, that says nothing about the mesh, and it is returned as it is.
    """
    visible = visible_faces.to(mesh.faces.device, torch.bool)
    if not bool(visible.any()):
        return mesh
    labels, areas = components(mesh) if labels is None else labels, _areas(mesh)
    total, shown = torch.bincount(labels, areas), torch.bincount(labels, areas * visible)
    wanted = shown >= seen * total
    wanted[shown.argmax()] = True
    return select_faces(mesh, wanted[labels])


def fill_small_holes(mesh: Mesh, max_edges: int) -> Mesh:
    """With every boundary loop of at most `max_edges` edges closed: three edges by a triangle, more by a fan around a
    new vertex at the loop's centre (a new vertex can never make an edge that is already there)."""
    faces, vertices = _faces(mesh), mesh.vertices.cpu().numpy()
    colors = None if mesh.vertex_colors is None else mesh.vertex_colors.cpu().numpy()
    new_faces, new_vertices, new_colors = [], [], []
    for loop in _boundary_loops(faces, len(vertices)):
        if len(loop) > max_edges:
            continue
        if len(loop) == 3:
            new_faces.append(loop[::-1])
            continue
        centre = len(vertices) + len(new_vertices)
        new_vertices.append(vertices[loop].mean(0))
        if colors is not None:
            new_colors.append(colors[loop].mean(0))
        new_faces.extend([b, a, centre] for a, b in zip(loop, np.roll(loop, -1), strict=True))
    if not new_faces:
        return mesh
    faces = np.concatenate([faces, np.asarray(new_faces, np.int64)])
    if new_vertices:
        vertices = np.concatenate([vertices, np.asarray(new_vertices, np.float32)])
        colors = None if colors is None else np.concatenate([colors, np.asarray(new_colors, np.float32)])
    return _mesh(vertices, faces, colors, like=mesh)


def weld(mesh: Mesh, tolerance: float = 1e-7) -> Mesh:
    """With vertices at one position merged into one, and without the faces that this makes degenerate or double.

    tolerance: side of the cube within which positions count as equal, relative to the bounding box's diagonal.
    """
    vertices = mesh.vertices.cpu().numpy().astype(np.float64)
    low = vertices.min(0)
    side = max(float(np.linalg.norm(vertices.max(0) - low)) * tolerance, 1e-30)
    first, of_vertex = equal_rows(np.round((vertices - low) / side).astype(np.int64))
    faces = first[of_vertex][_faces(mesh)]
    return without_bad_faces(replace(mesh, faces=torch.from_numpy(faces).to(mesh.faces.device)))


def without_bad_faces(mesh: Mesh) -> Mesh:
    """Without faces that name a vertex twice, copies of a face, and pairs of faces that lie back to back (a fin).

    Dropping these never opens a closed surface, because what each takes from its edges is balanced. Vertices that no
    face names are dropped too.
    """
    faces = _faces(mesh)
    good = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])
    ids, ordered = np.flatnonzero(good), np.sort(faces[good], 1)
    if len(ids):
        even = _is_even(faces[ids], ordered)
        _, group = equal_rows(ordered)
        ups, downs = np.bincount(group, even), np.bincount(group, ~even)
        wanted_even = ups > downs  # orientation of the one face that stays; none stays where they cancel
        candidates = np.flatnonzero((ups != downs)[group] & (even == wanted_even[group]))
        _, first = np.unique(group[candidates], return_index=True)
        good[:] = False
        good[ids[candidates[first]]] = True
    return select_faces(mesh, torch.from_numpy(good))


def split_nonmanifold(mesh: Mesh) -> Mesh:
    """With vertices doubled so that every edge joins at most two faces and every vertex has one fan of faces.

    Where more than two faces share an edge, the two that bound one wedge of the inside stay together. Positions do not
    change, so solids that touch along an edge or at a point become separate solids that touch.
    """
    faces = _faces(mesh)
    F = len(faces)
    start, end = faces.ravel(), np.roll(faces, -1, 1).ravel()  # half-edge 3 f + k runs from corner k to corner k + 1
    one, other = _paired_halfedges(mesh.vertices.cpu().numpy().astype(np.float64), faces, start, end)
    following = np.arange(3 * F).reshape(F, 3)[:, [1, 2, 0]].ravel()
    rows = np.concatenate([one, following[one]])
    cols = np.concatenate([following[other], other])
    graph = coo_matrix((np.ones(len(rows), np.int8), (rows, cols)), (3 * F, 3 * F))
    count, of_corner = connected_components(graph, directed=False)
    if count == len(np.unique(faces)):
        return mesh
    source = np.empty(count, np.int64)
    source[of_corner] = start
    colors = None if mesh.vertex_colors is None else mesh.vertex_colors.cpu().numpy()[source]
    return _mesh(
        mesh.vertices.cpu().numpy()[source], of_corner.reshape(F, 3).astype(np.int64), colors, like=mesh
    )  # fmt: skip


def is_watertight(mesh: Mesh) -> bool:
    """True when every directed edge occurs once and so does its reverse: closed, manifold edges, one orientation."""
    a, b, V = mesh.faces.flatten(), mesh.faces[:, [1, 2, 0]].flatten(), len(mesh.vertices)
    there, back = (a * V + b).sort().values, (b * V + a).sort().values
    return len(a) > 0 and bool((there == back).all() & (there[1:] != there[:-1]).all())


def select_faces(mesh: Mesh, wanted: Tensor) -> Mesh:
    """The faces where wanted (F,) bool is True, and only the vertices they name, in their old order."""
    wanted = wanted.to(mesh.faces.device)
    faces = mesh.faces[wanted]
    used = torch.zeros(len(mesh.vertices), dtype=torch.bool, device=faces.device)
    used[faces.reshape(-1)] = True
    if bool(wanted.all()) and bool(used.all()):
        return mesh
    index = torch.cumsum(used, 0) - 1
    colors = None if mesh.vertex_colors is None else mesh.vertex_colors[used]
    return Mesh(mesh.vertices[used], index[faces], colors)


def _is_even(faces: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """True where a face is a cyclic turn of its sorted self."""
    return np.asarray(np.stack([(np.roll(ordered, k, 1) == faces).all(1) for k in range(3)]).any(axis=0))


def _paired_halfedges(vertices: np.ndarray, faces: np.ndarray, start: np.ndarray, end: np.ndarray):
    """Half-edge pairs (one, other) that run against each other along an edge; each half-edge is in one pair at most."""
    V = len(vertices)
    key = np.minimum(start, end) * V + np.maximum(start, end)
    order = np.argsort(key, kind="stable")
    sorted_key = key[order]
    first = np.flatnonzero(np.r_[True, sorted_key[1:] != sorted_key[:-1]])
    counts = np.diff(np.r_[first, len(order)])
    two = first[counts == 2]
    a, b = order[two], order[two + 1]
    opposed = start[a] == end[b]
    one, other = [a[opposed]], [b[opposed]]
    for at, n in zip(first[counts > 2], counts[counts > 2], strict=True):
        pairs = np.asarray(_pair_around_edge(vertices, faces, start, end, order[at : at + n]), np.int64).reshape(-1, 2)
        one.append(pairs[:, 0])
        other.append(pairs[:, 1])
    return np.concatenate(one), np.concatenate(other)


def _pair_around_edge(vertices, faces, start, end, halfedges) -> list[tuple[int, int]]:
    """Half-edges of one crowded edge, paired across wedges of the inside."""
    low, high = min(start[halfedges[0]], end[halfedges[0]]), max(start[halfedges[0]], end[halfedges[0]])
    axis = vertices[high] - vertices[low]
    axis = axis / max(np.linalg.norm(axis), 1e-30)
    arms = vertices[faces[halfedges // 3, (halfedges + 2) % 3]] - vertices[low]  # the corner opposite the edge
    arms = arms - (arms @ axis)[:, None] * axis
    x = arms[np.argmax(np.linalg.norm(arms, axis=1))]
    angle = np.arctan2(arms @ np.cross(axis, x), arms @ x)
    forward = start[halfedges] == low
    ahead, behind = list(np.flatnonzero(forward)), list(np.flatnonzero(~forward))
    pairs = []
    for i in ahead:  # a face that runs low -> high has its inside at falling angles
        if behind:
            j = min(behind, key=lambda j: (angle[i] - angle[j]) % (2 * np.pi))
            behind.remove(j)
            pairs.append((int(halfedges[i]), int(halfedges[j])))
    return pairs


def _boundary_loops(faces: np.ndarray, V: int) -> list[np.ndarray]:
    """Simple closed loops of boundary edges, each in the direction of the faces that they bound."""
    start, end = faces.ravel(), np.roll(faces, -1, 1).ravel()
    there, back = start * V + end, end * V + start
    backs = np.sort(back)
    open_ = backs[np.searchsorted(backs, there).clip(max=len(backs) - 1)] != there
    following: dict[int, list[int]] = {}
    for a, b in zip(start[open_].tolist(), end[open_].tolist(), strict=True):
        following.setdefault(a, []).append(b)
    loops = []
    for first in list(following):
        while following.get(first):
            path, place, at = [first], {first: 0}, first
            while following.get(at):
                at = following[at].pop()
                if at in place:  # a simple loop is closed: take it off the path
                    loops.append(np.asarray(path[place[at] :], np.int64))
                    for vertex in path[place[at] + 1 :]:
                        del place[vertex]
                    del path[place[at] + 1 :]
                else:
                    place[at] = len(path)
                    path.append(at)
    return [loop for loop in loops if len(loop) >= 3]


def _faces(mesh: Mesh) -> np.ndarray:
    return mesh.faces.cpu().numpy()


def _connected(one: Tensor, others: Tensor, V: int) -> Tensor:
    """(V,) int64: of each vertex, the least that it is connected to. one: (N,), each connected to others (N, K).

    Labels sink along the edges and through each other, as in Shiloach and Vishkin 1982: few rounds on any mesh.
    """
    label = torch.arange(V, device=one.device)
    while True:
        at_one, at_others = label[one], label[others]
        least = torch.minimum(at_one, at_others.amin(1))
        if bool((at_one == least).all() & (at_others == least[:, None]).all()):
            return label
        for root in (at_one, *at_others.unbind(1)):
            label = label.scatter_reduce(0, root, least, "amin")
        for _ in range(2):
            label = label[label]


def _areas(mesh: Mesh) -> Tensor:
    """(F,) float64."""
    return face_normals(mesh.vertices.detach().double(), mesh.faces).norm(dim=-1) / 2


def _mesh(vertices: np.ndarray, faces: np.ndarray, colors: np.ndarray | None, *, like: Mesh) -> Mesh:
    device = like.vertices.device
    return Mesh(
        torch.from_numpy(np.ascontiguousarray(vertices, np.float32)).to(device),
        torch.from_numpy(np.ascontiguousarray(faces, np.int64)).to(device),
        None if colors is None else torch.from_numpy(np.ascontiguousarray(colors, np.float32)).to(device),
    )
