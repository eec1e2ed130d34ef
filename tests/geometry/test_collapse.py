"""The rounds of viewmesh.geometry.collapse against the one-by-one algorithm that they stand for, and its laws."""

import heapq

import numpy as np
import pytest
import torch
import trimesh
from scipy.spatial import KDTree
from solids import ball, bumpy, mesh_of, torus
from torch import Tensor
from trimesh import Trimesh
from trimesh.sample import sample_surface

from viewmesh.geometry import collapse as module
from viewmesh.geometry.clean import is_watertight
from viewmesh.geometry.collapse import collapse
from viewmesh.geometry.mesh import Mesh


def quadrics(p: np.ndarray, faces: np.ndarray) -> np.ndarray:
    found = np.zeros((len(p), 4, 4))
    for face in faces:
        cross = np.cross(p[face[1]] - p[face[0]], p[face[2]] - p[face[0]])
        area = np.linalg.norm(cross)
        plane = np.append(cross / area, -cross @ p[face[0]] / area)
        for v in face:
            found[v] += area * np.outer(plane, plane)
    return found


def best(q: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, float]:
    """The point of least error, drawn a little to the middle, and its error by the definition."""
    middle, firm = (a + b) / 2, module.TOWARDS_MIDDLE * np.trace(q[:3, :3])
    x = np.linalg.solve(q[:3, :3] + firm * np.eye(3), firm * middle - q[:3, 3])
    return x, float(np.append(x, 1) @ q @ np.append(x, 1))


def one_by_one(mesh: Mesh, target: int) -> Mesh:
    """Garland and Heckbert's algorithm with a heap; only the link condition is asked."""
    p = mesh.vertices.double().numpy().copy()
    faces = {i: list(f) for i, f in enumerate(mesh.faces.tolist())}
    of: dict[int, set[int]] = {}
    for i, face in faces.items():
        for v in face:
            of.setdefault(v, set()).add(i)
    q, version, heap = quadrics(p, mesh.faces.numpy()), [0] * len(p), []

    def around(v: int) -> set[int]:
        return {w for i in of[v] for w in faces[i]} - {v}

    def push(a: int, b: int) -> None:
        x, error = best(q[a] + q[b], p[a], p[b])
        heapq.heappush(heap, (error, a, b, version[a], version[b], tuple(x)))

    for a in list(of):
        for b in around(a):
            if a < b:
                push(a, b)
    while len(faces) > target:
        _, a, b, va, vb, x = heapq.heappop(heap)
        if a not in of or b not in of or (va, vb) != (version[a], version[b]) or len(around(a) & around(b)) != 2:
            continue
        for i in of.pop(b):
            if a in faces[i]:
                for v in faces.pop(i):
                    of.get(v, set()).discard(i)
            else:
                faces[i][faces[i].index(b)] = a
                of[a].add(i)
        p[a], q[a] = x, q[a] + q[b]
        version[a] += 1
        for c in around(a):
            push(a, c)
    kept, numbered = np.unique(np.array(list(faces.values())), return_inverse=True)
    return Mesh(torch.from_numpy(p[kept]).float(), torch.from_numpy(numbered.reshape(-1, 3)))


def deviation(dense: Mesh, light: Mesh) -> float:
    """Root mean square distance of the dense mesh's surface from the light one's nearest plane."""
    points, _ = sample_surface(Trimesh(dense.vertices.numpy(), dense.faces.numpy(), process=False), 20_000, seed=1)
    there = Trimesh(light.vertices.numpy(), light.faces.numpy(), process=False)
    samples, of = sample_surface(there, 60_000, seed=2)
    near = KDTree(samples).query(points)[1]
    return float(np.sqrt((((points - samples[near]) * there.face_normals[of[near]]).sum(1) ** 2).mean()))


def collapsed(mesh: Mesh, target: int) -> Mesh:
    return Mesh(*collapse(mesh.vertices, mesh.faces, target))


