"""A fit small enough for tests: 12 views of 64 pixels, 24 + 1 + 8 steps, a field of 40 voxels a side."""

from dataclasses import replace
from functools import partial

import synthetic_views as synthetic
import torch

from viewmesh.geometry.mesh import TexturedMesh
from viewmesh.geometry.nearest import NearestSurface
from viewmesh.nvdiffrec import fit, problem
from viewmesh.nvdiffrec.initial import initial_field
from viewmesh.nvdiffrec.presets import Preset, preset
from viewmesh.render.draw import draw
from viewmesh.views.viewset import ViewSet

TINY: Preset = replace(
    preset("preview", "cpu"), lattice=14, shape_steps=24, shape_size=48, shape_batch=2, volume=(8, 16), light_size=8,
    texture_steps=8, texture_crop=64, texture_batch=2, target_faces=400, texture_size=64,
)  # fmt: skip
CELL = 0.65 / TINY.lattice  # the box's longest side over the lattice, scene units
HELD_OUT = synthetic.ring(5, height=0.4)


def coarse_field(patch) -> None:
    """Starts from 40 voxels a side instead of 96, ten times as fast."""
    patch.setattr(problem, "initial_field", partial(initial_field, resolution=40))


def started(views: ViewSet, seed: int = 0, numbers: Preset = TINY, **options) -> fit.State:
    return fit.start(views, numbers, torch.Generator().manual_seed(seed), **options)


def fitted(views: ViewSet, numbers: Preset = TINY, **options) -> TexturedMesh:
    return fit.finish(fit.advance(started(views, numbers=numbers, **options))[0])


def chamfer(vertices: torch.Tensor, faces: torch.Tensor) -> float:
    """Mean of both directions, scene units: mesh to exact surface, and what held-out views see of that to the mesh."""
    mesh = fit.Mesh(vertices, faces)
    there = synthetic.signed_distance(vertices[faces].mean(1)).abs().mean()
    views = synthetic.viewset(HELD_OUT, depth=True)
    assert views.cameras is not None
    assert views.depths is not None
    seen = views.cameras.unproject(views.depths)[views.depths > 0]
    _, back = NearestSurface(mesh, 20_000).query(seen)
    return float(there + back.mean()) / 2


def held_out_iou(mesh: TexturedMesh) -> float:
    views = synthetic.viewset(HELD_OUT)
    assert views.cameras is not None
    ours = draw(mesh, views.cameras, supersample=1)[..., 3] > 0.5
    theirs = views.images[..., 3] > 127
    return float((ours & theirs).sum() / (ours | theirs).sum())


def held_out_psnr(mesh: TexturedMesh) -> float:
    """Of sRGB values on white."""
    views = synthetic.viewset(HELD_OUT)
    assert views.cameras is not None
    drawn = draw(mesh, views.cameras, supersample=1)
    ours = srgb(drawn[..., :3] + 1 - drawn[..., 3:])
    alpha = views.images[..., 3:].float() / 255
    theirs = views.images[..., :3].float() / 255 * alpha + 1 - alpha
    return float(-10 * torch.log10(((ours - theirs) ** 2).mean()))


def srgb(linear: torch.Tensor) -> torch.Tensor:
    x = linear.clamp(0, 1)
    return torch.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)
