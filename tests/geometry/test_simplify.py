import numpy as np
import pytest
import torch
from solids import ball, bumpy, cube, together, torus, volume

from viewmesh.geometry.clean import is_watertight
from viewmesh.geometry.mesh import Mesh
from viewmesh.geometry.simplify import simplify


@pytest.mark.parametrize("target", [150, 600])
@pytest.mark.parametrize("make", [bumpy, torus])
def test_fewer_faces_still_closed_and_of_the_same_volume(make, target):
    m = make()
    few = simplify(m, target).validate()
    assert 0.5 * target < len(few.faces) <= target
    assert is_watertight(few)
    assert abs(volume(few) / volume(m) - 1) < 0.08
    ordered = np.sort(few.faces.numpy(), 1)
    assert len(np.unique(ordered, axis=0)) == len(ordered)
    p = few.vertices.double()[few.faces]
    assert float(torch.linalg.cross(p[:, 1] - p[:, 0], p[:, 2] - p[:, 0]).norm(dim=-1).min()) > 1e-9


def test_a_small_mesh_is_returned_as_it_is():
    m = cube()
    assert simplify(m, 12) is m


def test_same_mesh_same_result():
    a, b = simplify(bumpy(), 300), simplify(bumpy(), 300)
    assert torch.equal(a.vertices, b.vertices)
    assert torch.equal(a.faces, b.faces)


def test_colours_come_along():
    m = ball(4)
    colored = Mesh(m.vertices, m.faces, m.vertices + 0.5)  # colour = position
    few = simplify(colored, 500)
    assert few.vertex_colors is not None
    assert float((few.vertex_colors - few.vertices - 0.5).abs().max()) < 0.05


def test_slivers_are_in_nobodys_way():
    m = ball(2)
    f = m.faces[0]
    v = torch.cat([m.vertices, m.vertices[f[:1]] + 1e-7])  # a vertex doubled, joined by two slivers
    a, b, c = (int(i) for i in f)
    other = (m.faces == a).any(1) & (m.faces == b).any(1)
    other[0] = False
    d = int(next(i for i in m.faces[other][0].tolist() if i not in (a, b)))
    n = len(m.vertices)
    faces = torch.cat([m.faces[(~other) & (torch.arange(len(m.faces)) != 0)],
                       torch.tensor([[n, b, c], [a, n, c], [a, d, n], [n, d, b]])])  # fmt: skip
    slivered = Mesh(v, faces)
    assert is_watertight(slivered)
    few = simplify(slivered, 100)
    assert len(few.faces) == 100
    assert is_watertight(few)


def test_pieces_that_touch_stay_closed():
    m = together(bumpy(3), torus())
    assert is_watertight(simplify(m, 400))
