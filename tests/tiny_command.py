"""Makes `viewmesh reconstruct` small enough for tests: one preset of a few seconds, previews of a few frames."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from viewmesh.export import preview
from viewmesh.nvdiffrec import presets, problem
from viewmesh.nvdiffrec.initial import initial_field
from viewmesh.nvdiffrec.presets import Preset, preset


def tiny_preset(
    name: Any,
    device: Any,
    *,
    target_faces: int | None = None,
    texture_size: int | None = None,
    refine_cameras: bool = False,
) -> Preset:
    return replace(
        preset(name, device, refine_cameras=refine_cameras), lattice=14, shape_steps=24, shape_size=48, volume=(8, 16),
        light_size=8, texture_steps=8, texture_crop=64, target_faces=target_faces or 400,
        texture_size=texture_size or 64,
    )  # fmt: skip


def shrink(setattr: Callable[[object, str, Any], None]) -> None:
    """setattr: the builtin, or a MonkeyPatch's that puts everything back."""
    setattr(presets, "preset", tiny_preset)
    setattr(problem, "initial_field", partial(initial_field, resolution=40))
    setattr(preview, "turntable_bytes", partial(preview.turntable_bytes, frames=2, side=64))
    setattr(preview, "thumbnail_bytes", partial(preview.thumbnail_bytes, side=64))
