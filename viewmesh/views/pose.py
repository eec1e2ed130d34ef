"""Photos without cameras to photos with: starts structure from motion as a child, watches it, judges what it posed."""

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from viewmesh.errors import Cancelled, PoseError
from viewmesh.geometry.camera import OPENGL_FROM_OPENCV
from viewmesh.progress import Progress
from viewmesh.views.lens import Lens
from viewmesh.views.limits import Limits
from viewmesh.views.photo import Photo, undistorted

SFM_SIZE = 1024  # pixels of the long side; more costs minutes and poses no better
FEWEST = 3
HINT = "Take 20 to 60 photos all around the object, each overlapping the next, sharp, with some texture in view."
RIG_HINT = (
    " If they are the front, right, back, left, top and bottom of the six-view rig, in this order, say so: "
    "--rig canonical6 (views.rig)."
)


@dataclass(frozen=True)
class Posed:
    """Posed photos, undistorted, and the sparse points they were posed by, in the arbitrary world of the
    reconstruction (or in the depth maps' units if there are depth maps).

    points: (P, 3). seen: (S, 2) index into photos and points, of each sighting. pixels: (S, 2) x, y of it in the
    undistorted photo. unposed: names of the views that are left out.
    """

    photos: list[Photo]
    points: np.ndarray
    seen: np.ndarray
    pixels: np.ndarray
    unposed: tuple[str, ...]


def pose(photos: list[Photo], work: Path, limits: Limits, progress: Progress, cancelled: Callable[[], bool]) -> Posed:
    """Estimates lenses and poses of photos (all of them without). Where they have masks, features of the object alone
    are tried first (the object may have been turned in front of the camera), then the whole images.

    Raises PoseError naming the views if fewer than half (or three) could be posed; Cancelled.
    """
    if len(photos) < FEWEST:
        raise PoseError(
            f"Structure from motion needs at least {FEWEST} photos, there are {len(photos)}; give more, or cameras.",
            unposed=tuple(p.name for p in photos),
            hint=HINT,
        )
    enough = max(FEWEST, (len(photos) + 1) // 2)
    best: dict[str, np.ndarray] = {}
    attempts = [True, False] if all(p.coverage is not None for p in photos) else [False]
    for attempt, masked in enumerate(attempts):
        model = _reconstruct(photos, masked, work / f"sfm{attempt}", limits, progress, cancelled)
        if len(model.get("views", ())) > len(best.get("views", ())):
            best = model
        if len(best.get("views", ())) >= max(enough, 0.8 * len(photos)):
            break
    posed = set(best["views"].tolist()) if best else set()
    unposed = tuple(p.name for i, p in enumerate(photos) if i not in posed)
    if len(posed) < enough:
        raise PoseError(
            f"Structure from motion could pose only {len(posed)} of {len(photos)} views, {enough} are needed; "
            f"it could not pose {_listed(unposed)}: give photos that overlap more, or a cameras.json.",
            unposed=unposed,
            hint=HINT + (RIG_HINT if len(photos) == 6 else ""),
        )
    return _posed(photos, best, unposed)


def _reconstruct(
    photos: list[Photo], masked: bool, folder: Path, limits: Limits, progress: Progress, cancelled: Callable[[], bool]
) -> dict[str, np.ndarray]:
    """The arrays of sfm.py's model; empty if the child found none, crashed or ran out of time."""
    _write_job(photos, masked, folder)
    command = [sys.executable, "-m", "viewmesh.views.sfm", str(folder)]
    with (folder / "log").open("wb") as log:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL)
    try:
        _watch(child, limits.sfm_seconds, progress, cancelled)
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
        child.wait()
    result = folder / "model.npz"
    if child.returncode != 0 or not result.is_file():
        last = (folder / "log").read_text(errors="replace").strip().splitlines()[-1:]
        if last and "No module named 'pycolmap'" in last[0]:
            raise PoseError("Photos without cameras need pycolmap; give a cameras.json.", hint="pip install pycolmap")
        return {}
    with np.load(result, allow_pickle=False) as arrays:
        return dict(arrays)


