"""Structure from motion by COLMAP, as a program of its own: the only importer of pycolmap.

`python -m viewmesh.views.sfm FOLDER` reads FOLDER/job.json and FOLDER/images, and writes FOLDER/model.npz. It is run
as a child (viewmesh/views/pose.py) because native code may crash or hang, and a child can be killed. Each line on
stdout is one JSON object {"step", "steps"}. Axes here are COLMAP's (OpenCV); the reader of the model converts them.

Schönberger and Frahm, "Structure-from-Motion Revisited", CVPR 2016.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

SEED = 0
CAMERA_MODEL = "SIMPLE_RADIAL"  # f, cx, cy, k: few enough parameters for a dozen photos
MIN_MODEL_VIEWS = 3


def main(folder: Path) -> None:
    """Poses the images of a job. job.json: names (files in images/), groups (lists of names taken with one lens),
    focal_px (per group, or null), max_image_size, masked (whether masks/NAME.png restrict the features)."""
    import pycolmap

    job = json.loads((folder / "job.json").read_text())
    pycolmap.logging.minloglevel = 2
    pycolmap.set_random_seed(SEED)
    threads = os.cpu_count() or 1
    steps = 2 + len(job["names"])
    _say(0, steps)
    _extract(pycolmap, folder, job, threads)
    _say(1, steps)
    _match(pycolmap, folder, threads)
    _say(2, steps)
    model = _map(pycolmap, folder, steps)
    arrays: dict[str, Any] = {} if model is None else _arrays(model, job["names"])
    np.savez(folder / "model.npz", **arrays)
    _say(steps, steps)


def _extract(pycolmap: Any, folder: Path, job: dict, threads: int) -> None:
    options = pycolmap.FeatureExtractionOptions()
    options.max_image_size, options.use_gpu, options.num_threads = job["max_image_size"], False, threads
    for names, focal in zip(job["groups"], job["focal_px"], strict=True):
        reader = pycolmap.ImageReaderOptions()
        reader.camera_model = CAMERA_MODEL
        if focal is not None:
            width, height = job["sizes"][names[0]]
            reader.camera_params = f"{focal},{width / 2},{height / 2},0"
        if job["masked"]:
            reader.mask_path = str(folder / "masks")
        pycolmap.extract_features(
            folder / "database.db", folder / "images", image_names=names, camera_mode=pycolmap.CameraMode.SINGLE,
            reader_options=reader, extraction_options=options, device=pycolmap.Device.cpu,
        )  # fmt: skip


def _match(pycolmap: Any, folder: Path, threads: int) -> None:
    matching, verification = pycolmap.FeatureMatchingOptions(), pycolmap.TwoViewGeometryOptions()
    matching.use_gpu, matching.num_threads = False, threads
    verification.ransac.random_seed = SEED
    pycolmap.match_exhaustive(
        folder / "database.db",
        matching_options=matching,
        verification_options=verification,
        device=pycolmap.Device.cpu,
    )


def _map(pycolmap: Any, folder: Path, steps: int) -> Any:
    """The reconstruction with the most views, None if there is none."""
    options = pycolmap.IncrementalPipelineOptions()
    options.random_seed, options.extract_colors, options.min_model_size = SEED, False, MIN_MODEL_VIEWS
    options.num_threads = 1  # sums of several threads differ from run to run
    # a dozen photos overlap little: a view with 15 good matches is worth having, where COLMAP's default asks for 30
    options.mapper.abs_pose_min_num_inliers, options.mapper.abs_pose_min_inlier_ratio = 15, 0.15
    done = [2]

    def registered() -> None:
        done[0] = min(done[0] + 1, steps - 1)
        _say(done[0], steps)

    (folder / "models").mkdir()
    models = pycolmap.incremental_mapping(
        folder / "database.db", folder / "images", folder / "models", options, next_image_callback=registered
    )
    return max(models.values(), key=lambda m: (m.num_reg_images(), m.num_points3D()), default=None)


def _arrays(model: Any, names: list[str]) -> dict[str, np.ndarray]:
    """views: indices into names. world_from_camera: (M, 4, 4) OpenCV axes. lens: (M, 4) f, cx, cy, k. points: (P, 3).
    seen: (S, 2) index of view and of point; pixels: (S, 2) where."""
    images = sorted((i for i in model.images.values() if i.has_pose), key=lambda i: names.index(i.name))
    ids = sorted(model.points3D)
    row = {point: k for k, point in enumerate(ids)}
    poses, lenses, seen, pixels = [], [], [], []
    for image in images:
        pose = np.eye(4)
        pose[:3] = image.cam_from_world().inverse().matrix()
        poses.append(pose)
        lenses.append(model.cameras[image.camera_id].params)
        for point in image.points2D:
            if point.has_point3D():
                seen.append((names.index(image.name), row[point.point3D_id]))
                pixels.append(point.xy)
    return {
        "views": np.array([names.index(i.name) for i in images]),
        "world_from_camera": np.stack(poses),
        "lens": np.stack(lenses),
        "points": np.array([model.points3D[i].xyz for i in ids]).reshape(-1, 3),
        "errors": np.array([model.points3D[i].error for i in ids]),
        "seen": np.array(seen, dtype=np.int64).reshape(-1, 2),
        "pixels": np.array(pixels).reshape(-1, 2),
    }


def _say(step: int, steps: int) -> None:
    sys.stdout.write(json.dumps({"step": step, "steps": steps}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
