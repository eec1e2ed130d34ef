"""Tiny view sets made on the spot: a ball resting against a box, ray-traced in numpy, in a world of +y up."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
import trimesh
from PIL import Image

from viewmesh.geometry.camera import Cameras, fibonacci_sphere, look_at
from viewmesh.geometry.mesh import Material, Mesh, TexturedMesh
from viewmesh.views.viewset import ViewSet

BALL_CENTER, BALL_RADIUS = np.array([0.12, 0.1, 0.05]), 0.28
BOX_LOW, BOX_HIGH = np.array([-0.35, -0.3, -0.2]), np.array([0.3, -0.1, 0.25])
UNIT = 1 / 8192  # depth_unit_scale of the files written here


def ring(n: int, height: float = 0.7, distance: float = 2.2) -> np.ndarray:
    """n poses (n, 4, 4) around the object, all a little above it."""
    angle = torch.arange(n, dtype=torch.float64) * 2 * np.pi / n
    eyes = torch.stack([torch.sin(angle), torch.full_like(angle, height), torch.cos(angle)], -1)
    eyes = distance * torch.nn.functional.normalize(eyes, dim=-1)
    return look_at(eyes, torch.zeros(3), torch.tensor([0.0, 1.0, 0.0])).numpy()


def around(n: int, distance: float = 2.2) -> np.ndarray:
    """n poses (n, 4, 4) all around the object."""
    return look_at(distance * fibonacci_sphere(n), torch.zeros(3), torch.tensor([0.0, 1.0, 0.0])).numpy()


def rays(pose: np.ndarray, f: float, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Eye (3,) and directions (H, W, 3) whose length along the optical axis is 1, so that t is z-depth."""
    x = ((np.arange(width) + 0.5 - width / 2) / f)[None, :] + np.zeros((height, 1))
    y = -((np.arange(height) + 0.5 - height / 2) / f)[:, None] + np.zeros((1, width))
    return pose[:3, 3], np.stack([x, y, -np.ones_like(x)], -1) @ pose[:3, :3].T


