"""Milliseconds per rasterizer primitive, forward and backward, on one mesh.

    python bench/raster.py [MESH] [--sizes 256 400] [--backend numba] [--device cpu]

MESH is anything trimesh reads; without one, an icosphere of 5,120 triangles.
"""

import argparse
import math
import statistics
import time
from itertools import pairwise

import torch
import trimesh

from viewmesh.geometry.camera import look_at, pinhole
from viewmesh.render.rasterizer import get_rasterizer, topology

STAGES = ("rasterize", "interpolate", "topology", "antialias", "backward", "total")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mesh", nargs="?")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 400])
    parser.add_argument("--backend")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--channels", type=int, default=9)
    parser.add_argument("--repeat", type=int, default=40)
    args = parser.parse_args()

    mesh = trimesh.load(args.mesh, process=False, force="mesh") if args.mesh else trimesh.creation.icosphere(4)
    vertices = torch.tensor(mesh.vertices, dtype=torch.float32, device=args.device)
    vertices = (vertices - vertices.mean(0)) / (vertices.amax(0) - vertices.amin(0)).max()
    faces = torch.tensor(mesh.faces, device=args.device)
    rasterizer = get_rasterizer(args.device, args.backend)
    print(
        f"{rasterizer.name} on {args.device}, {torch.get_num_threads()} threads: {len(faces)} triangles, "
        f"{args.batch} image(s), {args.channels} channels with derivatives; ms, median (best) of {args.repeat}"
    )
    print("size".ljust(6) + "".join(stage.rjust(16) for stage in STAGES))
    for size in args.sizes:
        runs = [step(rasterizer, vertices, faces, size, args.batch, args.channels) for _ in range(args.repeat + 3)][3:]
        columns = [[1e3 * t for t in column] for column in zip(*runs, strict=True)]
        print(str(size).ljust(6) + "".join(f"{statistics.median(c):8.2f} ({min(c):5.2f})" for c in columns))


def step(rasterizer, vertices: torch.Tensor, faces: torch.Tensor, size: int, batch: int, channels: int) -> list[float]:
    """Seconds of each stage of one optimisation step."""
    turns = torch.arange(batch, dtype=torch.float64) / batch * 2 * math.pi + 0.5
    eyes = 2.0 * torch.stack([turns.sin(), torch.full_like(turns, 0.3), turns.cos()], -1)
    cameras = pinhole(look_at(eyes, torch.zeros(3), torch.tensor([0.0, 1, 0])), math.radians(40), size, size)
    clip_from_world = (cameras.clip_from_camera(0.1, 10) @ cameras.camera_from_world).to(vertices)
    positions = vertices.clone().requires_grad_()
    attributes = torch.linspace(0, 1, channels).to(vertices).repeat(len(vertices), 1).requires_grad_()
    clip = torch.cat([positions, torch.ones_like(positions[:, :1])], -1) @ clip_from_world.mT
    times = [now(vertices)]
    raster = rasterizer.rasterize(clip, faces, size, size, derivatives=True)
    times.append(now(vertices))
    values, slopes = rasterizer.interpolate(attributes, raster.rast, faces, rast_db=raster.rast_db)
    times.append(now(vertices))
    around = topology(faces)
    around.opposite  # noqa: B018  computed on first use
    times.append(now(vertices))
    color = rasterizer.antialias(values, raster.rast, clip, faces, around)
    times.append(now(vertices))
    torch.autograd.backward([color, slopes], [torch.ones_like(color), torch.ones_like(slopes)])
    times.append(now(vertices))
    return [b - a for a, b in pairwise(times)] + [times[-1] - times[0]]


def now(tensor: torch.Tensor) -> float:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
