import torch
from solids import ball, bumpy, cube, together, torus, volume

from viewmesh.geometry.clean import (
    components,
    drop_floaters,
    drop_hidden,
    fill_small_holes,
    is_watertight,
    split_nonmanifold,
    weld,
    without_bad_faces,
)
from viewmesh.geometry.mesh import Mesh


def test_watertight_means_closed_manifold_and_oriented():
    m = ball(2)
    assert is_watertight(m)
    assert not is_watertight(Mesh(m.vertices, m.faces[1:]))
    flipped = m.faces.clone()
    flipped[0] = flipped[0].flip(0)
    assert not is_watertight(Mesh(m.vertices, flipped))
    assert not is_watertight(Mesh(m.vertices, torch.cat([m.faces, m.faces[:1], m.faces[:1].flip(-1)])))


def test_components_are_numbered_by_area():
    small, big = cube((3, 0, 0), 0.5), cube()
    labels = components(together(small, big))
    assert labels.tolist() == [1] * 12 + [0] * 12


def test_floaters_go_and_what_matters_stays():
    m = together(cube((5, 0, 0), 0.05), cube(), cube((3, 0, 0), 0.5))
    kept = drop_floaters(m)
    assert len(kept.faces) == 24
    assert is_watertight(kept)
    assert len(drop_floaters(m, keep=0.5).faces) == 12
    assert drop_floaters(cube()).faces.shape == (12, 3)


def test_hidden_shells_go_whole_and_seen_components_stay_whole():
    inner = cube(side=0.5)
    m = together(cube(), Mesh(inner.vertices, inner.faces.flip(-1)))
    visible = torch.zeros(24, dtype=torch.bool)
    visible[:3] = True  # a quarter of the outer box
    kept = drop_hidden(m, visible)
    assert len(kept.faces) == 12
    assert is_watertight(kept)
    assert abs(volume(kept) - 1) < 1e-6
    assert drop_hidden(m, torch.zeros(24, dtype=torch.bool)) is m


def test_small_holes_are_closed_and_large_ones_left():
    m = torus()
    normal_faces = m.faces
    around = (normal_faces == 7).any(1)  # all faces of one vertex: a hole of six or so edges
    holed = Mesh(m.vertices, normal_faces[~around][1:])
    closed = fill_small_holes(holed, 16)
    assert is_watertight(closed)
    assert abs(volume(closed) - volume(m)) < 0.01 * volume(m)
    assert not is_watertight(fill_small_holes(holed, 4))  # only the triangle that is missing alone
    assert len(fill_small_holes(holed, 4).faces) == len(holed.faces) + 1


def test_filling_interpolates_colours():
    m = ball(2)
    around = (m.faces == 20).any(1)
    colors = torch.full((len(m.vertices), 3), 0.25)
    closed = fill_small_holes(Mesh(m.vertices, m.faces[~around], colors), 8)
    closed.validate()
    assert torch.allclose(closed.vertex_colors, torch.full_like(closed.vertex_colors, 0.25))


def test_weld_joins_a_triangle_soup():
    m = bumpy(2)
    soup = Mesh(m.vertices[m.faces].reshape(-1, 3), torch.arange(3 * len(m.faces)).reshape(-1, 3))
    assert not is_watertight(soup)
    welded = weld(soup)
    assert len(welded.vertices) == len(m.vertices)
    assert is_watertight(welded)


def test_bad_faces_go_and_fins_cancel():
    m = ball(1)
    n = len(m.faces)
    degenerate = torch.tensor([[3, 3, 5]])
    doubled = m.faces[:1].roll(1, -1)
    fin = torch.tensor([[0, 1, 2], [2, 1, 0]])
    dirty = Mesh(m.vertices, torch.cat([m.faces, degenerate, doubled, fin]))
    clean = without_bad_faces(dirty)
    assert is_watertight(clean)
    assert len(clean.faces) == n


def test_solids_that_share_an_edge_are_separated():
    m = weld(together(cube(), cube((1, 1, 0))))  # they touch along one edge
    assert not is_watertight(m)
    split = split_nonmanifold(m)
    assert is_watertight(split)
    assert len(split.vertices) == len(m.vertices) + 2
    assert int(components(split).max()) == 1
    assert abs(volume(split) - 2) < 1e-6


def test_solids_that_share_a_corner_are_separated():
    split = split_nonmanifold(weld(together(cube(), cube((1, 1, 1)))))
    assert int(components(split).max()) == 1
