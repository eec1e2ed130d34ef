"""Draws a finished mesh from any cameras, without gradients: thumbnails, turntables, `viewmesh render`, metrics."""

from collections.abc import Iterator

import torch
from torch import Tensor

from viewmesh.geometry.camera import Cameras
from viewmesh.geometry.mesh import Mesh, TexturedMesh
from viewmesh.geometry.normals import vertex_normals, vertex_tangents
from viewmesh.render.light import Prefiltered, build_light, from_latlong, studio
from viewmesh.render.mipmap import mip_chain
from viewmesh.render.rasterizer import Rasterizer, Topology, get_rasterizer, topology
from viewmesh.render.shading import perturb_normal, shade

SAMPLES = {"cpu": 2**19, "cuda": 2**21}  # pixels drawn at once; on a CPU more than its allocator keeps costs a third
LIGHT_RESOLUTION = {"cpu": 16, "cuda": 64}


@torch.no_grad()
def draw(
    mesh: TexturedMesh,
    cameras: Cameras,
    light: Prefiltered | Tensor | None = None,
    rasterizer: Rasterizer | None = None,
    *,
    supersample: int = 2,
) -> Tensor:
    """Images (N, H, W, 4) float32 linear RGB, premultiplied alpha.

    light: prefiltered, a base (6, R, R, 3) or a lat-long image (H, 2H, 3) of radiance, in the mesh's frame; None: the
    mesh's own environment, or a neutral studio where it has none. rasterizer: None is the best for the mesh's device.
    supersample: samples per pixel and axis.
    """
    return torch.cat(list(drawn(mesh, cameras, light, rasterizer, supersample=supersample)))


@torch.no_grad()
def drawn(
    mesh: TexturedMesh,
    cameras: Cameras,
    light: Prefiltered | Tensor | None = None,
    rasterizer: Rasterizer | None = None,
    *,
    supersample: int = 2,
) -> Iterator[Tensor]:
    """The images of `draw` a few at a time, for those who need not have them all at once."""
    device = mesh.mesh.vertices.device
    rasterizer = rasterizer or get_rasterizer(device)
    scene = _Scene(mesh, prefiltered(light if light is not None else mesh.environment, device))
    for chunk in _chunks(cameras, device, supersample):
        yield _image(scene, chunk, rasterizer, supersample)


@torch.no_grad()
def draw_depth(mesh: Mesh, cameras: Cameras, rasterizer: Rasterizer | None = None) -> Tensor:
    """z-depth (N, H, W) float32 along the ray through each pixel's centre, 0 = background."""
    rasterizer = rasterizer or get_rasterizer(mesh.vertices.device)
    return torch.cat([_depth(mesh, chunk, rasterizer) for chunk in _chunks(cameras, mesh.vertices.device, 1)])


