"""The gate of refinement: a refined mesh is kept only if it matches the views better than the mesh it came from."""

from dataclasses import dataclass, replace

import torch

from viewmesh.geometry.mesh import TexturedMesh
from viewmesh.nvdiffrec import losses
from viewmesh.nvdiffrec.problem import Problem
from viewmesh.render.draw import draw
from viewmesh.render.light import from_latlong
from viewmesh.render.shading import linear_to_srgb

VIEWS = 24  # at most so many views are compared, evenly picked
IOU_TOLERANCE = 1e-3  # pixels on the silhouette fall to either side by chance: a better picture is not refused for them


@dataclass(frozen=True)
class Match:
    """psnr in dB of sRGB values on white, over the crops around the object as far as the photos reach; iou of the
    coverages cut at one half."""

    psnr: float
    iou: float


@dataclass(frozen=True)
class Comparison:
    """mesh: the one to keep. before, after: how well the given and the fitted mesh match the views."""

    mesh: TexturedMesh
    before: Match
    after: Match
    kept: bool


def compare(problem: Problem, given: TexturedMesh, fitted: TexturedMesh) -> Comparison:
    """The fitted mesh is kept if its PSNR is at least the given mesh's and its mask IoU at most IOU_TOLERANCE below.

    The given mesh is measured under its own light and under the estimated one, whichever suits it better: it shall not
    lose for want of a light.
    """
    ours = match(problem, fitted)
    own, estimated = match(problem, given), match(problem, replace(given, environment=fitted.environment))
    theirs = own if own.psnr >= estimated.psnr else estimated
    if ours.psnr >= theirs.psnr and ours.iou >= theirs.iou - IOU_TOLERANCE:
        return Comparison(fitted, theirs, ours, True)
    lit = given if own.psnr >= estimated.psnr else replace(given, environment=fitted.environment)
    return Comparison(lit, theirs, ours, False)


@torch.no_grad()
def match(problem: Problem, mesh: TexturedMesh) -> Match:
    """How well a mesh in the scene frame, under its own environment, matches the fit's texture-pass crops."""
    targets, device = problem.texture_targets, problem.device
    count = min(VIEWS, len(targets))
    index = torch.linspace(0, len(targets) - 1, count).round().long()
    moved = mesh.to(device)
    light = None
    if mesh.environment is not None:
        base = from_latlong(mesh.environment.to(device), problem.preset.light_size)
        light = problem.light.prefilter(base)
    squared = pixels = inside = either = 0.0
    for one in index:
        batch = targets.batch(one[None])
        image = draw(moved, batch.cameras, light, problem.rasterizer, supersample=1)
        white = torch.ones(3, device=device)
        ours = linear_to_srgb(losses.over(image[..., :3], image[..., 3:], white).clamp(0, 1))
        theirs = linear_to_srgb(losses.over(batch.color, batch.alpha, white).clamp(0, 1))
        a, b = image[..., 3] >= 0.5, batch.alpha[..., 0] >= 0.5
        if batch.known is not None:
            ours, theirs, a, b = (values[batch.known[..., 0]] for values in (ours, theirs, a, b))
        squared += float(((ours - theirs) ** 2).sum())
        pixels += ours.numel()
        inside += float((a & b).sum())
        either += float((a | b).sum())
    return Match(
        psnr=float(-10 * torch.log10(torch.tensor(max(squared / pixels, 1e-10)))), iou=inside / max(either, 1.0)
    )
