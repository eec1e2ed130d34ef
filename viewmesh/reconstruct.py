"""The sentence of the whole library: prepare → generate → optimise → export. Files and clocks live here, not maths.

The command line runs `reconstruct`; the deployments run the same stages one by one.
"""

import json
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from viewmesh.choose import Choice, after_no_poses, choose
from viewmesh.errors import Cancelled, InputError, MissingModel, OptionError, PoseError
from viewmesh.export.preview import early_previews
from viewmesh.export.result import Reconstruction
from viewmesh.export.write import export
from viewmesh.generate import Made, generate, load_made, load_model, save_made
from viewmesh.nvdiffrec import fit
from viewmesh.nvdiffrec.presets import preset_for
from viewmesh.options import Options
from viewmesh.progress import Progress, never, silent
from viewmesh.refine import Refined, finish, posed_by_sfm, read_views, unposed_because, with_cameras
from viewmesh.refine import start as start_refining
from viewmesh.views.archive import load_viewset, save_viewset
from viewmesh.views.load import survey
from viewmesh.views.viewset import ViewSet
from viewmesh.weights.ready import DOWNLOADED, GENERATIVE, Places, licence_notes, readiness, revision, vram_bytes

CHECKPOINT_EVERY_S = 20.0
RESUME = ".resume"  # the folder beside the files of a run
SLICE_S = 2.0  # how long the fit runs before it looks whether somebody wants it to stop


@dataclass
class Stopwatch:
    """Seconds per stage, in the order the stages ran; kept in a file, from which those of a stopped run go on."""

    file: Path
    seconds: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.seconds = json.loads(self.file.read_text()) if self.file.exists() else {}

    @contextmanager
    def stage(self, name: str):
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began
            _whole(self.file, lambda file: file.write_text(json.dumps(self.seconds)))


@dataclass(frozen=True)
class Checkpoint:
    """What a stopped run leaves in its output folder so that `--resume` can go on."""

    folder: Path

    @property
    def views(self) -> Path:
        return self.folder / "views.safetensors"

    @property
    def generated(self) -> Path:
        """What a generative model made: the mesh and its Gaussians."""
        return self.folder / "generated.safetensors"

    @property
    def posed(self) -> Path:
        """The views with the cameras that the mesh is refined under, if they are others than `views` has."""
        return self.folder / "posed.safetensors"

    @property
    def fit(self) -> Path:
        return self.folder / "fit.safetensors"

    @property
    def choice(self) -> Path:
        return self.folder / "choice.json"

    @property
    def seconds(self) -> Path:
        return self.folder / "seconds.json"

    @property
    def options(self) -> Path:
        return self.folder / "options.json"

    def open(self, source: Path, options: Options, *, resume: bool) -> None:
        """Makes the folder, or checks that what lies there was made from the same input with the same options."""
        if resume:
            if not self.options.exists():
                raise InputError(
                    "There is nothing to resume here.",
                    file=str(self.folder.parent),
                    hint="Name the folder of a stopped run, or start again without --resume.",
                )
            if not self.is_of(source, options):
                raise InputError(
                    "The stopped run had another input or other options.",
                    file=str(self.folder.parent),
                    hint="Give the same as before, or start again without --resume.",
                )
            return
        self.clear()
        self.folder.mkdir(parents=True)
        self.options.write_text(_asked(source, options))

    def is_of(self, source: Path, options: Options) -> bool:
        """Whether what lies there was made from this input with these options."""
        return self.options.read_text() == _asked(source, options)

    def clear(self) -> None:
        if self.folder.exists():
            shutil.rmtree(self.folder)


def _asked(source: Path, options: Options) -> str:
    return json.dumps({"source": str(source.resolve()), "options": options.model_dump(mode="json")})


def lost_by_starting(source: Path, folder: Path, options: Options) -> str:
    """What of a stopped run is lost when another one starts in its folder, in a sentence; "" if nothing is."""
    checkpoint = Checkpoint(folder / RESUME)
    if not checkpoint.options.exists():
        return ""
    if not checkpoint.is_of(source, options):
        return f"{folder}: what a stopped run of another input or other options left there is removed."
    step = fit.steps_saved(checkpoint.fit)
    return f"{folder}: the stopped run starts anew; --resume would have gone on{f' at step {step}' if step else ''}."


