"""Between the passes: from an iso-surface and a volume of material to a light mesh with an atlas and textures."""

from dataclasses import dataclass

import torch
from scipy.spatial import KDTree
from torch import Tensor

from viewmesh.errors import EmptyReconstruction
from viewmesh.geometry.clean import drop_floaters, drop_hidden
from viewmesh.geometry.mesh import Material, Mesh, TexturedMesh
from viewmesh.geometry.normals import vertex_normals, vertex_tangents
from viewmesh.geometry.simplify import simplify
from viewmesh.geometry.unwrap import unwrap
from viewmesh.nvdiffrec.initial import HALF
from viewmesh.nvdiffrec.optim import Variables
from viewmesh.nvdiffrec.problem import Problem
from viewmesh.nvdiffrec.rendering import FAR, NEAR
from viewmesh.nvdiffrec.view_corrections import corrections
from viewmesh.nvdiffrec.volume import material_at
from viewmesh.render.bake import TexelMap, dilate, sample_at, texel_map
from viewmesh.render.light import from_latlong
from viewmesh.render.tangent_space import into_tangent_space
from viewmesh.render.visible import all_around, visible_faces


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
    mesh = drop_floaters(drop_hidden(mesh, seen_faces(problem, mesh)))
    light = simplify(mesh, problem.preset.target_faces)
    size = problem.preset.texture_size
    atlas = unwrap(light, size, timeout_s=problem.preset.unwrap_timeout_s)
    surface = surface_of(light.vertices, light.faces, atlas.uvs, atlas.uv_faces, problem.device)

    texels = texel_map(surface.uvs, surface.uv_faces, size)
    points = sample_at(texels, surface.vertices, surface.faces)[texels.valid]
    base_color, orm = material_at(variables, points, HALF)
    normals = flat_normals(len(points), problem.device)
    if problem.preset.normal_map != "flat":
        normals = normals_of(mesh, surface, texels, points)
    texture = torch.zeros(size, size, 9, device=problem.device)
    texture[texels.valid] = torch.cat([base_color, orm, normals], -1)
    material = Material(*dilate(texture, texels.valid).split(3, -1))
    kept = {name: variables[name] for name in ("light", "pose", "exposure") if name in variables}
    return surface, {**texture_variables(surface, material), **kept}


def normals_of(dense: Mesh, surface: Surface, texels: TexelMap, points: Tensor, neighbours: int = 4) -> Tensor:
    """Tangent-space normals (P, 3) at the valid texels: of the dense mesh's vertices nearest to `points` (P, 3).

    What simplification took from the shape stays in the shading.
    """
    distance, nearest = KDTree(dense.vertices.numpy()).query(points.cpu().numpy(), k=neighbours, workers=-1)
    weight = torch.from_numpy(1 / (distance + 1e-6)).float()[..., None]
    shading = vertex_normals(dense.vertices, dense.faces)[torch.from_numpy(nearest)]
    shading = torch.nn.functional.normalize((shading * weight).sum(1), dim=-1).to(points.device)
    normals = vertex_normals(surface.vertices, surface.faces)
    tangents = vertex_tangents(surface.vertices, surface.faces, normals, surface.uvs, surface.uv_faces)
    local = into_tangent_space(
        shading,
        sample_at(texels, normals, surface.faces)[texels.valid],
        sample_at(texels, tangents, surface.uv_faces)[texels.valid],
    )
    return torch.nn.functional.normalize(local, dim=-1)


def flat_normals(count: int, device: torch.device) -> Tensor:
    return torch.tensor([0.0, 0.0, 1.0], device=device).expand(count, 3)


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


def seen_faces(problem: Problem, mesh: Mesh) -> Tensor:
    """Which faces (F,) bool, on the CPU, some input camera, or some camera of a sphere around the object, can see."""
    cameras = (all_around(60, 0.7, 384), problem.shape_targets.cameras)
    seen = visible_faces(mesh.to(problem.device), cameras, problem.rasterizer, near=NEAR, far=FAR)
    return seen.cpu()
