"""Small corrections of each view, for cameras that were estimated: pose and exposure. Absent when not asked for."""

import torch
from torch import Tensor

from viewmesh.nvdiffrec.optim import Variables
from viewmesh.nvdiffrec.presets import Preset
from viewmesh.nvdiffrec.rendering import Viewpoint, viewpoint
from viewmesh.nvdiffrec.targets import Batch


def corrections(preset: Preset, views: int, device: torch.device) -> Variables:
    """`pose` (N, 6) rotation vector (radians), translation (scene units); `exposure` (N, 3) natural log of a gain."""
    named = {}
    if preset.refine_pose:
        named["pose"] = torch.zeros(views, 6, device=device)
    if preset.refine_exposure:
        named["exposure"] = torch.zeros(views, 3, device=device)
    return named


def corrected(leaves: Variables, batch: Batch, device: torch.device) -> Viewpoint:
    """The batch's cameras with their corrections; the mean pose correction is removed, the scene must not drift."""
    if "pose" not in leaves:
        return batch.viewpoint
    pose = leaves["pose"] - leaves["pose"].mean(0)
    return viewpoint(batch.cameras, device, pose[batch.index.to(device)])


def exposed(leaves: Variables, color: Tensor, batch: Batch) -> Tensor:
    """Colour (B, S, S, 3) times each view's gain; the mean gain is one, the light must not drift."""
    if "exposure" not in leaves:
        return color
    gain = torch.exp(leaves["exposure"] - leaves["exposure"].mean(0))
    return color * gain[batch.index.to(color.device)][:, None, None]
