"""`viewmesh sample DIR`: a capture of our own robot, photographed by our own ray tracer.   START HERE

Writes the view sets a reconstruction is tried on: six canonical RGB-D views, 24 training and 8 test views, and the mesh
that a perfect reconstruction would find. Everything is computed, nothing is downloaded, and all of it is CC0.
"""

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from viewmesh.errors import InputError, OptionError
from viewmesh.geometry.camera import Cameras, canonical6, fibonacci_sphere, look_at, pinhole
from viewmesh.progress import Progress, silent
from viewmesh.sample import bounce, tracer
from viewmesh.sample.fields import colours_at, in_threads
from viewmesh.sample.marching import robot_mesh
from viewmesh.sample.robot import AABB

DEPTH_UNIT = 1 / 16384  # world units per integer of a depth image: up to 4 units
DISTANCE, FOV_Y_RAD = 2.2, math.radians(40)
TRAIN, TEST = 24, 8
RIG_NAMES = ("front", "right", "back", "left", "top", "bottom")
PARTS = ("six", "train", "test", "mesh")


@dataclass(frozen=True)
class Shoot:
    """One set of views: where its cameras stand and what its files are called."""

    cameras: Cameras
    folder: Path
    listing: str  # the JSON file
    image: str  # patterns of the files, relative to the folder
    depth: str
    mask: str | None = None
    names: Sequence[str] = ()


def write_sample(
    folder: Path,
    *,
    size: int = 400,
    samples: int = 32,
    parts: Sequence[str] = PARTS,
    mesh_cells: int = 192,
    progress: Progress = silent,
) -> None:
    """Writes the sample capture into `folder`, which is made if it is not there; files of the same name are replaced.

    size: pixels along each side of every image. samples: pairs of light and BRDF samples per pixel; noise falls with
    its square root. parts: which of "six", "train", "test", "mesh" to write. mesh_cells: grid cells along each axis of
    the ground-truth mesh. The same arguments give the same files, bit for bit, on one machine.

    Raises OptionError for a size or a part that cannot be, InputError if `folder` is a file.
    """
    folder = Path(folder)
    _check(folder, size, samples, parts, mesh_cells)
    folder.mkdir(parents=True, exist_ok=True)
    shoots = [shoot for part, shoot in _shoots(folder, size).items() if part in parts]
    steps = sum(len(shoot.cameras) for shoot in shoots) + ("mesh" in parts)
    step = 0
    for shoot in shoots:
        for i in range(len(shoot.cameras)):
            rgba, depth = photograph(shoot.cameras[i], samples=samples)
            _write_view(shoot, i, rgba, depth)
            step += 1
            progress("sample", step, steps)
        _write_listing(shoot)
    if "mesh" in parts:
        vertices, faces = robot_mesh(mesh_cells)
        write_ply(folder / "mesh_gt.ply", vertices, faces, encode_srgb(colours_at(vertices)))
        progress("sample", steps, steps)
    (folder / "README.md").write_text(README.format(size=size, samples=samples))


def photograph(camera: Cameras, *, samples: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """One picture of the robot: (S, S, 4) uint8 sRGB with straight alpha and (S, S) float64 z-depth, 0 where it misses.

    camera: a batch of one, square, with square pixels and its principal point in the middle.
    """
    size = camera.height
    radiance, depth = np.zeros((size, size, 4)), np.zeros((size, size))
    pose = camera.world_from_camera[0].numpy()
    seed = int(np.abs(pose[:3]).sum() * 1e6) & 0xFFFF  # so that no two views share their noise
    focal = float(camera.fx[0])
    studio = bounce.studio()
    rows = [range(row, min(row + 8, size)) for row in range(0, size, 8)]
    in_threads(tracer.photograph, [(studio, pose, focal, size, samples, seed, r, radiance, depth) for r in rows])
    alpha = np.round(radiance[..., 3:] * 255).astype(np.uint8)
    return np.concatenate([np.where(alpha > 0, encode_srgb(radiance[..., :3]), 0), alpha], -1).astype(np.uint8), depth


def encode_srgb(linear: np.ndarray) -> np.ndarray:
    """Linear values, clipped to [0, 1], as uint8 sRGB (IEC 61966-2-1)."""
    x = np.clip(linear, 0, 1)
    return np.round(255 * np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)).astype(np.uint8)


def orbit(directions: torch.Tensor, size: int) -> Cameras:
    """Cameras on the sphere of radius DISTANCE in the given unit directions (N, 3), looking at the origin."""
    up = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    return pinhole(look_at(DISTANCE * directions, torch.zeros(3), up), FOV_Y_RAD, size, size)


@functools.cache
def test_turn_rad() -> float:
    """The turn about y of the test cameras' sphere that keeps them farthest from the training cameras."""
    train = fibonacci_sphere(TRAIN)
    turns = [math.radians(t) for t in range(360)]
    return max(turns, key=lambda turn: -float((fibonacci_sphere(TEST, turn) @ train.T).max()))