def _chunks(cameras: Cameras, device: torch.device, supersample: int) -> list[Cameras]:
    views = max(1, SAMPLES[device.type] // (cameras.height * cameras.width * supersample**2))
    return [cameras[some] for some in torch.arange(len(cameras)).split(views)]


def prefiltered(light: Prefiltered | Tensor | None, device: torch.device) -> Prefiltered:
    """Whatever a caller has for a light, ready to shade with; None is `studio`."""
    if isinstance(light, Prefiltered):
        return light
    R = LIGHT_RESOLUTION.get(device.type, 16)
    if light is None:
        base = studio(R, device)
    else:
        base = (light if light.ndim == 4 else from_latlong(light, R)).to(device)
    return build_light(base.shape[1], device).prefilter(base)


class _Scene:
    """What all views share: the mesh's tensors on one device, its normals, tangents, material stack and light."""

    def __init__(self, textured: TexturedMesh, light: Prefiltered) -> None:
        mesh, material = textured.mesh, textured.material
        self.vertices, self.faces = mesh.vertices, mesh.faces
        self.uvs, self.uv_faces = textured.uvs.to(mesh.vertices), textured.uv_faces
        self.normals = vertex_normals(self.vertices, self.faces)
        self.tangents = vertex_tangents(self.vertices, self.faces, self.normals, self.uvs, self.uv_faces)
        self.topology: Topology = topology(self.faces)
        self.maps = _stack(material.base_color, material.orm, material.normal).to(mesh.vertices)
        height, width = self.maps.shape[:2]
        mipmapped = height & (height - 1) == 0 and width & (width - 1) == 0
        self.mips = mip_chain(self.maps) if mipmapped else None
        self.light = light


def _stack(*maps: Tensor) -> Tensor:
    """Maps (H, W, 3) as one (H, W, 3 n), the smaller ones enlarged."""
    H, W = max(m.shape[0] for m in maps), max(m.shape[1] for m in maps)
    resized = [
        m if m.shape[:2] == (H, W)
        else torch.nn.functional.interpolate(m.permute(2, 0, 1)[None], (H, W), mode="bilinear")[0].permute(1, 2, 0)
        for m in maps
    ]  # fmt: skip
    return torch.cat(resized, -1).contiguous()


def _clip(cameras: Cameras, vertices: Tensor) -> Tensor:
    """(N, V, 4) float32 with near and far planes around the mesh."""
    _, depth = cameras.to("cpu").project(vertices.detach().cpu().double())
    far = max(float(depth.max()) * 1.01, 1e-6)
    near = max(float(depth.min()) * 0.99, far * 1e-3)
    camera_from_world = cameras.camera_from_world.cpu()
    clip_from_world = (cameras.to("cpu").clip_from_camera(near, far) @ camera_from_world).to(vertices)
    return torch.cat([vertices, torch.ones_like(vertices[:, :1])], -1) @ clip_from_world.mT


def _image(scene: _Scene, cameras: Cameras, rasterizer: Rasterizer, supersample: int) -> Tensor:
    H, W, N = cameras.height * supersample, cameras.width * supersample, len(cameras)
    clip = _clip(cameras, scene.vertices)
    raster = rasterizer.rasterize(clip, scene.faces, H, W, derivatives=True)
    flat = raster.rast.reshape(-1, 4)
    pixels = torch.nonzero(flat[:, 3] > 0).squeeze(1)  # (P,)
    rast, rast_db = flat[pixels], raster.rast_db.reshape(-1, 4)[pixels]  # pyright: ignore[reportOptionalMemberAccess]
    at_vertices, _ = rasterizer.interpolate(torch.cat([scene.vertices, scene.normals], -1), rast, scene.faces)
    points, normals = at_vertices.split(3, -1)
    uv, uv_da = rasterizer.interpolate(scene.uvs, rast, scene.uv_faces, rast_db=rast_db)
    tangents, _ = rasterizer.interpolate(scene.tangents, rast, scene.uv_faces)
    maps = rasterizer.texture(
        scene.maps, uv, uv_da=uv_da, mips=scene.mips, boundary="clamp", filter="trilinear" if scene.mips else "linear"
    )
    base_color, orm, tangent_space = maps.split(3, -1)
    eyes = cameras.centers.to(points)[pixels // (H * W)]
    view_dirs = torch.nn.functional.normalize(eyes - points, dim=-1)
    shading_normals = perturb_normal(normals, tangents, tangent_space, view_dirs)
    rgb = shade(points, shading_normals, eyes, base_color, orm, scene.light, rasterizer)
    rgba = torch.cat([rgb, torch.ones_like(rgb[:, :1])], -1)
    color = rgba.new_zeros(N * H * W, 4).index_copy(0, pixels, rgba).reshape(N, H, W, 4)
    color = rasterizer.antialias(color, raster.rast, clip, scene.faces, scene.topology)
    if supersample > 1:
        color = color.reshape(N, cameras.height, supersample, cameras.width, supersample, 4).mean((2, 4))
    return torch.cat([color[..., :3].clamp_min(0), color[..., 3:].clamp(0, 1)], -1)


def _depth(mesh: Mesh, cameras: Cameras, rasterizer: Rasterizer) -> Tensor:
    clip = _clip(cameras, mesh.vertices)
    rast = rasterizer.rasterize(clip, mesh.faces, cameras.height, cameras.width).rast
    points, _ = rasterizer.interpolate(mesh.vertices, rast, mesh.faces)
    toward = -cameras.camera_from_world[:, 2].to(points)  # (N, 4): z-depth of a homogeneous world point
    depth = torch.einsum("nhwi,ni->nhw", points, toward[:, :3]) + toward[:, 3, None, None]
    return torch.where(rast[..., 3] > 0, depth, 0.0)
