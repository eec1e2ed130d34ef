"""Second pass: textures in an atlas, light, and small moves of the vertices, on a fixed topology."""

import torch
from torch import Tensor

from viewmesh.geometry.normals import vertex_normals, vertex_tangents
from viewmesh.nvdiffrec import losses
from viewmesh.nvdiffrec.optim import Moments, Variables, adam
from viewmesh.nvdiffrec.problem import Problem
from viewmesh.nvdiffrec.rendering import Picture, Samples, picture
from viewmesh.nvdiffrec.shape_pass import image_loss, metrics
from viewmesh.nvdiffrec.surface import Surface
from viewmesh.nvdiffrec.targets import Batch
from viewmesh.nvdiffrec.view_corrections import corrected
from viewmesh.render.rasterizer import Topology
from viewmesh.render.shading import face_viewer, perturb_normal, shade_directions


def rates(problem: Problem, decay: float) -> dict[str, float]:
    preset = problem.preset
    named = {
        "offset": preset.lr_vertices, "base_color": preset.lr_texture, "orm": preset.lr_texture,
        "light": preset.lr_light, "exposure": preset.lr_exposure, "pose": preset.lr_pose,
    }  # fmt: skip
    if preset.normal_map == "optimised":
        named["normal_map"] = preset.lr_normal_map
    return {name: rate * decay for name, rate in named.items()}


def texture_step(
    problem: Problem,
    surface: Surface,
    topology: Topology,
    variables: Variables,
    moments: Moments,
    index: Tensor,
    random: torch.Generator,
    t: float,
    *,
    report: bool = True,
) -> tuple[Moments, dict[str, float]]:
    """One update in place; t in [0, 1) is how far the pass has come; report as in `shape_step`."""
    moving = rates(problem, problem.preset.final_rate**t)
    leaves = {name: v.detach().requires_grad_(name in moving) for name, v in variables.items()}
    batch = problem.texture_targets.batch(index)
    loss, image = _loss(problem, surface, topology, leaves, batch, random, t)
    wanted = [name for name, leaf in leaves.items() if leaf.requires_grad]
    gradients = torch.autograd.grad(loss, [leaves[name] for name in wanted], allow_unused=True)
    moments = adam(variables, dict(zip(wanted, gradients, strict=True)), moments, moving)
    project(variables)
    return moments, metrics(loss, image, batch, len(surface.faces)) if report else {}


@torch.no_grad()
def project(variables: Variables) -> None:
    """Back to what is physical: colours in [0, 1], roughness away from a mirror, outward normals, light >= 0."""
    variables["base_color"].clamp_(0, 1)
    variables["orm"][..., 0].clamp_(0, 1)
    variables["orm"][..., 1].clamp_(0.1, 1)
    variables["orm"][..., 2].clamp_(0, 1)
    slope = variables["normal_map"][..., :2] / variables["normal_map"][..., 2:].clamp(min=0.1)
    variables["normal_map"][..., :2] = slope.clamp(-2, 2)
    variables["normal_map"][..., 2] = 1
    variables["light"].clamp_(min=0)


def _loss(
    problem, surface, topology, leaves, batch: Batch, random: torch.Generator, t: float
) -> tuple[Tensor, Picture]:
    preset, device, raster = problem.preset, problem.device, problem.rasterizer
    light = problem.light.prefilter(leaves["light"])
    maps = torch.cat([leaves["base_color"], leaves["orm"]], -1)
    extra = []

    def material(samples: Samples) -> Tensor:
        uv, _ = raster.interpolate(surface.uvs, samples.rast, surface.uv_faces)
        jitter = torch.randn(uv.shape, generator=random, device=device) * (2.0 / preset.texture_size)
        both = torch.cat([uv, uv.detach() + jitter])  # one look-up: each has a gradient as large as the maps
        values, other = raster.texture(maps, both, boundary="clamp").chunk(2)
        base_color, orm = values.split(3, dim=-1)
        extra.append(losses.material_l1(values, other))
        if preset.normal_map != "flat":
            bump = raster.texture(leaves["normal_map"], uv, boundary="clamp")
            tangents, _ = raster.interpolate(tangent_frame, samples.rast, surface.uv_faces)
            normals = perturb_normal(samples.normals, tangents, bump, samples.view)
        else:
            normals = face_viewer(samples.normals, samples.normals, samples.view)
        return shade_directions(normals, samples.view, base_color, orm, light, raster)

    vertices = surface.vertices + leaves["offset"]
    if preset.normal_map != "flat":
        still = vertices.detach()
        normals = vertex_normals(still, surface.faces)
        tangent_frame = vertex_tangents(still, surface.faces, normals, surface.uvs, surface.uv_faces)
    image = picture(
        raster, corrected(leaves, batch, device), vertices, surface.faces, material, preset.texture_crop, topology
    )
    loss = image_loss(problem, leaves, image, batch, random)
    a, b = surface.vertices[surface.edges].unbind(1)
    edge = ((a - b) ** 2).sum(-1).mean()  # makes the weight independent of the mesh's density
    loss = loss + preset.laplacian * losses.laplacian(leaves["offset"], surface.edges, surface.degree) / edge * (
        1 - 0.9 * t
    )
    loss = loss + preset.material_smooth * extra[0] + preset.light_white * losses.neutral(leaves["light"])
    return loss, image
