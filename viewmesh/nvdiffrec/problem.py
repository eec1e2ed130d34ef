"""Everything about a fit that does not change while it runs: the views, the preset, and what follows from them."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch

from viewmesh.geometry.camera import Cameras
from viewmesh.nvdiffrec.initial import Field, initial_field
from viewmesh.nvdiffrec.presets import Preset
from viewmesh.nvdiffrec.shape import Shape, new_shape
from viewmesh.nvdiffrec.targets import Targets, crop_to_object
from viewmesh.render.light import Light, build_light
from viewmesh.render.rasterizer import Rasterizer, get_rasterizer
from viewmesh.views.viewset import ViewSet


@dataclass(eq=False)
class Problem:
    """Derived parts are computed when first needed and never saved: a resumed fit computes them again, the same."""

    views: ViewSet
    preset: Preset
    device: torch.device

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
        """Tells this view set from any other: of names, pixels, cameras and depths."""
        views, digest = self.views, hashlib.sha256()
        c = views.cameras
        poses = () if c is None else (c.world_from_camera, c.fx, c.fy, c.cx, c.cy)
        parts = (views.images, *poses, views.depths)
        digest.update(repr((views.names, [None if part is None else part.shape for part in parts])).encode())
        for part in parts:
            if part is not None:
                digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()

    @property
    def cameras(self) -> Cameras:
        assert self.views.cameras is not None  # start() refuses views without cameras
        return self.views.cameras