def hit(eye: np.ndarray, d: np.ndarray) -> np.ndarray:
    """z-depth (H, W) of the object, inf beside it."""
    oc = eye - BALL_CENTER
    a, b, c = (d * d).sum(-1), (d @ oc), oc @ oc - BALL_RADIUS**2
    disc = b * b - a * c
    ball = np.where(disc > 0, (-b - np.sqrt(np.maximum(disc, 0))) / a, np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        t1, t2 = (BOX_LOW - eye) / d, (BOX_HIGH - eye) / d
    near, far = np.minimum(t1, t2).max(-1), np.maximum(t1, t2).min(-1)
    box = np.where(far > near, near, np.inf)
    return np.minimum(ball, box)


def texture(points: np.ndarray, seed: int = 0) -> np.ndarray:
    """(..., 3) uint8 smooth random colours of points in space, detailed enough for features."""
    rng = np.random.default_rng(seed)
    value = np.zeros(points.shape)
    for scale in (6, 15, 35, 70):
        w = rng.normal(0, scale, (3, 24))
        value += np.cos(points @ w + rng.uniform(0, 6.3, 24)) @ rng.normal(0, 1, (24, 3)) / scale**0.4
    return np.clip(128 + 22 * value, 0, 255).astype(np.uint8)


def render(pose: np.ndarray, f: float, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """RGBA (H, W, 4) uint8 and z-depth (H, W) float64, 0 beside the object."""
    eye, d = rays(pose, f, width, height)
    t = hit(eye, d)
    mask = np.isfinite(t)
    t = np.where(mask, t, 0)
    rgba = np.zeros((height, width, 4), np.uint8)
    rgba[..., :3] = texture(eye + t[..., None] * d) * mask[..., None]
    rgba[..., 3] = mask * 255
    return rgba, t


def photograph(pose: np.ndarray, f: float, width: int, height: int) -> np.ndarray:
    """RGB (H, W, 3) uint8 of the object standing on a textured floor."""
    eye, d = rays(pose, f, width, height)
    t = hit(eye, d)
    floor = (BOX_LOW[1] - eye[1]) / d[..., 1]
    on_floor = ~np.isfinite(t) & (floor > 0) & (floor < 20)
    t = np.where(on_floor, floor, np.where(np.isfinite(t), t, 0))
    points = eye + t[..., None] * d
    grey = texture(points, 1).mean(-1, keepdims=True) * 0.5 + 20
    colour = texture(points).astype(float) * [1.0, 0.8, 0.1]
    return np.where(on_floor[..., None], grey, np.where(t[..., None] > 0, colour, 200)).astype(np.uint8)


def write_views(
    folder: Path,
    poses: np.ndarray,
    *,
    size: tuple[int, int] = (64, 48),
    f: float = 80.0,
    alpha: bool = True,
    masks: bool = False,
    depth: bool = False,
    cameras: str | None = "cameras.json",
    **fields,
) -> dict:
    """Writes views/, masks/, depth/ and a camera file; returns what the camera file holds. fields: of its top level."""
    (folder / "views").mkdir(parents=True, exist_ok=True)
    width, height = size
    frames = []
    for i, pose in enumerate(poses):
        rgba, z = render(pose, f, width, height)
        name = f"views/view_{i:02d}.png"
        Image.fromarray(rgba if alpha else np.ascontiguousarray(rgba[..., :3])).save(folder / name)
        frames.append({"file_path": name, "transform_matrix": pose.tolist()})
        if masks:
            (folder / "masks").mkdir(exist_ok=True)
            Image.fromarray(rgba[..., 3]).save(folder / f"masks/mask_{i:02d}.png")
        if depth:
            (folder / "depth").mkdir(exist_ok=True)
            cv2.imwrite(str(folder / f"depth/depth_{i:02d}.png"), (z / UNIT).round().astype(np.uint16))
    top = {"w": width, "h": height, "fl_x": f, "fl_y": f, "cx": width / 2, "cy": height / 2,
           "depth_unit_scale": UNIT, **fields, "frames": frames}  # fmt: skip
    if cameras is not None:
        (folder / cameras).write_text(json.dumps(top))
    return top


def viewset(poses: np.ndarray, *, size: int = 64, f: float = 96.0, depth: bool = False) -> ViewSet:
    """The views as a ViewSet in memory, in the object's own frame, which already fits a scene."""
    images, depths = zip(*(render(pose, f, size, size) for pose in poses), strict=True)
    n = len(poses)
    focal, centre = (torch.full((n,), v, dtype=torch.float64) for v in (f, size / 2))
    return ViewSet(
        names=tuple(f"views/view_{i:02d}.png" for i in range(n)),
        images=torch.from_numpy(np.stack(images)),
        cameras=Cameras(torch.from_numpy(poses), focal, focal.clone(), centre, centre.clone(), size, size),
        depths=torch.from_numpy(np.stack(depths)).float() if depth else None,
        camera_source="file",
        mask_source="alpha",
    )


def cut_off(views: ViewSet, columns: int) -> ViewSet:
    """The same photos without so many columns at their left."""
    assert views.cameras is not None
    cameras = replace(views.cameras, cx=views.cameras.cx - columns, width=views.width - columns)
    depths = None if views.depths is None else views.depths[:, :, columns:]
    return replace(views, images=views.images[:, :, columns:], cameras=cameras, depths=depths)


def blanked(views: ViewSet, columns: int) -> ViewSet:
    """The same as `cut_off` on the canvas of the whole photos, of whose left then nothing is known."""
    images, known = views.images.clone(), torch.ones(views.images.shape[:3], dtype=torch.bool)
    images[:, :, :columns], known[:, :, :columns] = 0, False
    depths = None if views.depths is None else views.depths * known
    return replace(views, images=images, depths=depths, known=known)


def signed_distance(points: torch.Tensor) -> torch.Tensor:
    """(P,) float64 to the object's surface, negative inside; exact outside, and inside near one of the two parts."""
    points = points.double()
    ball = (points - torch.from_numpy(BALL_CENTER)).norm(dim=-1) - BALL_RADIUS
    low, high = torch.from_numpy(BOX_LOW), torch.from_numpy(BOX_HIGH)
    q = (points - (low + high) / 2).abs() - (high - low) / 2
    box = q.clamp(min=0).norm(dim=-1) + q.amax(-1).clamp(max=0)
    return torch.minimum(ball, box)


def surface_points(n: int = 400) -> torch.Tensor:
    """(n + 8, 3) float64 points of the object, in its world."""
    ball = torch.from_numpy(BALL_CENTER) + BALL_RADIUS * fibonacci_sphere(n)
    corners = torch.cartesian_prod(*torch.from_numpy(np.stack([BOX_LOW, BOX_HIGH])).T)
    return torch.cat([ball, corners])


def textured_ball() -> TexturedMesh:
    """Grey, about the size of the object and not its shape."""
    solid = trimesh.creation.icosphere(2, 0.3)
    uvs = torch.from_numpy(solid.vertices[:, :2]).float() + 0.5
    faces, grey = torch.from_numpy(solid.faces).long(), torch.full((16, 16, 3), 0.5)
    mesh = Mesh(torch.from_numpy(solid.vertices).float(), faces)
    return TexturedMesh(mesh, uvs, faces.clone(), Material(grey, grey.clone(), torch.eye(3)[2].repeat(16, 16, 1)))