def _watch(child: subprocess.Popen, seconds: float, progress: Progress, cancelled: Callable[[], bool]) -> None:
    """Relays the child's progress until it ends, the time is up or the work is cancelled."""
    lines: queue.Queue[bytes] = queue.Queue()
    stdout = child.stdout
    assert stdout is not None
    threading.Thread(target=lambda: [lines.put(line) for line in stdout], daemon=True).start()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if cancelled():
            raise Cancelled("The work was cancelled.")
        try:
            said = json.loads(lines.get(timeout=0.1))
            progress("pose", said["step"], said["steps"])
        except queue.Empty:
            if child.poll() is not None:
                return
        except (ValueError, KeyError, TypeError):  # something else printed a line
            continue


def _write_job(photos: list[Photo], masked: bool, folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    names = [f"{i:04d}.png" for i in range(len(photos))]
    groups: dict[tuple, list[str]] = {}
    for name, photo in zip(names, photos, strict=True):
        cv2.imwrite(str(folder / "images" / name), photo.rgb[..., ::-1])
        if masked and photo.coverage is not None:
            near = cv2.dilate((photo.coverage >= 128).astype(np.uint8) * 255, np.ones((9, 9), np.uint8))
            cv2.imwrite(str(folder / "masks" / f"{name}.png"), near)
        focal = None if photo.focal_px is None else round(photo.focal_px, 1)
        groups.setdefault((photo.size, focal), []).append(name)
    job = {
        "names": names,
        "sizes": {name: photo.size for name, photo in zip(names, photos, strict=True)},
        "groups": list(groups.values()),
        "focal_px": [focal for _, focal in groups],
        "max_image_size": SFM_SIZE,
        "masked": masked,
    }
    (folder / "job.json").write_text(json.dumps(job))


def _posed(photos: list[Photo], model: dict[str, np.ndarray], unposed: tuple[str, ...]) -> Posed:
    views = model["views"].tolist()
    opengl = model["world_from_camera"] @ OPENGL_FROM_OPENCV.numpy()
    scale = _depth_scale(photos, model, opengl)
    posed, pixels = [], model["pixels"].copy()
    for k, i in enumerate(views):
        f, cx, cy, radial = model["lens"][k].tolist()
        width, height = photos[i].size
        lens = Lens(f, f, cx, cy, width, height, "opencv", (radial, 0.0, 0.0, 0.0))
        m = opengl[k].copy()
        m[:3, 3] *= scale
        of_view = model["seen"][:, 0] == i
        pixels[of_view] = _undistorted_pixels(pixels[of_view], lens)
        posed.append(undistorted(replace(photos[i], lens=lens, world_from_camera=m)))
    position = {i: k for k, i in enumerate(views)}
    seen = model["seen"].copy()
    seen[:, 0] = [position[i] for i in seen[:, 0].tolist()]
    return Posed(posed, model["points"] * scale, seen, pixels, unposed)


def _depth_scale(photos: list[Photo], model: dict[str, np.ndarray], opengl: np.ndarray) -> float:
    """World units of the depth maps per unit of the reconstruction; 1 without depth maps."""
    ratios = []
    for k, i in enumerate(model["views"].tolist()):
        depth = photos[i].depth
        if depth is None:
            continue
        of_view = model["seen"][:, 0] == i
        x, y = np.floor(model["pixels"][of_view]).astype(int).T
        inside = (x >= 0) & (y >= 0) & (x < depth.shape[1]) & (y < depth.shape[0])
        points = model["points"][model["seen"][of_view, 1]][inside]
        z = -((points - opengl[k, :3, 3]) @ opengl[k, :3, :3])[:, 2]
        if photos[i].depth_along_ray:
            z = np.where(z > 0, np.linalg.norm(points - opengl[k, :3, 3], axis=-1), z)
        measured = depth[y[inside], x[inside]]
        known = (measured > 0) & (z > 1e-9)
        ratios.append(measured[known] / z[known])
    ratios = np.concatenate(ratios) if ratios else np.zeros(0)
    return float(np.median(ratios)) if len(ratios) >= 20 else 1.0


def _undistorted_pixels(pixels: np.ndarray, lens: Lens) -> np.ndarray:
    """Where a pinhole sees what this lens sees at `pixels` (S, 2), by fixed-point iteration."""
    center, f, k = np.array([lens.cx, lens.cy]), lens.fx, lens.radial[0]
    distorted = (pixels - center) / f
    x = distorted.copy()
    for _ in range(10):
        x = distorted / (1 + k * (x * x).sum(-1, keepdims=True))
    return x * f + center


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
