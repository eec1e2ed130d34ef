"""How well a generated mesh is put among the views, and what refining it brings.

    python bench/refine.py register CAPTURE MESH [--trials 20] [--no-depth] [--no-color] [--device cuda]
    python bench/refine.py refine CAPTURE MESH [--preset preview] [--device cuda]

CAPTURE: a folder with transforms_train.json and transforms_test.json. MESH: its ground truth, .ply with vertex colours
or .obj with a texture. `register` moves the mesh by random similarities (any rotation, scale 0.7 to 1.4, offset 0.2)
and finds it again. `refine` spoils the mesh (noise of 5 % of its longest side, smoothed, colours wrong), moves it,
registers and refines it, and measures it against the test views and the truth; then the same with the true mesh,
simplified. One JSON row each.
"""

import argparse
import json
import math
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from viewmesh import runtime

runtime.prepare()  # before the first tensor, which the imports below make
# ruff: noqa: E402

import numpy as np
import torch
import trimesh
from torch import Tensor

from viewmesh import refine
from viewmesh.export.metrics import chamfer
from viewmesh.export.report import measure
from viewmesh.export.result import to_cpu
from viewmesh.geometry.camera import similarity_scale
from viewmesh.geometry.mesh import Mesh, TexturedMesh
from viewmesh.geometry.simplify import simplify
from viewmesh.nvdiffrec import fit
from viewmesh.nvdiffrec.presets import preset_for
from viewmesh.nvdiffrec.register import register
from viewmesh.nvdiffrec.register_search import angle_between, rotation_matrices
from viewmesh.options import Options, ViewRules
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
        truth = Mesh(truth.vertices, truth.faces)
    named = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    row = {"what": args.what, "capture": args.capture.name, "device": named, "views": len(views)}
    row |= {"depth": views.depths is not None, "color": not args.no_color}
    if args.what == "register":
        print(json.dumps(row | registrations(truth, views, args)), flush=True)
        return
    for name, mesh in (("spoiled", spoiled(truth)), ("true", light(truth))):
        print(json.dumps(row | {"start": name} | refinement(mesh, truth, views, args)), flush=True)


def registrations(truth: Mesh, views: ViewSet, args: argparse.Namespace) -> dict:
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
        print(
            f"  {trial:2d} {angle:7.2f}° scale {scale - 1:+.4f} shift {rows[-1][2]:.4f} "
            f"iou {found.silhouette_iou:.3f} color {found.color_correlation or 0:.3f} {seconds:.1f} s",
            flush=True,
        )
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
    scale = math.exp(math.log(0.7) + math.log(2) * float(torch.rand((), generator=generator)))
    m = torch.eye(4, dtype=torch.float64)
    m[:3, :3] = scale * rotation_matrices(q)
    m[:3, 3] = 0.2 * torch.nn.functional.normalize(torch.randn(3, generator=generator, dtype=torch.float64), dim=0)
    return m


def refinement(mesh: Mesh, truth: Mesh, views: ViewSet, args: argparse.Namespace) -> dict:
    """Registers and refines a mesh moved at random; PSNR and IoU against the test views, Chamfer distance to the truth
    in percent of its longest side."""
    options, generator = Options(model="trellis", refine=True, preset=args.preset), torch.Generator().manual_seed(7)
    tests = test_views(args.capture, views)
    moved = mesh.transformed(random_similarity(generator))
    numbers = preset_for(options, views, torch.device(args.device))
    began = time.monotonic()
    state = refine.start(moved, views, options, numbers, device=args.device)
    registered = time.monotonic()
    state, _ = fit.advance(state)
    result = refine.finish(state, views)
    ended = time.monotonic()
    assert state.initial is not None
    given = [state.initial, replace(state.initial, environment=result.mesh.environment)]
    before = max((measured(one, tests, truth) for one in given), key=lambda figures: figures["test_psnr_db"])
    return {
        "preset": args.preset, "kept": result.facts["kept"], "before": before,
        "after": measured(result.mesh, tests, truth), "register_s": round(registered - began, 1),
        "fit_s": round(ended - registered, 1),
        "against_input_views": {name: result.facts.get(name) for name in ("before", "after")},
    }  # fmt: skip


def measured(mesh: TexturedMesh, tests: ViewSet, truth: Mesh) -> dict[str, float]:
    found = measure(mesh, tests)
    assert found is not None
    side = float((truth.vertices.amax(0) - truth.vertices.amin(0)).max())
    distance = 100 * chamfer(to_cpu(mesh).mesh, truth, 50_000) / side
    return {
        "test_psnr_db": round(found.psnr_db, 2),
        "test_iou": round(found.mask_iou or 0.0, 4),
        "chamfer_pct": round(distance, 3),
    }


def test_views(capture: Path, views: ViewSet) -> ViewSet:
    """The views of transforms_test.json, in the scene frame of the training views."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(capture / "test", Path(folder) / "test")
        listing = json.loads((capture / "transforms_test.json").read_text())
        for frame in listing["frames"]:
            frame.pop("depth_path", None)
        (Path(folder) / "cameras.json").write_text(json.dumps(listing))
        found = load_views(Path(folder), ViewRules())
    return found.moved(torch.linalg.inv(views.world_from_scene) @ found.world_from_scene)


def light(truth: Mesh) -> Mesh:
    return simplify(truth, 12_000)


def spoiled(truth: Mesh) -> Mesh:
    """Noise of 5 % of the longest side at every vertex, 10 rounds of smoothing, the colours' channels turned and half
    grey."""
    mesh, generator = light(truth), torch.Generator().manual_seed(3)
    side = float((truth.vertices.amax(0) - truth.vertices.amin(0)).max())
    vertices = mesh.vertices + 0.05 * side * torch.randn(mesh.vertices.shape, generator=generator)
    edges = torch.unique(mesh.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2).sort(-1).values, dim=0)
    degree = torch.bincount(edges.reshape(-1), minlength=len(vertices)).clamp(min=1)[:, None]
    for _ in range(10):
        total = torch.zeros_like(vertices).index_add(0, edges[:, 0], vertices[edges[:, 1]])
        vertices = total.index_add(0, edges[:, 1], vertices[edges[:, 0]]) / degree
    colors = torch.full_like(vertices, 0.4)
    if mesh.vertex_colors is not None:
        colors = 0.5 * mesh.vertex_colors.roll(1, -1) + 0.25
    return Mesh(vertices, mesh.faces, colors)


def load_truth(path: Path) -> Mesh:
    """A welded mesh with linear vertex colours; those of a textured .obj are looked up at its UVs."""
    loaded: Any = trimesh.load(path, process=False, force="mesh")
    if loaded.visual.kind == "texture":
        image = np.asarray(loaded.visual.material.image.convert("RGB"))
        uv = np.asarray(loaded.visual.uv)
        column = (uv[:, 0] % 1 * image.shape[1]).astype(int).clip(0, image.shape[1] - 1)
        row = ((1 - uv[:, 1] % 1) * image.shape[0]).astype(int).clip(0, image.shape[0] - 1)
        srgb = image[row, column] / 255
    else:
        srgb = np.asarray(loaded.visual.vertex_colors)[:, :3] / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    vertices, first, welded = np.unique(np.asarray(loaded.vertices), axis=0, return_index=True, return_inverse=True)
    faces = torch.tensor(welded.reshape(-1)[np.asarray(loaded.faces)]).long()
    return Mesh(torch.tensor(vertices).float(), faces, torch.tensor(linear[first]).float())


if __name__ == "__main__":
    main()
