"""Reconstructs a posed view set and measures the written files against views and a mesh that were never trained on.

    python bench/reconstruct.py CAPTURE [--test transforms_test.json] [--mesh mesh_gt.ply] [--preset preview] [--device cpu]

Prints one row: time, peak memory, PSNR and mask IoU on the test views (rendered from mesh.glb and environment.hdr by
`viewmesh render`'s code), Chamfer distance (mean of both directions, ground truth in the unit cube).
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch

from viewmesh.export.metrics import chamfer, mask_iou, psnr_on_white
from viewmesh.export.rerender import read_ground_truth, rerender, test_images
from viewmesh.options import Options
from viewmesh.reconstruct import best_device, reconstruct


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capture", type=Path)
    parser.add_argument("--test", type=Path, help="transforms of the test views")
    parser.add_argument("--mesh", type=Path, help="ground-truth mesh in the capture's world frame")
    parser.add_argument("--preset", default="preview")
    parser.add_argument("--rig")
    parser.add_argument("--device", default=str(best_device()))
    parser.add_argument("--out", type=Path, help="keep the results here")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch) / "out"
        options = Options(preset=args.preset, views={"rig": args.rig})  # pyright: ignore[reportArgumentType]
        began = time.monotonic()
        reconstruct(args.capture, out, options, device=args.device)
        seconds = time.monotonic() - began
        report = json.loads((out / "report.json").read_text())
        row = {"capture": args.capture.name, "preset": args.preset, "seconds": round(seconds, 1)}
        row["stages"] = {name: round(s, 1) for name, s in report["seconds"].items()}
        row["faces"] = report["faces"]
        if args.test:
            rerender(out, args.test, out / "test")
            pairs = test_images(args.test, out / "test")
            row["test_psnr_db"] = round(sum(psnr_on_white(a, b) for a, b in pairs) / len(pairs), 2)
            row["test_mask_iou"] = round(sum(mask_iou(a[..., 3], b[..., 3]) for a, b in pairs) / len(pairs), 4)
        if args.mesh:
            ours, truth = read_ground_truth(out, args.mesh)
            row["chamfer"] = round(chamfer(ours, truth), 5)
        row["peak_rss_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
        if torch.cuda.is_available():
            row["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        print(json.dumps(row))


if __name__ == "__main__":
    main()
