"""The sentence of the whole library: prepare → generate → optimise → export. Files and clocks live here, not maths.

The command line runs `reconstruct`; the deployments run the same stages one by one.
"""

import json
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from viewmesh.errors import InputError, MissingModel, OptionError
from viewmesh.export.result import Reconstruction
from viewmesh.export.write import export
from viewmesh.nvdiffrec import fit
from viewmesh.nvdiffrec.presets import preset
from viewmesh.options import Options
from viewmesh.progress import Progress, check, never, silent
from viewmesh.views.archive import load_viewset, save_viewset
from viewmesh.views.load import load_views
from viewmesh.views.viewset import ViewSet

CHECKPOINT_EVERY_S = 20.0
SLICE_S = 2.0  # how long the fit runs before it looks whether somebody wants it to stop


@dataclass
class Stopwatch:
    """Seconds per stage, in the order the stages ran."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str):
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began


@dataclass(frozen=True)
class Checkpoint:
    """What a stopped run leaves in its output folder so that `--resume` can go on."""

    folder: Path

    @property
    def views(self) -> Path:
        return self.folder / "views.safetensors"

    @property
    def fit(self) -> Path:
        return self.folder / "fit.safetensors"

    @property
    def options(self) -> Path:
        return self.folder / "options.json"

    def open(self, source: Path, options: Options, *, resume: bool) -> None:
        """Makes the folder, or checks that what lies there was made from the same input with the same options."""
        asked = {"source": str(source.resolve()), "options": options.model_dump(mode="json")}
        if resume:
            if not self.options.exists():
                raise InputError(
                    "There is nothing to resume here.",
                    file=str(self.folder.parent),
                    hint="Name the folder of a stopped run, or start again without --resume.",
                )
            if self.options.read_text() != json.dumps(asked):
                raise InputError(
                    "The stopped run had another input or other options.",
                    file=str(self.folder.parent),
                    hint="Give the same as before, or start again without --resume.",
                )
            return
        self.clear()
        self.folder.mkdir(parents=True)
        self.options.write_text(json.dumps(asked))

    def clear(self) -> None:
        if self.folder.exists():
            shutil.rmtree(self.folder)


def reconstruct(
    source: Path,
    folder: Path,
    options: Options = Options(),
    *,
    device: torch.device | str | None = None,
    resume: bool = False,
    progress: Progress = silent,
    cancelled: Callable[[], bool] = never,
) -> dict[str, Path]:
    """A view set (folder or zip) in, the files of design.md's "Output" in `folder` out; returns them by name.

    Cancelled leaves a checkpoint in `folder`/.resume that the same call with resume=True goes on from.
    """
    device = best_device() if device is None else usable_device(device)
    model = chosen_model(options)
    watch = Stopwatch()
    checkpoint = Checkpoint(folder / ".resume")
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.open(source, options, resume=resume)
    with watch.stage("prepare"):
        views = prepare(source, options, checkpoint, progress=progress, cancelled=cancelled)
    with watch.stage("optimise"):
        mesh = optimise(views, options, checkpoint, device=device, progress=progress, cancelled=cancelled)
    result = Reconstruction(
        mesh=mesh,
        views=views,
        world_from_scene=views.world_from_scene,
        model=model,
        preset=options.preset,
        seed=options.seed,
        seconds=watch.seconds,
        device=str(device),
        warnings=views.warnings,
    )
    files = export(result, folder, options.formats, progress=progress)
    checkpoint.clear()
    return files


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def usable_device(name: torch.device | str) -> torch.device:
    """Raises OptionError for a device that is not here."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        raise OptionError(f"There is no device {name} here.", hint="Take cpu, or cuda where there is one.") from error
    return device


def chosen_model(options: Options) -> str:
    """Which model runs. Raises MissingModel for one that this installation cannot run."""
    if options.model in ("auto", "nvdiffrec"):
        return "nvdiffrec"
    raise MissingModel(
        f"The model {options.model} is not installed here.", hint=f"viewmesh weights download {options.model}"
    )


def prepare(
    source: Path, options: Options, checkpoint: Checkpoint, *, progress: Progress, cancelled: Callable[[], bool]
) -> ViewSet:
    """The checked, posed, masked and normalised views; from the checkpoint when it has them already."""
    if checkpoint.views.exists():
        return load_viewset(checkpoint.views)
    views = load_views(source, options.views, progress=progress, cancelled=cancelled)
    unfinished = checkpoint.views.with_suffix(".part")
    save_viewset(views, unfinished)
    unfinished.replace(checkpoint.views)
    return views


def optimise(
    views: ViewSet,
    options: Options,
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    progress: Progress,
    cancelled: Callable[[], bool],
):
    """Fits mesh, material and light, writing a checkpoint now and then and when it is stopped."""
    if checkpoint.fit.exists():
        state = fit.load(checkpoint.fit, views, device=device)
    else:
        numbers = preset(
            options.preset, device, target_faces=options.target_faces, texture_size=options.texture_size,
            refine_cameras=views.camera_source == "sfm",
        )  # fmt: skip
        state = fit.start(views, numbers, torch.Generator().manual_seed(options.seed), device=device)
    saved = time.monotonic()
    while not state.done:
        state, _ = fit.advance(state, seconds=SLICE_S, progress=progress)
        stopping = cancelled()
        if stopping or time.monotonic() - saved > CHECKPOINT_EVERY_S:
            fit.save(state, checkpoint.fit)
            saved = time.monotonic()
        if stopping:
            check(cancelled)
    return fit.finish(state)