def genus(mesh: Mesh) -> int:
    return 1 - (len(mesh.vertices) - len(mesh.faces) // 2) // 2


def grid(n: int) -> Mesh:
    """An open, flat square of side 1 at z = 0."""
    x, y = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    at = np.arange((n + 1) ** 2).reshape(n + 1, n + 1)
    a, b, c, d = at[:-1, :-1].ravel(), at[1:, :-1].ravel(), at[1:, 1:].ravel(), at[:-1, 1:].ravel()
    vertices = np.stack([x.ravel() / n, y.ravel() / n, 0 * x.ravel()], 1).astype(np.float32)
    return Mesh(torch.from_numpy(vertices), torch.from_numpy(np.r_[np.c_[a, b, c], np.c_[a, c, d]]))


@pytest.mark.parametrize("make", [lambda: bumpy(3), torus])
def test_no_worse_than_one_by_one(make):
    mesh = make()
    ours, theirs = deviation(mesh, collapsed(mesh, 400)), deviation(mesh, one_by_one(mesh, 400))
    assert ours < 1.15 * theirs


def test_the_best_point_and_its_error_are_what_the_definition_says():
    mesh = bumpy(2)
    p = mesh.vertices.double()
    q = quadrics(p.numpy(), mesh.faces.numpy())
    start, end = mesh.faces[:, 0], mesh.faces[:, 1]
    surface = module._surface(p, mesh.faces)
    points, errors = module._best(surface.quadrics[:, start] + surface.quadrics[:, end], (p[start] + p[end]) / 2)
    for i in range(len(start)):
        x, error = best(q[start[i]] + q[end[i]], p[start[i]].numpy(), p[end[i]].numpy())
        assert np.allclose(points[i], x, atol=1e-9)
        assert abs(float(errors[i]) - error) < 1e-12


def neighbours(edges: module._Edges, V: int) -> list[set[int]]:
    found: list[set[int]] = [{v} for v in range(V)]
    for a, b in zip(edges.start.tolist(), edges.end.tolist(), strict=True):
        found[a].add(b)
        found[b].add(a)
    return found


def test_no_face_belongs_to_two_of_those_that_are_collapsed_at_once():
    mesh = bumpy(4)
    edges = module._edges(module._surface(mesh.vertices.double(), mesh.faces))
    chosen = module._independent(edges, len(mesh.vertices), 10**9)
    around, taken = neighbours(edges, len(mesh.vertices)), set()
    assert len(chosen.start) > len(mesh.faces) / 40
    for a, b in zip(chosen.start.tolist(), chosen.end.tolist(), strict=True):
        assert not (around[a] | around[b]) & taken
        taken |= {a, b}


def test_the_first_pick_is_the_cheapest_of_its_surroundings(monkeypatch):
    monkeypatch.setattr(module, "PICKS", 1)
    mesh = bumpy(3)
    edges = module._edges(module._surface(mesh.vertices.double(), mesh.faces))
    chosen = module._independent(edges, len(mesh.vertices), 10**9)
    around = neighbours(edges, len(mesh.vertices))
    cost = edges.cost.float()
    for a, b, c in zip(chosen.start.tolist(), chosen.end.tolist(), chosen.cost.float(), strict=True):
        near = torch.tensor(sorted(around[a] | around[b]))
        beside = torch.isin(edges.start, near) | torch.isin(edges.end, near)
        assert c == cost[beside].min()


def test_of_more_than_are_wanted_the_cheapest():
    mesh = bumpy(3)
    edges = module._edges(module._surface(mesh.vertices.double(), mesh.faces))
    every, few = (module._independent(edges, len(mesh.vertices), most).cost for most in (10**9, 10))
    assert torch.equal(few.sort().values, every.sort().values[:10])


def test_a_hole_through_a_body_stays():
    few = collapsed(torus(), 60)
    assert is_watertight(few)
    assert genus(few) == 1


def test_a_tube_of_three_sides_is_not_pinched():
    """The ends of an edge around it have three neighbours in common, and only two faces."""
    tube = mesh_of(trimesh.creation.torus(0.35, 0.05, major_sections=60, minor_sections=3))
    few = collapsed(tube, 40)
    assert is_watertight(few)
    assert genus(few) == 1
    edges = np.sort(few.faces.numpy()[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), 1)
    assert set(np.unique(edges, axis=0, return_counts=True)[1]) == {2}


def edge_of(surface: module._Surface, start: int, end: int, target: list[float]) -> tuple[module._Edges, Tensor]:
    owner = torch.full((len(surface.positions),), -1)
    owner[[start, end]] = 0
    return (
        module._Edges(torch.tensor([start]), torch.tensor([end]), torch.tensor([target]).double(), torch.ones(1)),
        owner,
    )


def test_a_collapse_that_turns_or_flattens_a_face_is_refused():
    square = grid(6)
    surface = module._surface(square.vertices.double(), square.faces)
    start, end = 3 * 7 + 3, 3 * 7 + 4
    middle = (square.vertices[start] + square.vertices[end]) / 2
    assert not module._refused(surface, *edge_of(surface, start, end, middle.tolist()))
    beyond = (square.vertices[start] + torch.tensor([0.4, 0, 0])).tolist()
    assert module._refused(surface, *edge_of(surface, start, end, beyond))
    onto_the_next = square.vertices[4 * 7 + 3] - torch.tensor([1e-4, 0, 0])
    assert module._refused(surface, *edge_of(surface, start, end, onto_the_next.tolist()))


def test_where_no_collapse_looks_well_those_that_do_not_are_made(monkeypatch):
    monkeypatch.setattr(module, "TURNED", 1.1)
    few = collapsed(ball(3), 100)
    assert is_watertight(few)
    assert len(few.faces) == 100


def test_what_merges_with_the_rim_belongs_to_it():
    square = grid(6)
    surface = module._surface(square.vertices.double(), square.faces)
    assert surface.rim is not None
    inner, outer = 1 * 7 + 3, 0 * 7 + 3
    assert not surface.rim[inner]
    chosen, _ = edge_of(surface, inner, outer, square.vertices[outer].tolist())
    merged = module._collapsed(surface, chosen)
    assert len(merged.faces) == len(square.faces) - 2
    assert merged.rim is not None
    assert merged.rim[inner]


@pytest.mark.parametrize("subdivisions", [0, 1])
def test_what_cannot_be_collapsed_further_stays_closed(subdivisions: int):
    few = collapsed(ball(subdivisions), 2)
    assert is_watertight(few)
    assert len(few.faces) >= 4


def test_the_rim_of_an_open_surface_stays_where_it_was():
    few = collapsed(grid(30), 40)
    assert len(few.faces) <= 40
    edges = np.sort(few.faces.numpy()[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), 1)
    assert np.unique(edges, axis=0, return_counts=True)[1].max() <= 2
    p = few.vertices.double()[few.faces]
    areas = torch.linalg.cross(p[:, 1] - p[:, 0], p[:, 2] - p[:, 0])[:, 2] / 2
    assert float(areas.min()) > 0
    assert abs(float(areas.sum()) - 1) < 1e-3


def test_two_places_of_a_rim_are_not_pinched_together():
    """A strip one quad wide: every edge across it joins two places of the rim."""
    n = torch.arange(20)
    vertices = torch.cat([torch.stack([n / 20, 0 * n, y + 0 * n], 1) for y in (0.0, 0.02)]).float()
    a, b, c, d = n[:-1], n[1:], n[1:] + 20, n[:-1] + 20
    strip = Mesh(vertices, torch.cat([torch.stack([a, b, c], 1), torch.stack([a, c, d], 1)]))
    few = collapsed(strip, 4)
    p = few.vertices.double()[few.faces]
    area = float(torch.linalg.cross(p[:, 1] - p[:, 0], p[:, 2] - p[:, 0]).norm(dim=-1).sum()) / 2
    assert abs(area / (0.95 * 0.02) - 1) < 0.02


def test_a_corner_of_a_cube_stays_a_corner():
    box = Trimesh([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], process=False).convex_hull
    for _ in range(4):
        box = box.subdivide()
    few = collapsed(mesh_of(box), 12).vertices
    corners = torch.tensor([[x, y, z] for x in (0.0, 1.0) for y in (0.0, 1.0) for z in (0.0, 1.0)])
    assert float(torch.cdist(corners, few).amin(1).max()) < 0.02


def placed(mesh: Mesh, device: str) -> tuple[Tensor, Tensor]:
    return mesh.vertices.to(device), mesh.faces.to(device)


@pytest.mark.gpu
def test_as_good_on_a_gpu():
    mesh = bumpy(5)
    vertices, faces = collapse(*placed(mesh, "cuda"), 2000)
    there = Mesh(vertices.cpu(), faces.cpu())
    assert is_watertight(there)
    assert len(there.faces) == 2000
    assert abs(deviation(mesh, there) / deviation(mesh, collapsed(mesh, 2000)) - 1) < 0.05
