"""Unit vectors, and the normals and tangents of small meshes."""

import torch

from viewmesh.geometry.normals import unit, vertex_normals, vertex_tangents
from viewmesh.geometry.rows import rows_at


def test_unit_is_torchs_normalize_both_ways():
    vectors = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(unit(vectors), torch.nn.functional.normalize(vectors, dim=-1))
    assert torch.autograd.gradcheck(unit, vectors)


def test_nothing_becomes_of_a_vector_without_length():
    nothing = torch.zeros(2, 3, requires_grad=True)
    out = unit(nothing)
    assert torch.equal(out, torch.zeros(2, 3))
    assert bool(torch.autograd.grad(out.sum(), nothing)[0].isfinite().all())


def test_rows_are_those_of_an_index_both_ways():
    values = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 4, 4], [2, 0, 4]])
    assert torch.equal(rows_at(values, index), values[index])
    assert torch.autograd.gradcheck(lambda v: rows_at(v, index), values)
    flat = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: rows_at(v, index), flat)


def test_a_square_in_the_xy_plane():
    vertices = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [5, 5, 5]])
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    normals = vertex_normals(vertices, faces)
    assert torch.equal(normals, torch.tensor([[0.0, 0, 1]]).expand(5, 3))  # the last vertex has no face
    uvs = torch.tensor([[0.0, 1], [1, 1], [1, 0], [0, 0]])  # u along x, v against y, as an image has it
    tangents = vertex_tangents(vertices, faces, normals, uvs, faces)
    torch.testing.assert_close(tangents, torch.tensor([[1.0, 0, 0, 1]]).expand(4, 4))
    mirrored = vertex_tangents(vertices, faces, normals, uvs * torch.tensor([-1.0, 1]), faces)
    torch.testing.assert_close(mirrored, torch.tensor([[-1.0, 0, 0, -1]]).expand(4, 4))
