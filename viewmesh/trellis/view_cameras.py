"""Cameras of ReconViaGen's square crops as cameras of the views that the crops were cut from."""

from dataclasses import replace

import torch
from torch import Tensor

from viewmesh.geometry.camera import Cameras
from viewmesh.trellis.preprocess import reconviagen_window


def in_views(crops: Cameras, images: Tensor) -> Cameras:
    """crops: of `ReconViaGen.cameras(images)`; images: (N, H, W, 4) uint8. The same poses, intrinsics over H x W."""
    alpha = images[..., 3].numpy()
    windows = torch.tensor([reconviagen_window(a) for a in alpha], dtype=torch.float64)
    left, top, side = windows.unbind(-1)
    scale = side / crops.width
    return replace(
        crops, fx=crops.fx * scale, fy=crops.fy * scale, cx=crops.cx * scale + left, cy=crops.cy * scale + top,
        height=images.shape[1], width=images.shape[2],
    )  # fmt: skip
