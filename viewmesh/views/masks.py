"""Where each view's mask comes from: masks/, alpha, matting, GrabCut, or nowhere. Decides; the work is done beside."""

from dataclasses import replace

import numpy as np

from viewmesh.errors import InputError
from viewmesh.options import ViewRules
from viewmesh.views import matting
from viewmesh.views.photo import Photo
from viewmesh.views.viewset import MaskSource

EMPTY = 1 / 5000  # share of the image below which a mask shows no object


def choose(rules: ViewRules, has_masks: bool, alphas: dict[str, bool]) -> MaskSource:
    """What rules.mask means for this view set. alphas: by view, False where the file has no (or an all-opaque) alpha.

    Raises InputError if the rule asks for what is not there.
    """
    opaque = [name for name, has_alpha in alphas.items() if not has_alpha]
    if rules.mask == "masks" and not has_masks:
        raise InputError(
            "the rule mask: masks needs files there; add one mask per view, white where the object is.", file="masks/"
        )
    if rules.mask == "alpha" and opaque:
        raise InputError(
            "the rule mask: alpha needs transparent pixels around the object; save the cut-out as RGBA, or use "
            "mask: auto.",
            file=opaque[0],
        )
    if rules.mask != "auto":
        return rules.mask
    if has_masks:
        return "masks"
    if opaque and len(opaque) < len(alphas):
        raise InputError(
            f"{len(alphas) - len(opaque)} of {len(alphas)} views have an alpha channel but this one has none or is "
            "opaque all over; give every view alpha, or none (then mask: grabcut works on all).",
            file=opaque[0],
        )
    if not opaque:
        return "alpha"
    return "rembg" if matting.available() else "grabcut"


def check_not_empty(photo: Photo, name: str) -> None:
    """Raises InputError if a given mask or alpha shows no object."""
    if photo.coverage is not None and np.mean(photo.coverage >= 128) < EMPTY:
        raise InputError(
            "the mask is empty; mark the object white (255), or make it opaque if the mask is an alpha channel.",
            file=name,
        )


def check_found(photos: list[Photo]) -> None:
    """Raises InputError if matting or GrabCut told no object from the background in most views."""
    nothing = [p.name for p in photos if p.coverage is None or np.mean(p.coverage >= 128) < EMPTY]
    if 2 * len(nothing) > len(photos):
        raise InputError(
            f"no object could be told from the background here and in {len(nothing) - 1} other views; give masks/ or "
            "an alpha channel, or use mask: none.",
            file=nothing[0],
        )


def by_matting(photos: list[Photo]) -> list[Photo]:
    return within_photos(photos, matting.matted([p.rgb for p in photos]))


def within_photos(photos: list[Photo], masks: list[np.ndarray]) -> list[Photo]:
    """The photos with masks that were found; the object is nowhere where a photo is known to have no pixel."""
    found = (m if p.coverage is None else np.minimum(m, p.coverage) for p, m in zip(photos, masks, strict=True))
    return [replace(p, coverage=m) for p, m in zip(photos, found, strict=True)]
