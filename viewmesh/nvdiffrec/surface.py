"""Between the passes: from an iso-surface and a volume of material to a light mesh with an atlas and textures."""

from dataclasses import dataclass

import torch
from torch import Tensor

from viewmesh.errors import EmptyReconstruction
from viewmesh.geometry.camera import Cameras, fibonacci_sphere, look_at, pinhole
from viewmesh.geometry.clean import drop_floaters, drop_hidden
from viewmesh.geometry.mesh import Material, Mesh, TexturedMesh
from viewmesh.geometry.simplify import simplify
from viewmesh.geometry.unwrap import unwrap
from viewmesh.nvdiffrec.initial import HALF
from viewmesh.nvdiffrec.optim import Variables
from viewmesh.nvdiffrec.problem import Problem
from viewmesh.nvdiffrec.rendering import viewpoint
from viewmesh.nvdiffrec.view_corrections import corrections
from viewmesh.nvdiffrec.volume import material_at
from viewmesh.render.bake import dilate, sample_at, texel_map
from viewmesh.render.light import from_latlong
from viewmesh.render.rasterizer import Rasterizer


@dataclass(frozen=True)
class Surface:
    """The fixed topology of the texture pass, on the fit's device.

    vertices: (V, 3) where they start. faces, uv_faces: (F, 3). uvs: (T, 2). edges: (E, 2) each once. degree: (V, 1).
    """

    vertices: Tensor
    faces: Tensor
    uvs: Tensor
    uv_faces: Tensor
    edges: Tensor
    degree: Tensor


def surface_of(vertices: Tensor, faces: Tensor, uvs: Tensor, uv_faces: Tensor, device: torch.device) -> Surface:
    pairs = faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2).sort(-1).values
    edges = torch.unique(pairs, dim=0)
    degree = torch.bincount(edges.reshape(-1), minlength=len(vertices)).clamp(min=1).float()[:, None]
    return Surface(*(t.to(device) for t in (vertices.float(), faces, uvs.float(), uv_faces, edges, degree)))


def from_shape(problem: Problem, variables: Variables) -> tuple[Surface, Variables]:
    """Clean, simplify, unwrap and bake the shape pass's result; returns the surface and the texture pass's variables.

    Raises EmptyReconstruction when nothing is left.
    """
    vertices, faces = problem.shape.final(variables)
    if len(faces) == 0:
        raise EmptyReconstruction("The shape pass ended without a surface.", hint="Check the masks and the cameras.")
    mesh = Mesh(vertices.detach().cpu(), faces.cpu())
    mesh = drop_floaters(drop_hidden(mesh, visible_faces(problem.rasterizer, mesh, problem)))
    mesh = simplify(mesh, problem.preset.target_faces)
    size = problem.preset.texture_size
    atlas = unwrap(mesh, size, timeout_s=problem.preset.unwrap_timeout_s)
    surface = surface_of(mesh.vertices, mesh.faces, atlas.uvs, atlas.uv_faces, problem.device)

    texels = texel_map(surface.uvs, surface.uv_faces, size)
    valid = texels.face >= 0
    points = sample_at(texels, surface.vertices, surface.faces)[valid]
    base_color, orm = material_at(variables, points, HALF)
    texture = torch.zeros(size, size, 6, device=problem.device)
    texture[valid] = torch.cat([base_color, orm], -1)
    texture = dilate(texture, valid, size)
    flat = torch.tensor([0.0, 0.0, 1.0], device=problem.device).expand(size, size, 3).contiguous()
    material = Material(texture[..., :3], texture[..., 3:], flat)
    kept = {name: variables[name] for name in ("light", "pose", "exposure") if name in variables}
    return surface, {**texture_variables(surface, material), **kept}


def from_mesh(problem: Problem, initial: Mesh | TexturedMesh) -> tuple[Surface, Variables]:
    """The texture pass's start from a given mesh in the scene frame; it is unwrapped when it has no UVs."""
    device, size = problem.device, problem.preset.texture_size
    if isinstance(initial, TexturedMesh):
        mesh = initial.mesh
        surface = surface_of(mesh.vertices, mesh.faces, initial.uvs, initial.uv_faces, device)
        material = initial.material
    else:
        mesh = simplify(initial, problem.preset.target_faces)
        atlas = unwrap(mesh, size, timeout_s=problem.preset.unwrap_timeout_s)
        surface = surface_of(mesh.vertices, mesh.faces, atlas.uvs, atlas.uv_faces, device)
        colors = mesh.vertex_colors if mesh.vertex_colors is not None else torch.full_like(mesh.vertices, 0.5)
        texels = texel_map(surface.uvs, surface.uv_faces, size)
        base_color = dilate(sample_at(texels, colors.to(device), surface.faces), texels.face >= 0, size)
        material = plain_material(base_color)
    side = problem.preset.light_size
    light = torch.ones(6, side, side, 3, device=device)
    if isinstance(initial, TexturedMesh) and initial.environment is not None:
        light = from_latlong(initial.environment, side)
    variables = {
        **texture_variables(surface, material),
        "light": light,
        **corrections(problem.preset, len(problem.views), device),
    }
    return surface, {name: value.to(device) for name, value in variables.items()}


def plain_material(base_color: Tensor) -> Material:
    """A rough dielectric of the given base colour (H, W, 3), unoccluded, without bumps."""
    orm = torch.tensor([1.0, 0.8, 0.0], device=base_color.device).expand_as(base_color).contiguous()
    flat = torch.tensor([0.0, 0.0, 1.0], device=base_color.device).expand_as(base_color).contiguous()
    return Material(base_color, orm, flat)


def texture_variables(surface: Surface, material: Material) -> Variables:
    return {
        "offset": torch.zeros_like(surface.vertices),
        "base_color": material.base_color.clone(),
        "orm": material.orm.clone(),
        "normal_map": material.normal.clone(),
    }


@torch.no_grad()
def visible_faces(rasterizer: Rasterizer, mesh: Mesh, problem: Problem, views: int = 60, size: int = 384) -> Tensor:
    """Which faces (F,) bool some input camera, or some camera of a sphere around the object, can see."""
    eyes = 2.2 * fibonacci_sphere(views)
    around = pinhole(look_at(eyes, torch.zeros(3), torch.tensor([0.0, 1.0, 0.0])), 0.7, size, size)
    seen = torch.zeros(len(mesh.faces) + 1, dtype=torch.bool, device=problem.device)
    vertices = torch.cat([mesh.vertices, torch.ones_like(mesh.vertices[:, :1])], -1).to(problem.device)
    faces = mesh.faces.to(problem.device)
    for cameras in (around, problem.shape_targets.cameras):
        for one in range(len(cameras)):
            view: Cameras = cameras[one]
            clip = vertices @ viewpoint(view, problem.device).clip_from_scene.mT
            rast = rasterizer.rasterize(clip, faces, view.height, view.width).rast
            seen[rast[..., 3].long().unique()] = True
    return seen[1:].cpu()
