"""First pass: topology, coarse material and light together, from crops under random backgrounds."""

import torch
from torch import Tensor

from viewmesh.nvdiffrec import losses
from viewmesh.nvdiffrec.initial import HALF
from viewmesh.nvdiffrec.optim import Moments, Variables, adam, zero_moments
from viewmesh.nvdiffrec.problem import Problem
from viewmesh.nvdiffrec.rendering import Picture, Samples, picture
from viewmesh.nvdiffrec.shape import Shape
from viewmesh.nvdiffrec.targets import Batch
from viewmesh.nvdiffrec.view_corrections import corrected, corrections, exposed
from viewmesh.nvdiffrec.volume import material_at, new_volume
from viewmesh.render.shading import face_viewer, linear_to_srgb, shade_directions


def new_variables(problem: Problem) -> Variables:
    """The field from the visual hull or the depth images, grey material, even light."""
    preset, device = problem.preset, problem.device
    return {
        **problem.shape.variables(problem.field),
        **new_volume(preset.volume, device),
        "light": torch.full((6, preset.light_size, preset.light_size, 3), 0.8, device=device),
        **corrections(preset, len(problem.views), device),
    }


def rates(problem: Problem, decay: float) -> dict[str, float]:
    preset = problem.preset
    named = {
        "sdf": preset.lr_sdf, "deform": preset.lr_deform, "weights": preset.lr_deform, "light": preset.lr_light,
        "exposure": preset.lr_exposure, "pose": preset.lr_pose,
        **{f"volume{i}": preset.lr_volume for i in range(len(preset.volume))},
    }  # fmt: skip
    return {name: rate * decay for name, rate in named.items()}


def shape_step(
    problem: Problem,
    shape: Shape,
    variables: Variables,
    moments: Moments,
    index: Tensor,
    random: torch.Generator,
    t: float,
    *,
    report: bool = True,
) -> tuple[Moments, dict[str, float]]:
    """One update in place; t in [0, 1) is how far the pass has come. An empty surface re-seeds the field instead.

    report: whether the metrics are wanted; on a GPU they cost a wait for it.
    """
    leaves = {name: v.detach().requires_grad_() for name, v in variables.items()}
    vertices, faces, developable = shape.surface(leaves)
    if len(faces) == 0:
        return reseed(problem, variables), {"reseeded": 1.0}
    batch = problem.shape_targets.batch(index)
    loss, image = _loss(problem, leaves, vertices, faces, batch, random)
    loss = loss + shape.regularity(leaves, problem.preset, t) + problem.preset.flexi_developable * developable
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    moments = adam(
        variables,
        dict(zip(leaves, gradients, strict=True)),
        moments,
        rates(problem, problem.preset.final_rate**t),
        betas=(0.9, 0.99),
    )
    with torch.no_grad():
        variables["light"].clamp_(min=0)
    return moments, metrics(loss, image, batch, len(faces)) if report else {}


def _loss(problem, leaves, vertices, faces, batch: Batch, random: torch.Generator) -> tuple[Tensor, Picture]:
    preset, device = problem.preset, problem.device
    light = problem.light.prefilter(leaves["light"])
    extra = []

    def material(samples: Samples) -> Tensor:
        near = samples.points.detach() + 0.01 * torch.randn(samples.points.shape, generator=random, device=device)
        colors, orms = material_at(leaves, torch.cat([samples.points, near]), HALF)
        (base_color, other), (orm, other_orm) = colors.chunk(2), orms.chunk(2)
        extra.append(losses.material_l1(base_color, other) + losses.material_l1(orm, other_orm))
        normals = face_viewer(samples.normals, samples.normals, samples.view)
        return shade_directions(normals, samples.view, base_color, orm, light, problem.rasterizer)

    image = picture(
        problem.rasterizer, corrected(leaves, batch, device), vertices, faces, material, problem.preset.shape_size
    )
    loss = image_loss(problem, leaves, image, batch, random)
    loss = loss + preset.material_smooth * extra[0] + preset.light_white * losses.neutral(leaves["light"])
    return loss, image


def image_loss(problem: Problem, leaves, image: Picture, batch: Batch, random: torch.Generator) -> Tensor:
    """Colour over one random background a view, coverage, depth: what both passes compare, where the views know it."""
    preset = problem.preset
    background = torch.rand(len(batch.color), 1, 1, 3, generator=random, device=problem.device)
    color, alpha = exposed(leaves, image.color, batch), image.alpha
    if batch.known is not None:  # equal values elsewhere: what is known weighs as much as in a view that knows all
        color, alpha = torch.where(batch.known, color, batch.color), torch.where(batch.known, alpha, batch.alpha)
    loss = losses.log_srgb_l1(
        losses.over(color, alpha.clamp(0, 1), background), losses.over(batch.color, batch.alpha, background)
    )
    loss = loss + preset.mask * losses.mask_l2(alpha, batch.alpha)
    if batch.depth is not None:
        loss = loss + preset.depth * losses.depth_l1(image.depth, batch.depth)
    return loss


@torch.no_grad()
def metrics(loss: Tensor, image: Picture, batch: Batch, faces: int) -> dict[str, float]:
    white = torch.ones(3, device=image.color.device)
    ours = linear_to_srgb(losses.over(image.color, image.alpha, white).clamp(0, 1))
    theirs = linear_to_srgb(losses.over(batch.color, batch.alpha, white).clamp(0, 1))
    if batch.known is not None:
        ours, theirs = ours[batch.known[..., 0]], theirs[batch.known[..., 0]]
    return {"loss": float(loss), "psnr": float(losses.psnr(ours, theirs)), "faces": float(faces)}


def reseed(problem: Problem, variables: Variables) -> Moments:
    """The field back at its start, grown by half a cell, and the optimiser's memory gone: an empty mesh is no end."""
    fresh = problem.shape.variables(problem.field)
    variables["sdf"].copy_(fresh["sdf"] - 0.5)
    variables["deform"].zero_()
    return zero_moments(variables)
