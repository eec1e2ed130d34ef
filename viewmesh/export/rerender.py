"""`viewmesh render`: a stored result drawn from any cameras, so that anyone can check the figures."""

import json
from pathlib import Path

import cv2
import numpy as np
import torch

from viewmesh.errors import InputError
from viewmesh.export.files import write_whole
from viewmesh.export.hdr import read_environment
from viewmesh.export.images import png, straight_uint8
from viewmesh.export.store import load_reconstruction
from viewmesh.export.write import STORED
from viewmesh.geometry.camera import Cameras, similarity_scale
from viewmesh.render.draw import draw, draw_depth
from viewmesh.views.cameras_file import CameraFile, read_cameras
from viewmesh.views.limits import Limits

SIZE = (512, 512)  # width, height, where the camera file names none


def rerender(folder: Path, cameras_file: Path, out: Path, *, environment: Path | None = None) -> int:
    """Draws the result in `folder` for every frame of a transforms.json in the input's world; returns how many.

    out receives view_000.png (8-bit RGBA, straight alpha), depth_000.png (16-bit z-depth, 0 = background) and
    depth.json with `depth_unit_scale`, world units per step. environment: a .hdr in the files' +y-up frame, its
    middle column +x, instead of the estimated light. Lens distortion in the camera file is left out. Raises InputError.
    """
    if not (Path(folder) / STORED).exists():
        raise InputError(f"there is no {STORED} here.", file=str(folder), hint="Name a folder that viewmesh wrote.")
    result = load_reconstruction(Path(folder) / STORED)
    light = None if environment is None else read_environment(Path(environment).read_bytes(), file=str(environment))
    file = read_cameras(Path(cameras_file), Path(cameras_file).name, Limits())
    scale = float(similarity_scale(result.world_from_scene))
    scene_from_world = torch.linalg.inv(result.world_from_scene)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    depths = []
    for i in range(len(file.frames)):  # frame by frame: sizes may differ
        camera = _camera(file, i).moved(scene_from_world)
        image = draw(result.mesh, camera, light if light is not None else result.mesh.environment)
        depth = draw_depth(result.mesh.mesh, camera)
        write_whole(out / f"view_{i:03d}.png", png(straight_uint8(image[0])))
        depths.append(depth[0].cpu().numpy() * scale)
    unit = max(float(d.max()) for d in depths) / 65535 or 1.0
    for i, depth in enumerate(depths):
        steps = np.rint(depth / unit).astype(np.uint16)
        write_whole(out / f"depth_{i:03d}.png", cv2.imencode(".png", steps)[1].tobytes())
    write_whole(out / "depth.json", json.dumps({"depth_unit_scale": unit}).encode())
    return len(file.frames)


def _camera(file: CameraFile, index: int) -> Cameras:
    frame = file.frames[index]
    width, height = frame.declared_size or SIZE
    lens = frame.lens(width, height, file.name).resized(width, height)
    fx, fy, cx, cy = (torch.tensor([v], dtype=torch.float64) for v in (lens.fx, lens.fy, lens.cx, lens.cy))
    pose = torch.from_numpy(np.asarray(frame.world_from_camera, np.float64))[None]
    return Cameras(pose, fx, fy, cx, cy, height, width)
