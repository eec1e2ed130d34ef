"""How well a generated mesh is put among the views, and what refining it brings.

    python bench/refine.py register CAPTURE MESH [--trials 20] [--no-depth] [--no-color] [--device cuda]
    python bench/refine.py refine CAPTURE MESH [--preset preview] [--device cuda]

CAPTURE: a folder with transforms_train.json and transforms_test.json. MESH: its ground truth, .ply with vertex colours
or .obj with a texture. `register` moves the mesh by random similarities (any rotation, scale 0.7 to 1.4, offset 0.2)
and finds it again. `refine` spoils the mesh (smoothed, noise of 5 % of its longest side, wrong colours), refines it, and
measures it against the test views and the truth; then it tries to refine the true mesh. One JSON row each.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import trimesh
from PIL import Image
from torch import Tensor

from viewmesh.geometry.camera import similarity_scale
from viewmesh.geometry.mesh import Mesh, TexturedMesh
from viewmesh.nvdiffrec.register import register
from viewmesh.nvdiffrec.register_search import angle_between, super_fibonacci
from viewmesh.options import ViewRules
from viewmesh.reconstruct import best_device
from viewmesh.views.load import load_views
from viewmesh.views.viewset import ViewSet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["register", "refine"])
    parser.add_argument("capture", type=Path)
    parser.add_argument("mesh", type=Path)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--no-depth", action="store_true")
    parser.add_argument("--no-color", action="store_true")
    parser.add_argument("--preset", default="preview")
    parser.add_argument("--device", default=str(best_device()))
    args = parser.parse_args()
    views = load_views(args.capture, ViewRules())
    if args.no_depth:
        views = replace(views, depths=None)
    truth = load_truth(args.mesh).transformed(torch.linalg.inv(views.world_from_scene))
    if args.no_color:
        truth = truth.mesh if isinstance(truth, TexturedMesh) else truth
        truth = Mesh(truth.vertices, truth.faces)
    named = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    row = {"what": args.what, "capture": args.capture.name, "device": named, "views": len(views)}
    row |= {"depth": views.depths is not None, "color": not args.no_color}
    print(json.dumps(row | {"register": registrations}[args.what](truth, views, args)), flush=True)


def registrations(truth: Mesh | TexturedMesh, views: ViewSet, args: argparse.Namespace) -> dict:
    rows = []
    for trial in range(args.trials):
        generator = torch.Generator().manual_seed(trial)
        moved_from_scene = random_similarity(generator)
        began = time.monotonic()
        found = register(truth.transformed(moved_from_scene), views, generator, device=args.device)
        seconds = time.monotonic() - began
        left = found.scene_from_mesh @ moved_from_scene  # the identity if all went well
        scale = float(similarity_scale(left))
        angle = math.degrees(float(angle_between(left[:3, :3] / scale, torch.eye(3, dtype=torch.float64))))
        rows.append((angle, abs(scale - 1), float(left[:3, 3].norm()), seconds, found))
        print(f"  {trial:2d} {angle:7.2f}° scale {scale - 1:+.4f} shift {rows[-1][2]:.4f} iou {found.silhouette_iou:.3f} color "
              f"{found.color_correlation} {seconds:.1f} s", flush=True)  # fmt: skip
    good = [r for r in rows if r[0] < 2 and r[1] < 0.02]
    return {
        "trials": len(rows),
        "within_2deg_2pct": len(good),
        "worst_good_deg": round(max((r[0] for r in good), default=math.nan), 3),
        "worst_good_scale_pct": round(100 * max((r[1] for r in good), default=math.nan), 3),
        "median_s": round(statistics.median(r[3] for r in rows), 2),
        "most_s": round(max(r[3] for r in rows), 2),
    }


def random_similarity(generator: torch.Generator) -> Tensor:
    """(4, 4) float64: any rotation, scale 0.7 to 1.4, offset 0.2 in any direction."""
    q = torch.nn.functional.normalize(torch.randn(4, generator=generator, dtype=torch.float64), dim=0)
    from viewmesh.nvdiffrec.register_search import rotation_matrices

    scale = math.exp(math.log(0.7) + math.log(2) * float(torch.rand((), generator=generator)))
    m = torch.eye(4, dtype=torch.float64)
    m[:3, :3] = scale * rotation_matrices(q)
    m[:3, 3] = 0.2 * torch.nn.functional.normalize(torch.randn(3, generator=generator, dtype=torch.float64), dim=0)
    return m


def load_truth(path: Path) -> Mesh | TexturedMesh:
    loaded = trimesh.load(path, process=False, force="mesh")
    colors = np.asarray(loaded.visual.vertex_colors)[:, :3] / 255
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    return Mesh(torch.tensor(np.asarray(loaded.vertices)).float(), torch.tensor(np.asarray(loaded.faces)).long(),
                torch.tensor(linear).float())  # fmt: skip


if __name__ == "__main__":
    main()