def write_ply(path: Path, vertices: np.ndarray, faces: np.ndarray, colours: np.ndarray) -> None:
    """A binary PLY of vertices (V, 3) as float32, faces (F, 3) as int32 and uint8 sRGB vertex colours (V, 3)."""
    header = (
        f"ply\nformat binary_little_endian 1.0\nelement vertex {len(vertices)}\n"
        "property float x\nproperty float y\nproperty float z\n"
        "property uchar red\nproperty uchar green\nproperty uchar blue\n"
        f"element face {len(faces)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    vertex = np.zeros(len(vertices), dtype=[("xyz", "<f4", 3), ("rgb", "u1", 3)])
    vertex["xyz"], vertex["rgb"] = vertices, colours
    face = np.zeros(len(faces), dtype=[("count", "u1"), ("index", "<i4", 3)])
    face["count"], face["index"] = 3, faces
    path.write_bytes(header.encode() + vertex.tobytes() + face.tobytes())


def _check(folder: Path, size: int, samples: int, parts: Sequence[str], mesh_cells: int) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError("is a file, but the sample needs a folder.", file=str(folder), hint="Name a new folder.")
    for name, value, low, high in (
        ("size", size, 16, 4096),
        ("samples", samples, 1, 4096),
        ("mesh_cells", mesh_cells, 64, 512),
    ):
        if not low <= value <= high:
            raise OptionError(f"{name} is {value}, it must lie between {low} and {high}.")
    for part in parts:
        if part not in PARTS:
            raise OptionError(f"The sample has no part {part!r}, it has {', '.join(PARTS)}.")


def _shoots(folder: Path, size: int) -> dict[str, Shoot]:
    six = canonical6(size, size)
    train = orbit(fibonacci_sphere(TRAIN), size)
    test = orbit(fibonacci_sphere(TEST, test_turn_rad()), size)
    return {
        "six": Shoot(
            six, folder / "six", "cameras.json",
            "views/view_{:02d}.png", "depth/depth_{:02d}.png", "masks/mask_{:02d}.png", RIG_NAMES,
        ),
        "train": Shoot(train, folder, "transforms_train.json", "train/r_{:03d}.png", "train_depth/r_{:03d}.png"),
        "test": Shoot(test, folder, "transforms_test.json", "test/r_{:03d}.png", "test_depth/r_{:03d}.png"),
    }  # fmt: skip


def _write_view(shoot: Shoot, i: int, rgba: np.ndarray, depth: np.ndarray) -> None:
    _save(shoot.folder / shoot.image.format(i), rgba)
    _save(shoot.folder / shoot.depth.format(i), np.round(depth / DEPTH_UNIT).astype(np.uint16))
    if shoot.mask:
        _save(shoot.folder / shoot.mask.format(i), rgba[..., 3])


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _write_listing(shoot: Shoot) -> None:
    cameras = shoot.cameras
    fov_y = float(cameras.fov_y_rad[0])
    frames = []
    for i in range(len(cameras)):
        frame = {
            "file_path": shoot.image.format(i),
            "mask_path": shoot.mask.format(i) if shoot.mask else None,
            "depth_path": shoot.depth.format(i),
            "transform_matrix": (cameras.world_from_camera[i] + 0.0).tolist(),  # + 0: no negative zeros
        }
        frames.append({**frame, "name": shoot.names[i]} if shoot.names else frame)
    listing = {
        **({"rig": "canonical6"} if shoot.names else {}),
        "camera_angle_x": fov_y, "camera_angle_y": fov_y,
        "fl_x": float(cameras.fx[0]), "fl_y": float(cameras.fy[0]),
        "cx": float(cameras.cx[0]), "cy": float(cameras.cy[0]),
        "w": cameras.width, "h": cameras.height,
        "k1": 0.0, "k2": 0.0, "p1": 0.0, "p2": 0.0,
        "up_axis": "y",
        "depth_unit_scale": DEPTH_UNIT,
        "depth_kind": "z-depth along optical axis, pixel-centre ray, 0=background",
        "aabb_scale": 1,
        "aabb": AABB,
        "frames": frames,
    }  # fmt: skip
    (shoot.folder / shoot.listing).write_text(json.dumps(listing, indent=1) + "\n")


README = """# A wind-up robot: viewmesh's sample capture

Made by `viewmesh sample` from an object, a studio and a ray tracer of our own ({size}x{size} pixels, {samples} pairs
of light and BRDF samples per pixel). Everything in this folder is dedicated to the public domain (CC0 1.0).

- `six/`: the six-view contract. `views/view_00..05.png` (front, right, back, left, top, bottom), `depth/`, `masks/`,
  `cameras.json` with `rig: canonical6`.
- `train/`, `train_depth/`, `transforms_train.json`: 24 views on a Fibonacci sphere.
- `test/`, `test_depth/`, `transforms_test.json`: 8 views, each at least 12 degrees away from every training view.
- `mesh_gt.ply`: the true surface, watertight, one body, welded, with vertex colours.

## Conventions
- Cameras: `transform_matrix` is camera-to-world with OpenGL axes (+x right, +y up, looks along -z); the world is y-up,
  the object's bounding box (`aabb`) is centred at the origin, its longest side is 1. 40 degrees field of view, distance
  2.2, no lens distortion; pixel (column i, row j) has its centre at (i + 0.5, j + 0.5).
- Colour: 8-bit sRGB, straight alpha; alpha is the pixel's coverage, RGB is linear radiance over coverage, clipped to 1
  and encoded, and 0 where alpha is 0.
- Depth: 16-bit, z-depth of the ray through the pixel's centre, integer * `depth_unit_scale` (1/16384); 0 = background.
- Material: enamel (dielectric, roughness 0.24 to 0.40), brass (metal, 0.17 and up), steel, rubber, glossy eyes.
  Light: soft boxes and a gradient, at infinity, shadowed by the robot, with light bounced off the robot itself.
"""
