"""Everything about a fit that does not change while it runs: the views, the preset, and what follows from them."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from viewmesh.geometry.camera import Cameras
from viewmesh.nvdiffrec.initial import Field, initial_field
from viewmesh.nvdiffrec.presets import Preset
from viewmesh.nvdiffrec.shape import Shape, new_shape
from viewmesh.nvdiffrec.targets import Targets, crop_to_object
from viewmesh.progress import never
from viewmesh.render.light import Light, build_light
from viewmesh.render.rasterizer import Rasterizer, get_rasterizer
from viewmesh.views.viewset import ViewSet

_OF_SHAPE = ("field", "shape", "shape_targets")
PARTS = {"shape": _OF_SHAPE, "clean": _OF_SHAPE, "texture": ("texture_targets",)}  # of a problem, by phase of the fit


@dataclass(eq=False)
class Problem:
    """Derived parts are computed when first needed and never saved: a resumed fit computes them again, the same.

    Those that look at all views take seconds; `prepare` computes them so that they can be stopped.
    """

    views: ViewSet
    preset: Preset
    device: torch.device

    def prepare(self, phase: str, cancelled: Callable[[], bool] = never) -> None:
        """Computes what a phase of the fit needs of the views, unless it is there. Raises Cancelled between two views:
        the part that was being computed is then begun again by the next call."""
        crop = partial(crop_to_object, self.views, device=self.device, cancelled=cancelled)
        compute = {
            "field": lambda: initial_field(self.views, cancelled=cancelled),
            "shape": lambda: new_shape(self.field, self.preset, self.device, cancelled),
            "shape_targets": lambda: crop(self.preset.shape_size),
            "texture_targets": lambda: crop(self.preset.texture_crop),
        }
        for part in PARTS.get(phase, ()):
            if part not in vars(self):  # where cached_property keeps it
                setattr(self, part, compute[part]())

    @cached_property
    def rasterizer(self) -> Rasterizer:
        return get_rasterizer(self.device)

    @cached_property
    def light(self) -> Light:
        return build_light(self.preset.light_size, self.device)

    @cached_property
    def field(self) -> Field:
        return initial_field(self.views)

    @cached_property
    def shape(self) -> Shape:
        return new_shape(self.field, self.preset, self.device)

    @cached_property
    def shape_targets(self) -> Targets:
        return crop_to_object(self.views, self.preset.shape_size, self.device)

    @cached_property
    def texture_targets(self) -> Targets:
        return crop_to_object(self.views, self.preset.texture_crop, self.device)

    @cached_property
    def fingerprint(self) -> str:
        """Tells this view set from any other: of names, pixels, cameras, depths and what is known."""
        views, digest = self.views, hashlib.sha256()
        c = views.cameras
        poses = () if c is None else (c.world_from_camera, c.fx, c.fy, c.cx, c.cy)
        parts = (views.images, *poses, views.depths, *(() if views.known is None else (views.known,)))
        digest.update(repr((views.names, [None if part is None else part.shape for part in parts])).encode())
        for part in parts:
            if part is not None:
                digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()

    @property
    def cameras(self) -> Cameras:
        assert self.views.cameras is not None  # start() refuses views without cameras
        return self.views.cameras
