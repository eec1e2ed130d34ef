"""`model: auto`: which model suits what was given and what is installed. Pure: the caller looks."""

from dataclasses import dataclass
from typing import Literal

from viewmesh.errors import MissingModel

CameraSource = Literal["file", "canonical6", "sfm", "vggt"]  # as in viewmesh.views.viewset, without importing torch

ENOUGH_VIEWS = 8  # for structure from motion, and for an optimiser that sees nothing but the views


@dataclass(frozen=True)
class Choice:
    """because: a clause for people, "" where the caller named the model."""

    model: str
    because: str = ""


def choose(views: int, cameras: CameraSource | None, *, generative: bool) -> Choice:
    """views: how many. cameras: where they will come from; None: they shall not be looked for. generative: trellis has
    its weights and a device to run on.

    Raises MissingModel when the views have no cameras, shall get none, and trellis cannot run.
    """
    if cameras == "file":
        return Choice("nvdiffrec", "the views come with cameras")
    if cameras == "canonical6":
        return Choice("nvdiffrec", "the views are those of a known rig")
    if cameras == "sfm" and views >= ENOUGH_VIEWS:
        return Choice("nvdiffrec", f"{views} views are enough to find the cameras from")
    if generative:
        return Choice("trellis", f"{views} view{'s' * (views != 1)} without cameras are few for structure from motion")
    if cameras == "sfm":
        return Choice("nvdiffrec", "trellis, better for few views without cameras, is not ready here")
    raise MissingModel(
        "Views without cameras need a generative model, and trellis is not ready here.",
        hint="viewmesh weights download trellis (and a GPU), or give cameras.",
    )


def after_no_poses(reason: str) -> Choice:
    """What to do when structure from motion failed and trellis is ready."""
    return Choice("trellis", f"structure from motion found no cameras ({reason.rstrip('.')})")
