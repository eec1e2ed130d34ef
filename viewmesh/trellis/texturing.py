"""From a generated mesh with vertex colours to a light textured one. No Gaussian is drawn.

clean → simplify → unwrap → bake from the dense mesh. The dense mesh's colours become the base colour, its normals the
normal map; metallic 0, roughness 1, unoccluded. Knows no networks and no files.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.nn.functional import normalize

from viewmesh.geometry.clean import components, drop_floaters, drop_hidden, fill_small_holes, is_watertight, weld
from viewmesh.geometry.dense import DenseSurface
from viewmesh.geometry.mesh import Material, Mesh, TexturedMesh
from viewmesh.geometry.normals import vertex_normals, vertex_tangents
from viewmesh.geometry.simplify import simplify
from viewmesh.geometry.unwrap import Atlas, unwrap
from viewmesh.progress import Progress, check, never, silent
from viewmesh.render.bake import dilate, sample_at, texel_map
from viewmesh.render.rasterizer import get_rasterizer
from viewmesh.render.tangent_space import into_tangent_space
from viewmesh.render.visible import all_around, visible_faces

TARGET_FACES = 20_000
TEXTURE_SIZE = 1024
SMALL_HOLE = 55  # edges: what the authors' exporter closes when it keeps a twentieth of the faces
STEPS = 4


@dataclass(frozen=True)
class Textured:
    """mesh: in the frame of the generated one. seconds: wall time of clean, simplify, unwrap, bake."""

    mesh: TexturedMesh
    seconds: dict[str, float] = field(default_factory=dict)


def texture(
    mesh: Mesh,
    *,
    target_faces: int | None = None,
    texture_size: int | None = None,
    progress: Progress = silent,
    cancelled: Callable[[], bool] = never,
) -> Textured:
    """mesh: dense, in [-0.5, 0.5]³, with linear vertex colours (grey without); on any device, the result is on the CPU.

    target_faces, texture_size: None is 20,000 and 1024. Unwrapping is the CPU's; all else is done where mesh is.
    Raises InvalidMesh, Cancelled.
    """
    seconds: dict[str, float] = {}
    size = texture_size or TEXTURE_SIZE

    @contextmanager
    def part(name: str) -> Iterator[None]:
        check(cancelled)
        began = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - began
        progress("texture", len(seconds), STEPS)

    with part("clean"):
        dense = clean(mesh.validate())
    with part("simplify"):
        surface = DenseSurface(dense)  # on a CPU its tree grows beside the next two
        light = simplify(Mesh(dense.vertices, dense.faces), target_faces or TARGET_FACES).to("cpu")
    with part("unwrap"):
        atlas = unwrap(light, size, cancelled=cancelled)
    with part("bake"):
        material = bake(light, atlas, surface, size)
    return Textured(TexturedMesh(light, atlas.uvs, atlas.uv_faces, material).validate(), seconds)


def clean(mesh: Mesh) -> Mesh:
    """The mesh, closed where it was nearly closed, without floaters and without the components that no camera around
    the object sees, for the decoder draws the inner side of its shell of voxels too."""
    if not is_watertight(mesh):
        mesh = fill_small_holes(weld(mesh), SMALL_HOLE)
    labels = components(mesh)
    if int(labels.max()) == 0:
        return mesh
    mesh = drop_floaters(mesh, labels=labels)
    cameras = [all_around(32, 0.8, 256)]
    seen = visible_faces(mesh, cameras, get_rasterizer(mesh.vertices.device), near=1.0, far=4.0)
    return drop_hidden(mesh, seen)


@torch.no_grad()
def bake(light: Mesh, atlas: Atlas, surface: DenseSurface, size: int) -> Material:
    """The material of light's atlas, of size², from the nearest points of the dense surface; on the CPU."""
    dense = surface.mesh
    device = dense.vertices.device
    vertices, faces, uvs, uv_faces = (t.to(device) for t in (light.vertices, light.faces, atlas.uvs, atlas.uv_faces))
    texels = texel_map(uvs, uv_faces, size)
    normals = vertex_normals(vertices, faces)
    tangents = vertex_tangents(vertices, faces, normals, uvs, uv_faces)
    geometry = torch.cat([vertices, normals], -1)
    points, texel_normals = sample_at(texels, geometry, faces)[texels.valid].split(3, -1)
    texel_normals = normalize(texel_normals, dim=-1)
    there, _ = surface.query(points, texel_normals)
    colors = dense.vertex_colors if dense.vertex_colors is not None else torch.full_like(dense.vertices, 0.5)
    attributes = torch.cat([colors, vertex_normals(dense.vertices, dense.faces)], -1)
    base_color, shading = there.of(attributes, dense.faces).split(3, -1)
    local = into_tangent_space(shading, texel_normals, sample_at(texels, tangents, uv_faces)[texels.valid])
    maps = torch.zeros(size, size, 6, device=device)
    maps[texels.valid] = torch.cat([base_color.clamp(0, 1), local], -1)
    maps = dilate(maps, texels.valid).cpu()
    orm = torch.tensor([1.0, 1.0, 0.0]).expand(size, size, 3).contiguous()
    return Material(maps[..., :3].clamp(0, 1).contiguous(), orm, normalize(maps[..., 3:], dim=-1))
