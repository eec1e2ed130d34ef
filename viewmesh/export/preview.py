"""thumbnail.png and turntable.mp4: the mesh under a neutral studio light, whatever light it was captured in.

A GPU draws them in a fraction of the seconds that a CPU takes: who made the mesh on one draws them there, at once.
"""

import math
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from viewmesh.export.images import png, straight_uint8, to_uint8
from viewmesh.export.metrics import on_white
from viewmesh.geometry.camera import Cameras, look_at, pinhole
from viewmesh.geometry.mesh import TexturedMesh
from viewmesh.render.draw import draw, drawn
from viewmesh.render.light import studio

FRAMES, FRAMES_PER_SECOND, SIDE = 36, 18, 512
FOV_Y_RAD = math.radians(35)
ENCODER_THREADS = 1  # more take half as much again of the cores' time, and no less of ours


def previews(mesh: TexturedMesh) -> dict[str, bytes]:
    """Both, by file name, drawn where the mesh lies. A shift or a uniform scale of the mesh changes nothing."""
    return {"thumbnail.png": thumbnail_bytes(mesh), "turntable.mp4": turntable_bytes(mesh)}


def early_previews(mesh: TexturedMesh, device: torch.device) -> dict[str, bytes]:
    """The previews of a mesh that was made on a GPU, before it leaves it. Nothing on a CPU, or where the GPU has no
    memory left for them: they are the exporter's then."""
    if device.type != "cuda":
        return {}
    try:
        return previews(mesh.to(device))
    except torch.OutOfMemoryError:
        return {}


def orbit(mesh: TexturedMesh, turns_rad: torch.Tensor, elevation_rad: float, side: int) -> Cameras:
    """Cameras on a circle around the mesh's bounding sphere, the whole of it in view; 0 looks from +z."""
    v = mesh.mesh.vertices.double().cpu()
    centre = (v.amin(0) + v.amax(0)) / 2
    radius = float((v - centre).norm(dim=-1).max())
    distance = 1.06 * radius / math.sin(FOV_Y_RAD / 2)
    level, height = math.cos(elevation_rad), torch.full_like(turns_rad, math.sin(elevation_rad))
    direction = torch.stack([turns_rad.sin() * level, height, turns_rad.cos() * level], -1)
    eyes = centre + distance * direction
    return pinhole(look_at(eyes, centre, torch.tensor([0.0, 1, 0])), FOV_Y_RAD, side, side)


def thumbnail_bytes(mesh: TexturedMesh, side: int = SIDE) -> bytes:
    """PNG with straight alpha, from the front, a little to the right and above."""
    camera = orbit(mesh, torch.tensor([math.radians(30)], dtype=torch.float64), math.radians(20), side)
    return png(straight_uint8(draw(mesh, camera, studio(), supersample=2)[0]))


def turntable_bytes(mesh: TexturedMesh, frames: int = FRAMES, side: int = SIDE) -> bytes:
    """MP4 (H.264, yuv420p, plays in browsers) of one turn, on white."""
    turns = torch.arange(frames, dtype=torch.float64) * (2 * math.pi / frames)
    parts = drawn(mesh, orbit(mesh, turns, math.radians(15), side), studio(), supersample=1)
    return mp4_bytes((image for part in parts for image in to_uint8(on_white(part))), side, side)


def mp4_bytes(images: Iterable[np.ndarray], height: int, width: int, rate: int = FRAMES_PER_SECOND) -> bytes:
    """images: (height, width, 3) uint8 each, with even sides."""
    import av  # ffmpeg's libraries: nothing else wants them

    with tempfile.TemporaryDirectory(prefix="viewmesh-") as folder:
        path = Path(folder, "turntable.mp4")  # a real file: its index is moved to the front, so that it starts at once
        with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=rate, options={"crf": "20", "preset": "veryfast"})
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            stream.codec_context.thread_count = ENCODER_THREADS
            for image in images:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        return path.read_bytes()
