"""Depth maps: 16-bit PNG times a unit, to z-depth. Refuses what would silently be wrong."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from viewmesh.errors import InputError
from viewmesh.options import ViewRules
from viewmesh.views.cameras_file import CameraFile
from viewmesh.views.images import read_depth_integers
from viewmesh.views.limits import Limits
from viewmesh.views.photo import Photo
from viewmesh.views.viewset import ViewSet

DEFAULT_UNIT = 1e-3  # world units per integer step where nothing is declared: millimetres, as nerfstudio has it
AGREEING = 0.5  # share of the object's depth pixels that must land near the object


def read_depth(
    photo: Photo, path: Path, name: str, camera_file: CameraFile | None, rules: ViewRules, limits: Limits
) -> Photo:
    """The photo with its depth map: float32 in world units, 0 = unknown.

    The unit is the rules' depth_unit_scale, else the camera file's, else 0.001. Depth is along the optical axis unless
    the camera file says `depth_kind: ray`. Raises InputError.
    """
    integers = read_depth_integers(path, name, limits)
    if integers.shape != photo.rgb.shape[:2]:
        raise InputError(
            f"the depth map is {integers.shape[1]} x {integers.shape[0]} pixels, its view {photo.name} is "
            f"{photo.size[0]} x {photo.size[1]}; give it the view's size.",
            file=name,
        )
    if not integers.any():
        raise InputError("the depth map is 0 (unknown) everywhere; leave depth out or render it again.", file=name)
    declared = rules.depth_unit_scale or (None if camera_file is None else camera_file.depth_unit)
    depth = integers.astype(np.float32) * np.float32(declared or DEFAULT_UNIT)
    return replace(photo, depth=depth, depth_along_ray=camera_file is not None and camera_file.depth_along_ray)


def check_depths(views: ViewSet) -> None:
    """Raises InputError if the depth maps of masked, posed views put the object somewhere else than the masks do."""
    if views.depths is None or views.cameras is None or views.mask_source == "none":
        return
    for n, name in enumerate(views.names):
        known = (views.depths[n] > 0) & (views.images[n, ..., 3] > 200)
        if int(known.sum()) < 20:
            continue
        points = views.cameras[n].unproject(views.depths[n : n + 1])[0][known]
        near = (points.abs() <= 0.75).all(-1).float().mean()
        if near < AGREEING:
            median = float(torch.median(views.depths[n][known]) / float(views.cameras.centers[n].norm()))
            raise InputError(
                f"its depth map does not agree with the cameras and masks (the object would be at {median:.3g} times "
                "its distance); check depth_unit_scale, and that depth is along the optical axis.",
                file=name,
            )
