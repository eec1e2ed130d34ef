"""Between the passes: from an iso-surface and a volume of material to a light mesh with an atlas and textures.

Three steps that take seconds each on a CPU: `cleaned`, `unwrapped`, `baked`. They ask `cancelled` at least every two
seconds.
"""

from collections.abc import Callable
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
from viewmesh.nvdiffrec.rendering import planes
from viewmesh.nvdiffrec.view_corrections import corrections
from viewmesh.nvdiffrec.volume import material_at
from viewmesh.progress import check, never
from viewmesh.render.bake import TexelMap, dilate, sample_at, texel_map
from viewmesh.render.light import from_latlong
from viewmesh.render.tangent_space import into_tangent_space
from viewmesh.render.visible import all_around, visible_faces

POINTS = 2**18  # looked up between two questions whether to go on


@dataclass(frozen=True, eq=False)
class Cleaned:
    """The shape pass's surface, on the CPU: as dense as it came, and the light mesh that will stand for it."""

    dense: Mesh
    light: Mesh


@dataclass(frozen=True, eq=False)
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


def cleaned(problem: Problem, variables: Variables, cancelled: Callable[[], bool] = never) -> Cleaned:
    """The shape pass's result without what no camera sees and without floaters, and a light mesh of it.

    Raises EmptyReconstruction when nothing is left, Cancelled.
    """
    vertices, faces = problem.shape.final(variables)
    if len(faces) == 0:
        raise EmptyReconstruction("The shape pass ended without a surface.", hint="Check the masks and the cameras.")
    mesh = Mesh(vertices.detach(), faces)
    seen = seen_faces(problem, mesh, cancelled)
    check(cancelled)
    dense = drop_floaters(drop_hidden(mesh, seen))
    check(cancelled)
    return Cleaned(dense.to("cpu"), simplify(dense, problem.preset.target_faces).to("cpu"))


def unwrapped(problem: Problem, mesh: Mesh, cancelled: Callable[[], bool] = never) -> Surface:
    """A mesh with an atlas, ready for the texture pass. Raises Cancelled.

    The one long step: 1 to 8 s on two CPU cores for 12,000 to 80,000 faces, in bad cases the preset's
    `unwrap_timeout_s` and the packing after it.
    """
    preset = problem.preset
    atlas = unwrap(mesh, preset.texture_size, timeout_s=preset.unwrap_timeout_s, cancelled=cancelled)
    return surface_of(mesh.vertices, mesh.faces, atlas.uvs, atlas.uv_faces, problem.device)


def baked(
    problem: Problem, dense: Mesh, surface: Surface, variables: Variables, cancelled: Callable[[], bool] = never
) -> Variables:
    """The texture pass's variables: the shape pass's material on the atlas, the dense mesh's normals in it, and what
    both passes share. Raises Cancelled."""
    size = problem.preset.texture_size
    texels = texel_map(surface.uvs, surface.uv_faces, size)
    check(cancelled)
    points = sample_at(texels, surface.vertices, surface.faces)[texels.valid]
    check(cancelled)
    base_color, orm = material_at(variables, points, HALF)
    check(cancelled)
    normals = flat_normals(len(points), problem.device)
    if problem.preset.normal_map != "flat":
        normals = normals_of(dense, surface, texels, points, cancelled)
    check(cancelled)
    texture = torch.zeros(size, size, 9, device=problem.device)
    texture[texels.valid] = torch.cat([base_color, orm, normals], -1)
    filled = []
    for part in texture.split(3, -1):
        check(cancelled)
        filled.append(dilate(part, texels.valid))
    material = Material(*filled)
    kept = {name: variables[name] for name in ("light", "pose", "exposure") if name in variables}
    return {**texture_variables(surface, material), **kept}


def normals_of(
    dense: Mesh,
    surface: Surface,
    texels: TexelMap,
    points: Tensor,
    cancelled: Callable[[], bool] = never,
    neighbours: int = 4,
) -> Tensor:
    """Tangent-space normals (P, 3) at the valid texels: of the dense mesh's vertices nearest to `points` (P, 3).

    What simplification took from the shape stays in the shading.
    """
    tree, of_vertices = KDTree(dense.vertices.numpy()), vertex_normals(dense.vertices, dense.faces)
    found = []
    for some in points.cpu().split(POINTS):
        check(cancelled)
        distance, nearest = tree.query(some.numpy(), k=neighbours, workers=-1)
        weight = torch.from_numpy(1 / (distance + 1e-6)).float()[..., None]
        found.append((of_vertices[torch.from_numpy(nearest)] * weight).sum(1))
    shading = torch.nn.functional.normalize(torch.cat(found), dim=-1).to(points.device)
    check(cancelled)
    normals = vertex_normals(surface.vertices, surface.faces)
    tangents = vertex_tangents(surface.vertices, surface.faces, normals, surface.uvs, surface.uv_faces)
    frame = []
    for of_corners, faces in ((normals, surface.faces), (tangents, surface.uv_faces)):
        check(cancelled)
        frame.append(sample_at(texels, of_corners, faces)[texels.valid])
    check(cancelled)
    local = into_tangent_space(shading, *frame)
    return torch.nn.functional.normalize(local, dim=-1)


def flat_normals(count: int, device: torch.device) -> Tensor:
    return torch.tensor([0.0, 0.0, 1.0], device=device).expand(count, 3)


def from_mesh(
    problem: Problem, initial: Mesh | TexturedMesh, cancelled: Callable[[], bool] = never
) -> tuple[Surface, Variables]:
    """The texture pass's start from a given mesh in the scene frame; it is unwrapped when it has no UVs.

    Raises Cancelled.
    """
    device, size = problem.device, problem.preset.texture_size
    if isinstance(initial, TexturedMesh):
        mesh = initial.mesh
        surface = surface_of(mesh.vertices, mesh.faces, initial.uvs, initial.uv_faces, device)
        material = initial.material
    else:
        mesh = simplify(initial, problem.preset.target_faces)
        surface = unwrapped(problem, mesh, cancelled)
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


def seen_faces(problem: Problem, mesh: Mesh, cancelled: Callable[[], bool]) -> Tensor:
    """Which faces (F,) bool some input camera, or some camera of a sphere around the object, can see."""
    mesh = mesh.to(problem.device)
    seen = torch.zeros(len(mesh.faces), dtype=torch.bool, device=problem.device)
    for cameras in (all_around(60, 0.7, 384), problem.shape_targets.cameras):
        near, far = planes(cameras)
        seen |= visible_faces(mesh, [cameras], problem.rasterizer, near=near, far=far, cancelled=cancelled)
    return seen
