"""engines.Optimiser on viewmesh.nvdiffrec. Importing it imports torch: only replicas do."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deployments.adapters.device import OnDevice
from viewmesh import refine
from viewmesh.errors import OutOfMemory
from viewmesh.export.images import png
from viewmesh.export.preview import early_previews
from viewmesh.geometry.camera import canonical6
from viewmesh.geometry.meshfile import load_gaussians, load_mesh, save_mesh
from viewmesh.geometry.unwrap import build_loops
from viewmesh.nvdiffrec import fit
from viewmesh.nvdiffrec.presets import Preset, preset, preset_for
from viewmesh.nvdiffrec.preview import preview
from viewmesh.nvdiffrec.problem import Problem
from viewmesh.options import Options
from viewmesh.views.archive import load_viewset
from viewmesh.views.viewset import ViewSet

Begin = Callable[[Any, Any], fit.State]  # of progress and cancelled


class NvdiffrecSession:
    """state: None until the first slice has made it, by `begin`; where that registers a mesh, it is a slice of its
    own."""

    def __init__(
        self,
        state: fit.State | None,
        device: torch.device,
        numbers: Preset,
        begin: Begin | None = None,
        *,
        registers: bool = False,
    ) -> None:
        self.state, self.device, self.numbers, self.begin, self.registers = state, device, numbers, begin, registers

    @property
    def step(self) -> int:
        return 0 if self.state is None else self.state.steps_done

    @property
    def steps(self) -> int:
        return self.numbers.shape_steps + len(fit.BETWEEN) + self.numbers.texture_steps

    @property
    def done(self) -> bool:
        return self.state is not None and self.state.done

    @property
    def look_again(self) -> bool:
        return self.state is not None and self.state.notes.get("look_again", False)

    def advance(self, seconds: float, progress: Any, cancelled: Any) -> dict[str, float]:
        if self.state is None:
            assert self.begin is not None
            self.state = self.begin(progress, cancelled)
            if self.registers:
                return {}
        self.state, metrics = fit.advance(self.state, seconds=seconds, progress=progress, cancelled=cancelled)
        return {name: float(value) for name, value in metrics.items()}

    def checkpoint(self) -> Callable[[Path], str]:
        assert self.state is not None
        return partial(fit.save, self.state)  # a value: the session goes on with another one

    def go_on(self, enough: Callable[[], bool], progress: Any, cancelled: Any) -> None:
        if self.state is not None and self.state.phase in fit.PASSES:
            self.state, _ = fit.advance(self.state, enough=enough, progress=progress, cancelled=cancelled)

    def preview(self, out: Path) -> bool:
        pixels = None if self.state is None or self.state.notes.get("reason") else preview(self.state)
        if pixels is not None:
            out.write_bytes(png(pixels.numpy()))
        return pixels is not None

    def finish(self, out: Path, progress: Any, cancelled: Any, initial: Path | None = None) -> dict[str, Any]:
        assert self.state is not None
        progress("finish", 1, 2)
        facts: dict[str, Any] = {"device": str(self.device)}
        if initial is None:
            mesh = fit.finish(self.state)
            save_mesh(mesh, out, previews=early_previews(mesh, self.device))
        else:
            refined = refine.finish(self.state, self.state.problem.views, load_gaussians(initial))
            save_mesh(refined.mesh, out, refined.gaussians, previews=early_previews(refined.mesh, self.device))
            facts |= {"refinement": refined.facts, "refine_warnings": list(refined.warnings)}
        progress("finish", 2, 2)
        return facts


class NvdiffrecOptimiser(OnDevice):
    """device: auto, cpu or cuda. The first kernels are built here, before the replica reports ready."""

    def __init__(self, device: str = "auto") -> None:
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.device = torch.device(chosen)
        if self.device.type == "cpu":  # Ray allows as many threads as CPUs were asked for, which is less than there are
            torch.set_num_threads(os.cpu_count() or 1)
        warm_up(self.device)

    def start(self, views: Path, options: dict, initial: Path | None, *, smaller: bool) -> NvdiffrecSession:
        """With an initial mesh, in whatever frame it is, the first slice registers it with the views. What takes time
        is the first slice's, which can be stopped."""
        chosen = Options.model_validate(options)
        viewset = load_viewset(views)
        numbers = self._preset(chosen, viewset, smaller)
        if initial is None:

            def start(progress: Any, cancelled: Any) -> fit.State:
                generator = torch.Generator().manual_seed(chosen.seed)
                return fit.start(viewset, numbers, generator, device=self.device, cancelled=cancelled)

            return NvdiffrecSession(None, self.device, numbers, start)
        mesh = load_mesh(initial)

        def begin(progress: Any, cancelled: Any) -> fit.State:
            hooks = {"progress": progress, "cancelled": cancelled}
            return refine.start(mesh, viewset, chosen, numbers, device=self.device, **hooks)

        return NvdiffrecSession(None, self.device, numbers, begin, registers=True)

    def load(self, views: Path, options: dict, checkpoint: Path, *, smaller: bool) -> NvdiffrecSession:
        """With `smaller`, half the preset's views a step, whether or not the checkpoint was made so already."""
        viewset = load_viewset(views)
        state = fit.load(checkpoint, viewset, device=self.device)
        if smaller:
            less = self._preset(Options.model_validate(options), viewset, smaller)
            numbers = replace(state.problem.preset, shape_batch=less.shape_batch, texture_batch=less.texture_batch)
            state = replace(state, problem=Problem(viewset, numbers, self.device))
        return NvdiffrecSession(state, self.device, state.problem.preset)

    def _preset(self, options: Options, views: ViewSet, smaller: bool) -> Preset:
        numbers = preset_for(options, views, self.device)
        return _smaller(numbers) if smaller else numbers


def warm_up(device: torch.device) -> None:
    """An atlas, and one step on a disk seen six times: kernels are compiled, and an unusable device is found out."""
    side = 48
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    images = torch.full((6, side, side, 4), 128, dtype=torch.uint8)
    images[..., 3] = 255 * ((x - side / 2) ** 2 + (y - side / 2) ** 2 < (side / 5) ** 2)
    names = tuple(f"view_{i:02d}.png" for i in range(6))
    views = ViewSet(names, images, canonical6(side, side), camera_source="canonical6", mask_source="alpha")
    tiny = replace(preset("preview", device), lattice=12, shape_size=32, texture_crop=32, texture_size=256)
    build_loops()
    fit.advance(fit.start(views, tiny, torch.Generator().manual_seed(0), device=device), steps=1)


def _smaller(numbers: Preset) -> Preset:
    """Half the views of a step; the result's size stays as asked. Raises OutOfMemory when it is one view already."""
    if numbers.shape_batch == 1 and numbers.texture_batch == 1:
        raise OutOfMemory("One view at a time", needed=0, free=0, device="the GPU", hint="Use a smaller preset.")
    return replace(
        numbers, shape_batch=max(1, numbers.shape_batch // 2), texture_batch=max(1, numbers.texture_batch // 2)
    )