def reconstruct(
    source: Path,
    folder: Path,
    options: Options = Options(),
    *,
    device: torch.device | str | None = None,
    weights: Places = DOWNLOADED,
    resume: bool = False,
    progress: Progress = silent,
    cancelled: Callable[[], bool] = never,
) -> dict[str, Path]:
    """A view set (folder or zip) in, the files of design.md's "Output" in `folder` out; returns them by name.

    weights: where a generative model's weights lie, by set, if not where `viewmesh weights download` puts them.
    Cancelled leaves a checkpoint in `folder`/.resume that the same call with resume=True goes on from.
    """
    device = best_device() if device is None else usable_device(device)
    checkpoint = Checkpoint(folder / RESUME)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.open(source, options, resume=resume)
    watch = Stopwatch(checkpoint.seconds)
    asked = {"progress": progress, "cancelled": cancelled}
    with watch.stage("prepare"):
        views, choice = prepare(source, options, checkpoint, device=device, weights=weights, **asked)
        options = options.for_model(choice.model)
    if choice.model == "nvdiffrec":
        with watch.stage("optimise"):
            made = Made(optimise(views, options, checkpoint, device=device, **asked), None)
    else:
        made, views = generated(views, options, checkpoint, watch, device=device, weights=weights, **asked)
    refined = None
    if options.refine and choice.model != "nvdiffrec":
        with watch.stage("refine"):
            refined = refine_or_keep(made, views, source, options, checkpoint, device=device, **asked)
            views = refined.views
            made = replace(made, mesh=refined.mesh, gaussians=refined.gaussians)
    result = Reconstruction(
        mesh=made.mesh,
        views=views,
        world_from_scene=views.world_from_scene,
        model=choice.model,
        preset=options.preset,
        seed=options.seed,
        seconds={**watch.seconds, **{f"generate.{part}": s for part, s in made.seconds.items()}},
        device=str(device),
        weights_revision=revision(choice.model, weights),
        licence_notes=licence_notes(choice.model),
        warnings=(*views.warnings, *made.warnings, *(refined.warnings if refined else ())),
        gaussians=made.gaussians,
        chosen_because=choice.because,
        refinement=refined.facts if refined else None,
        previews=early_previews(made.mesh, device),
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


def prepare(
    source: Path,
    options: Options,
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    weights: Places,
    progress: Progress,
    cancelled: Callable[[], bool],
) -> tuple[ViewSet, Choice]:
    """The checked, masked and (for an optimiser) posed views, and the model that will run on them; from the checkpoint
    when it has them already. Raises OptionError or MissingModel before any work if the model cannot run here."""
    if checkpoint.views.exists():
        views = load_viewset(checkpoint.views)
        return views, Choice(**json.loads(checkpoint.choice.read_text()))
    choice = chosen_model(source, options, device, weights)
    options.for_model(choice.model)
    try:
        views = read(source, options, choice, progress, cancelled)
    except PoseError as error:
        if options.model != "auto":
            raise
        if not can_generate(device, weights):
            error.hint = (
                f"{error.hint} The model trellis needs no cameras (viewmesh weights download trellis, and a GPU)."
            )
            raise
        choice = after_no_poses(str(error))
        views = read(source, options, choice, progress, cancelled)
    checkpoint.choice.write_text(json.dumps(vars(choice)))
    _whole(checkpoint.views, lambda file: save_viewset(views, file))
    return views, choice


def _whole(file: Path, write: Callable[[Path], object]) -> None:
    """The file is there when all of it is."""
    unfinished = file.with_suffix(".part")
    write(unfinished)
    unfinished.replace(file)


def chosen_model(source: Path, options: Options, device: torch.device, weights: Places) -> Choice:
    """Which model runs. Raises MissingModel for one that this installation cannot run, OptionError for an optimiser
    that is to do without cameras."""
    if options.model == "auto":
        count, cameras = survey(source, options.views)
        return choose(count, cameras, generative=can_generate(device, weights))
    if options.model == "nvdiffrec" and options.views.cameras == "none":
        raise OptionError("nvdiffrec needs cameras.", hint="Use cameras: auto, or the model trellis.")
    if options.model in GENERATIVE and not (state := readiness(options.model, weights)).ready:
        raise MissingModel(state.reason, hint=state.hint)
    return Choice(options.model)


def can_generate(device: torch.device, weights: Places) -> bool:
    """Whether trellis has its weights and a CUDA device with the memory for it; on a CPU it would take an hour."""
    if device.type != "cuda" or not readiness("trellis", weights).ready:
        return False
    return torch.cuda.mem_get_info(device)[0] >= vram_bytes("trellis", weights)


def read(source: Path, options: Options, choice: Choice, progress: Progress, cancelled: Callable[[], bool]) -> ViewSet:
    return read_views(source, options.for_model(choice.model), progress=progress, cancelled=cancelled)


def optimise(
    views: ViewSet,
    options: Options,
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    progress: Progress,
    cancelled: Callable[[], bool],
):
    """Fits mesh, material and light."""

    def begin() -> fit.State:
        generator = torch.Generator().manual_seed(options.seed)
        return fit.start(views, preset_for(options, views, device), generator, device=device, cancelled=cancelled)

    return fit.finish(fitted(begin, views, checkpoint, device=device, progress=progress, cancelled=cancelled))


def generated(
    views: ViewSet,
    options: Options,
    checkpoint: Checkpoint,
    watch: Stopwatch,
    *,
    device: torch.device,
    weights: Places,
    progress: Progress,
    cancelled: Callable[[], bool],
) -> tuple[Made, ViewSet]:
    """What the generative model makes, and the views with the cameras that it sees where it shall be refined; from the
    checkpoint when it has them. The model's memory is free when this returns."""
    if checkpoint.generated.exists():
        posed = load_viewset(checkpoint.posed) if checkpoint.posed.exists() else views
        return load_made(checkpoint.generated), posed
    with watch.stage("load"):
        model = load_model(options.model, device, weights)
    with watch.stage("generate"):
        made = generate(model, views, options, progress=progress, cancelled=cancelled)
    if options.refine:
        with watch.stage("refine"):
            posed = with_cameras(model, views)
            if posed is not views:
                _whole(checkpoint.posed, lambda file: save_viewset(posed, file))
            views = posed
    _whole(checkpoint.generated, lambda file: save_made(made, file))  # last: with it, all of this is done
    return made, views


def refine_or_keep(
    made: Made, views: ViewSet, source: Path, options: Options, checkpoint: Checkpoint, **hooks: Any
) -> Refined:
    """Under the cameras that there are; where the mesh has no place among those that the model sees, under those that
    structure from motion finds. As it came, with a warning, where neither helps."""
    refined = refine(made, views, options, checkpoint, **hooks)
    if not refined.look_again:
        return refined
    asked = {"progress": hooks["progress"], "cancelled": hooks["cancelled"]}
    try:
        views = posed_by_sfm(source, options, **asked)
    except InputError as error:
        return replace(refined, warnings=(*refined.warnings, unposed_because(error)))
    checkpoint.fit.unlink(missing_ok=True)  # of the other cameras
    _whole(checkpoint.posed, lambda file: save_viewset(views, file))
    return refine(made, views, options, checkpoint, **hooks)


def refine(
    made: Made,
    views: ViewSet,
    options: Options,
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    progress: Progress,
    cancelled: Callable[[], bool],
) -> Refined:
    """A generated mesh registered with the views and fitted to them; as it came where that is not possible."""
    hooks: dict[str, Any] = {"device": device, "progress": progress, "cancelled": cancelled}

    def begin() -> fit.State:
        return start_refining(made.mesh, views, options, preset_for(options, views, device), **hooks)

    return finish(fitted(begin, views, checkpoint, **hooks), views, made.gaussians)


def fitted(
    begin: Callable[[], fit.State],
    views: ViewSet,
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    progress: Progress,
    cancelled: Callable[[], bool],
) -> fit.State:
    """The state at its end, from the checkpoint where there is one; saved now and then, and when somebody wants it to
    stop."""
    state = fit.load(checkpoint.fit, views, device=device) if checkpoint.fit.exists() else begin()
    saved = time.monotonic()
    try:
        while not state.done:
            state, _ = fit.advance(state, seconds=SLICE_S, progress=progress, cancelled=cancelled)
            if time.monotonic() - saved > CHECKPOINT_EVERY_S:
                fit.save(state, checkpoint.fit)
                saved = time.monotonic()
    except Cancelled:
        fit.save(state, checkpoint.fit)
        raise
    return state
