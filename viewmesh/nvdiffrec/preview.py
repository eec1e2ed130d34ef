"""What a fit that is still running looks like: one small picture, cheap enough for every slice."""

from dataclasses import replace

import torch
from torch import Tensor

from viewmesh.nvdiffrec.fit import State
from viewmesh.nvdiffrec.initial import HALF
from viewmesh.nvdiffrec.rendering import Samples, Viewpoint, picture, viewpoint
from viewmesh.nvdiffrec.volume import material_at
from viewmesh.render.shading import face_viewer, linear_to_srgb, shade_directions


@torch.no_grad()
def preview(state: State, size: int = 256) -> Tensor | None:
    """The state from the first view's camera, cut to the object: (size, size, 4) uint8 sRGB, straight alpha, on the
    CPU. None where there is no surface yet (or no longer)."""
    problem, variables = state.problem, state.variables
    raster = problem.rasterizer
    light = problem.light.prefilter(variables["light"])
    surface = state.surface
    if surface is not None and "base_color" in variables:
        vertices, faces = surface.vertices + variables["offset"], surface.faces
        maps = torch.cat([variables["base_color"], variables["orm"]], -1)

        def material(samples: Samples) -> tuple[Tensor, Tensor]:
            uv, _ = raster.interpolate(surface.uvs, samples.rast, surface.uv_faces)
            base_color, orm = raster.texture(maps, uv, boundary="clamp").split(3, dim=-1)
            return base_color, orm
    else:
        vertices, faces = problem.shape.final(variables)

        def material(samples: Samples) -> tuple[Tensor, Tensor]:
            return material_at(variables, samples.points, HALF)

    if len(faces) == 0:
        return None

    def shade(samples: Samples) -> Tensor:
        normals = face_viewer(samples.normals, samples.normals, samples.view)
        return shade_directions(normals, samples.view, *material(samples), light, raster)

    image = picture(raster, _first_camera(state, size), vertices, faces, shade, size)
    alpha = image.alpha[0].clamp(0, 1)
    straight = linear_to_srgb((image.color[0] / alpha.clamp(min=1e-4)).clamp(0, 1))
    return (torch.cat([straight, alpha], -1) * 255).round().to(torch.uint8).cpu()


def _first_camera(state: State, size: int) -> Viewpoint:
    cameras = state.problem.shape_targets.cameras[torch.tensor([0])]
    scale = size / cameras.height
    scaled = replace(
        cameras, fx=cameras.fx * scale, fy=cameras.fy * scale, cx=cameras.cx * scale, cy=cameras.cy * scale,
        height=size, width=size,
    )  # fmt: skip
    return viewpoint(scaled, state.problem.device)
