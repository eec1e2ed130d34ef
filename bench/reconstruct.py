"""Reconstructs a view set through the command line's own path and measures the written files.

    python bench/reconstruct.py CAPTURE [--test transforms_test.json] [--mesh mesh_gt.ply] [--preset preview]

Prints one JSON row: seconds by stage, peak memory, PSNR and mask IoU against test views that were never trained on
(drawn from the stored result as `viewmesh render` does), Chamfer distance to a ground-truth mesh (mean of both
directions, in units of the ground truth's longest side).
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path

from viewmesh import runtime

runtime.prepare()  # before the first tensor, which the imports below make
# ruff: noqa: E402

import numpy as np
import torch
import trimesh
from PIL import Image

from viewmesh.export.metrics import chamfer, mask_iou, psnr, view_on_white
from viewmesh.export.rerender import rerender
from viewmesh.geometry.mesh import Mesh
from viewmesh.options import Options
from viewmesh.reconstruct import best_device, reconstruct


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capture", type=Path)
    parser.add_argument("--test", type=Path, help="transforms file of the test views")
    parser.add_argument("--mesh", type=Path, help="ground-truth mesh in the capture's world frame")
    parser.add_argument("--preset", default="preview")
    parser.add_argument("--device", default=str(best_device()))
    parser.add_argument("--out", type=Path, help="keep the results here")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch) / "out"
        began = time.monotonic()
        reconstruct(args.capture, out, Options(preset=args.preset), device=args.device)
        row = {
            "capture": str(args.capture),
            "preset": args.preset,
            "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device,
            "seconds": round(time.monotonic() - began, 1),
        }
        report = json.loads((out / "report.json").read_text())
        row |= {"stages": {k: round(v, 1) for k, v in report["seconds"].items()}, "faces": report["faces"]}
        row |= {"input_views": report["input_views"], "warnings": report["warnings"]}
        row["peak_rss_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
        if args.device.startswith("cuda"):
            row["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        if args.test:
            row |= against_views(out, args.test)
        if args.mesh:
            row["chamfer"] = round(against_mesh(out, report, args.mesh), 5)
        print(json.dumps(row))


def against_views(out: Path, transforms: Path) -> dict[str, float]:
    """Mean PSNR (dB, whole images on white) and mask IoU over the frames of a transforms file."""
    rerender(out, transforms, out / "test")
    frames = json.loads(transforms.read_text())["frames"]
    psnrs, ious = [], []
    for i, frame in enumerate(frames):
        ours = rgba(out / "test" / f"view_{i:03d}.png")
        truth = rgba(transforms.parent / frame["file_path"])
        psnrs.append(psnr(view_on_white(ours), view_on_white(truth)))
        ious.append(mask_iou(ours[..., 3].float() / 255, truth[..., 3].float() / 255))
    return {"test_psnr_db": round(statistics.fmean(psnrs), 2), "test_mask_iou": round(statistics.fmean(ious), 4)}


def against_mesh(out: Path, report: dict, truth: Path) -> float:
    world_from_mesh = torch.tensor(report["world_from_mesh"])
    ours = load(out / "mesh.ply").transformed(world_from_mesh)
    reference = load(truth)
    side = float((reference.vertices.amax(0) - reference.vertices.amin(0)).max())
    return chamfer(ours, reference) / side


def load(path: Path) -> Mesh:
    mesh = trimesh.load(path, process=False, force="mesh")
    return Mesh(torch.tensor(np.asarray(mesh.vertices)).float(), torch.tensor(np.asarray(mesh.faces)).long())


def rgba(path: Path) -> torch.Tensor:
    path = path if path.suffix else path.with_suffix(".png")
    return torch.from_numpy(np.array(Image.open(path).convert("RGBA")))


if __name__ == "__main__":
    main()
