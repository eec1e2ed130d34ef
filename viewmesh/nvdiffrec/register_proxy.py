"""What registration looks at instead of the mesh and the photos: a few thousand coloured triangles, small crops.

Colours are sRGB, as in the photos: the mesh's base colours are compared with pixels under unknown light, so only their
correlation counts.
"""

from dataclasses import dataclass

import torch
from scipy.spatial import KDTree
from torch import Tensor

from viewmesh.geometry.camera import Cameras
from viewmesh.geometry.mesh import Mesh, TexturedMesh
from viewmesh.geometry.nearest import sample_surface
from viewmesh.geometry.simplify import simplify
from viewmesh.nvdiffrec.targets import crop_to_object
from viewmesh.render.rasterizer import Topology, get_rasterizer, topology
from viewmesh.render.shading import linear_to_srgb
from viewmesh.views.viewset import ViewSet

FACES = 8000
POINTS = 2048
BLEND = 12  # surface samples that make one vertex's colour: finer texture does not survive at the size of the crops
MARGIN = 0.3  # of the crops: a mesh that is not in place yet shall still be seen


@dataclass(frozen=True)
class Proxy:
    """The mesh, light enough to be drawn thousands of times; in the mesh's frame, on the search's device.

    vertices (V, 3), faces (F, 3), colors (V, 3); points (P, 3) on the surface with point_colors (P, 3); center (3,) and
    radius: of the points, mean and root mean square distance. colored: False where the mesh has one colour throughout.
    """

    vertices: Tensor
    faces: Tensor
    colors: Tensor
    points: Tensor
    point_colors: Tensor
    center: Tensor
    radius: float
    topology: Topology
    colored: bool


@dataclass(frozen=True)
class Sights:
    """N square crops of S pixels around the object.

    alpha (N, S, S) coverage; color (N, S, S, 3) sRGB, straight; depth (N, S, S) scene units, 0 = unknown, or None.
    known (N, S, S) bool, False outside the photo, where alpha is 0 and nothing may be drawn; None where all are known.
    camera_from_scene (N, 4, 4) float32; cameras: the same in float64, with the crops' intrinsics.
    """

    alpha: Tensor
    color: Tensor
    depth: Tensor | None
    known: Tensor | None
    cameras: Cameras
    camera_from_scene: Tensor

    def __len__(self) -> int:
        return len(self.alpha)

    @property
    def size(self) -> int:
        return self.alpha.shape[-1]


def proxy_of(mesh: Mesh | TexturedMesh, generator: torch.Generator, device: torch.device) -> Proxy:
    geometry = (mesh.mesh if isinstance(mesh, TexturedMesh) else mesh).to("cpu")
    samples = sample_surface(geometry, 20 * POINTS, generator)
    points = samples.of(geometry.vertices.float(), geometry.faces)
    if isinstance(mesh, TexturedMesh):
        uv = samples.of(mesh.uvs.cpu(), mesh.uv_faces.cpu())
        texture = mesh.material.base_color.detach().cpu().float()
        linear = get_rasterizer("cpu").texture(texture.contiguous(), uv.float().contiguous(), boundary="clamp")
    elif geometry.vertex_colors is not None:
        linear = samples.of(geometry.vertex_colors.float(), geometry.faces)
    else:
        linear = torch.full_like(points, 0.5)
    colors = linear_to_srgb(linear.clamp(0, 1))
    light = simplify(Mesh(geometry.vertices.float(), geometry.faces), FACES)
    _, nearest = KDTree(points.numpy()).query(light.vertices.numpy(), k=BLEND)
    center = points.mean(0)
    faces = light.faces.to(device)
    return Proxy(
        vertices=light.vertices.to(device),
        faces=faces,
        colors=colors[torch.from_numpy(nearest)].mean(1).to(device),
        points=points[:POINTS].to(device),
        point_colors=colors[:POINTS].to(device),
        center=center.to(device),
        radius=float((points - center).square().sum(-1).mean().sqrt()),
        topology=topology(faces),
        colored=float(colors.std(0).max()) > 0.02,
    )


def sights_of(views: ViewSet, count: int, size: int, device: torch.device) -> Sights:
    """At most `count` of the views, looking from directions as different as there are."""
    assert views.cameras is not None
    some = views.select(spread(views.cameras, count))
    targets = crop_to_object(some, size, device, margin=MARGIN)
    rgba = targets.images.float() / 255
    if targets.known is not None:
        rgba = rgba * targets.known[..., None]
    return Sights(
        alpha=rgba[..., 3],
        color=rgba[..., :3],
        depth=targets.depths,
        known=targets.known,
        cameras=targets.cameras,
        camera_from_scene=targets.cameras.camera_from_world.float().to(device),
    )


def spread(cameras: Cameras, count: int) -> list[int]:
    """Indices of at most `count` cameras, each farthest in direction from those before it."""
    if len(cameras) <= count:
        return list(range(len(cameras)))
    axis = cameras.world_from_camera[:, :3, 2]
    chosen, nearest = [0], axis @ axis[0]
    while len(chosen) < count:
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, axis @ axis[chosen[-1]])
    return sorted(chosen)
