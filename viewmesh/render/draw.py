"""Draws a finished mesh from any cameras, without gradients: thumbnails, turntables, `viewmesh render`, metrics."""

import torch
from torch import Tensor

from viewmesh.geometry.camera import Cameras
from viewmesh.geometry.mesh import TexturedMesh
from viewmesh.geometry.normals import vertex_normals, vertex_tangents
from viewmesh.render.light import Prefiltered, build_light, from_latlong, studio
from viewmesh.render.rasterizer import Rasterizer, Topology, get_rasterizer, topology
from viewmesh.render.shading import perturb_normal, shade

SAMPLES = 2**21  # pixels drawn at once
LIGHT_RESOLUTION = {"cpu": 16, "cuda": 64}


@torch.no_grad()
def draw(
    mesh: TexturedMesh,
    cameras: Cameras,
    light: Prefiltered | Tensor | None = None,
    rasterizer: Rasterizer | None = None,
    *,
    supersample: int = 2,
) -> tuple[Tensor, Tensor]:
    """Images (N, H, W, 4) float32 linear RGB, premultiplied alpha, and z-depth (N, H, W), 0 = background.

    light: prefiltered, a base (6, R, R, 3) or a lat-long image (H, 2H, 3) of radiance, in the mesh's frame; None: the
    mesh's own environment, or a neutral studio where it has none. rasterizer: None is the best for the mesh's device.
    supersample: samples per pixel and axis. Depth is that of the ray through the pixel's centre.
    """
    device = mesh.mesh.vertices.device
    rasterizer = rasterizer or get_rasterizer(device)
    scene = _Scene(mesh, prefiltered(light if light is not None else mesh.environment, device))
    H, W = cameras.height, cameras.width
    views = max(1, SAMPLES // (H * W * supersample**2))
    images, depths = [], []
    for some in torch.arange(len(cameras)).split(views):
        chunk = cameras[some]
        clip_from_world = _clip_from_world(chunk, mesh.mesh.vertices)
        images.append(_image(scene, chunk, clip_from_world, rasterizer, supersample))
        depths.append(_depth(scene, chunk, clip_from_world, rasterizer))
    return torch.cat(images), torch.cat(depths)


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


def _clip_from_world(cameras: Cameras, vertices: Tensor) -> Tensor:
    """(N, 4, 4) float32 with near and far planes around the mesh."""
    _, depth = cameras.to("cpu").project(vertices.detach().cpu().double())
    far = max(float(depth.max()) * 1.01, 1e-6)
    near = max(float(depth.min()) * 0.99, far * 1e-3)
    camera_from_world = cameras.camera_from_world.cpu()
    return (cameras.to("cpu").clip_from_camera(near, far) @ camera_from_world).to(vertices)


def _clip(scene: _Scene, clip_from_world: Tensor) -> Tensor:
    ones = torch.ones_like(scene.vertices[:, :1])
    return torch.cat([scene.vertices, ones], -1) @ clip_from_world.mT  # (N, V, 4)


def _image(
    scene: _Scene, cameras: Cameras, clip_from_world: Tensor, rasterizer: Rasterizer, supersample: int
) -> Tensor:  # fmt: skip
    H, W, N = cameras.height * supersample, cameras.width * supersample, len(cameras)
    clip = _clip(scene, clip_from_world)
    raster = rasterizer.rasterize(clip, scene.faces, H, W, derivatives=True)
    flat = raster.rast.reshape(-1, 4)
    pixels = torch.nonzero(flat[:, 3] > 0).squeeze(1)  # (P,)
    rast, rast_db = flat[pixels], raster.rast_db.reshape(-1, 4)[pixels]  # pyright: ignore[reportOptionalMemberAccess]
    at_vertices, _ = rasterizer.interpolate(torch.cat([scene.vertices, scene.normals], -1), rast, scene.faces)
    points, normals = at_vertices.split(3, -1)
    uv, uv_da = rasterizer.interpolate(scene.uvs, rast, scene.uv_faces, rast_db=rast_db)
    tangents, _ = rasterizer.interpolate(scene.tangents, rast, scene.uv_faces)
    height, width = scene.maps.shape[:2]
    mipmapped = height & (height - 1) == 0 and width & (width - 1) == 0
    maps = rasterizer.texture(
        scene.maps, uv, uv_da=uv_da, boundary="clamp", filter="trilinear" if mipmapped else "linear"
    )
    base_color, orm, tangent_space = maps.split(3, -1)
    eyes = cameras.centers.to(points)[pixels // (H * W)]
    view_dirs = torch.nn.functional.normalize(eyes - points, dim=-1)
    shading_normals = perturb_normal(normals, tangents, tangent_space, view_dirs)
    rgb = shade(points, shading_normals, eyes, base_color, orm, scene.light, rasterizer)
    rgba = torch.cat([rgb, torch.ones_like(rgb[:, :1])], -1)
    color = rgba.new_zeros(N * H * W, 4).index_copy(0, pixels, rgba).reshape(N, H, W, 4)
    color = rasterizer.antialias(color, raster.rast, clip, scene.faces, scene.topology)
    color = color.reshape(N, cameras.height, supersample, cameras.width, supersample, 4).mean((2, 4))
    return torch.cat([color[..., :3].clamp_min(0), color[..., 3:].clamp(0, 1)], -1)


def _depth(scene: _Scene, cameras: Cameras, clip_from_world: Tensor, rasterizer: Rasterizer) -> Tensor:
    rast = rasterizer.rasterize(_clip(scene, clip_from_world), scene.faces, cameras.height, cameras.width).rast
    points, _ = rasterizer.interpolate(scene.vertices, rast, scene.faces)
    toward = -cameras.camera_from_world[:, 2].to(points)  # (N, 4): z-depth of a homogeneous world point
    depth = torch.einsum("nhwi,ni->nhw", points, toward[:, :3]) + toward[:, 3, None, None]
    return torch.where(rast[..., 3] > 0, depth, 0.0)
