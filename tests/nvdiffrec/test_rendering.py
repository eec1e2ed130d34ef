"""Cameras of a fit: near by or far away with a long lens, they show the scene, and what is in front hides the rest."""

import math
from types import SimpleNamespace

import pytest
import synthetic_views as synthetic
import torch
import trimesh

from viewmesh.geometry.camera import Cameras, look_at, pinhole
from viewmesh.geometry.mesh import Mesh
from viewmesh.nvdiffrec import surface
from viewmesh.nvdiffrec.rendering import viewpoint
from viewmesh.progress import never
from viewmesh.render.rasterizer import get_rasterizer

DISTANCES = [2.2, 18.0, 30.0, 1000.0]


def seen_from(distance: float, count: int = 3) -> Cameras:
    """Cameras so far from the origin that see a unit's width there."""
    poses = torch.from_numpy(synthetic.around(count, distance))
    return pinhole(poses, 2 * math.atan(0.5 / distance), 64, 64)


def two_balls(gap: float) -> Mesh:
    """One within the other; the inner one's faces come first."""
    inner, outer = (trimesh.creation.icosphere(4, radius) for radius in (0.45 - gap, 0.45))
    both = trimesh.util.concatenate([inner, outer])
    return Mesh(torch.tensor(both.vertices).float(), torch.tensor(both.faces))


@pytest.mark.parametrize("back_end", ["numba", "torch"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_the_nearer_surface_hides_the_other_one_at_every_distance(distance: float, back_end: str):
    mesh = two_balls(gap=1e-3)
    cameras = viewpoint(seen_from(distance), "cpu")
    clip = torch.cat([mesh.vertices, torch.ones_like(mesh.vertices[:, :1])], -1) @ cameras.clip_from_scene.mT
    face = get_rasterizer("cpu", back_end).rasterize(clip, mesh.faces, 64, 64).rast[..., 3]
    assert float((face > 0).float().mean()) == pytest.approx(math.pi * 0.45**2, rel=0.06)
    assert not bool(((face > 0) & (face <= len(mesh.faces) // 2)).any())


@pytest.mark.parametrize("distance", DISTANCES)
def test_faces_that_only_the_views_see_are_seen(distance: float, monkeypatch):
    away = pinhole(look_at(torch.tensor([[0, 0, 2.2]]), torch.tensor([0, 0, 5.0]), torch.tensor([0, 1.0, 0])), 1, 8, 8)
    monkeypatch.setattr(surface, "all_around", lambda *_: away)
    targets = SimpleNamespace(cameras=seen_from(distance, 12).resized(256, 256))
    problem = SimpleNamespace(device=torch.device("cpu"), rasterizer=get_rasterizer("cpu"), shape_targets=targets)
    inner, outer = surface.seen_faces(problem, two_balls(gap=0.1), never).chunk(2)
    assert not bool(inner.any())
    assert float(outer.float().mean()) > 0.95
