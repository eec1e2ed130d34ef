"""What VGGT would see if it saw right: cameras of ReconViaGen's crops, in a world and a scale of their own."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from viewmesh.geometry.camera import Cameras
from viewmesh.options import ViewRules
from viewmesh.trellis.preprocess import reconviagen_window
from viewmesh.views.load import load_views
from viewmesh.views.viewset import ViewSet

SIZE = 56


def crops_of(poses: np.ndarray, f: float, images: Tensor) -> Cameras:
    """poses (N, 4, 4), f: as they were given to synthetic_views; images (N, H, W, 4): the views."""
    count, height, width = images.shape[:3]
    left, top, side = torch.tensor([reconviagen_window(i[..., 3].numpy()) for i in images]).double().unbind(-1)
    scale = SIZE / side
    elsewhere = torch.eye(4, dtype=torch.float64)
    elsewhere[:3, :3] *= 3.0
    elsewhere[:3, 3] = torch.tensor([1.0, -2.0, 0.5])
    focal = f * scale
    cameras = Cameras(
        torch.from_numpy(poses), focal, focal.clone(), (width / 2 - left) * scale, (height / 2 - top) * scale,
        SIZE, SIZE,
    )  # fmt: skip
    assert len(poses) == count
    return cameras.moved(elsewhere)


def seeing(poses: np.ndarray, f: float) -> Callable[[Any, Tensor], Cameras]:
    """In the place of ReconViaGen.cameras."""
    return lambda model, images: crops_of(poses, f, images)


def sfm_finding(folder: Path) -> Callable[..., ViewSet]:
    """In the place of refine.load_views: structure from motion finds the cameras that lie in a folder."""

    def load(source: Path, rules: ViewRules, **asked: Any) -> ViewSet:
        if rules.cameras != "sfm":
            return load_views(source, rules, **asked)
        return replace(load_views(folder, ViewRules()), camera_source="sfm")

    return load


def lost(cameras: Cameras) -> Cameras:
    """The same with one pose that is no number."""
    poses = cameras.world_from_camera.clone()
    poses[1] = float("nan")
    return replace(cameras, world_from_camera=poses)
