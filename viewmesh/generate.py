"""A generative model from views to a textured mesh: load it, run it, texture what it made.

The one place that knows both generative models; `reconstruct` and the deployment run it. What the weights are and where
they lie is viewmesh.weights' business.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from viewmesh.errors import MissingModel, ViewmeshError
from viewmesh.geometry.gaussians import Gaussians
from viewmesh.geometry.mesh import Mesh, TexturedMesh
from viewmesh.geometry.meshfile import load_gaussians, load_mesh, load_notes, load_plain, save_mesh, save_plain
from viewmesh.options import GAUSSIAN_PLY, Options
from viewmesh.progress import Progress, never, silent
from viewmesh.trellis.batch import Request, going_on, room
from viewmesh.trellis.loading import Loaded
from viewmesh.trellis.pipeline import WORKSPACE_BYTES, Generated, GenerateOptions, Structured, Trellis
from viewmesh.trellis.reconviagen import ReconViaGen
from viewmesh.trellis.texturing import STEPS as TEXTURE_STEPS
from viewmesh.trellis.texturing import texture
from viewmesh.views.viewset import ViewSet
from viewmesh.weights.ready import DOWNLOADED, Places, encoder_in, place, readiness

Model = Trellis | ReconViaGen


@dataclass(frozen=True)
class Draft:
    """What the networks made: dense, untextured, on the model's device. seconds: per part."""

    mesh: Mesh
    gaussians: Gaussians | None
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Made:
    """A textured mesh in the scene frame (+y up, within the unit cube), and the Gaussians if the options name them."""

    mesh: TexturedMesh
    gaussians: Gaussians | None
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def load_model(
    name: str, device: torch.device | str, places: Places = DOWNLOADED, loaded: Loaded | None = None
) -> Model:
    """The networks of `trellis` or `reconviagen` on a device. loaded: what it may share with a model that is there.

    Raises MissingModel with the command that helps, InputError for damaged files, OutOfMemory before it allocates.
    """
    state = readiness(name, places)
    if not state.ready:
        raise MissingModel(state.reason, hint=state.hint)
    dino = encoder_in(Path(places["dinov2"])) if "dinov2" in places else None
    if name == "trellis":
        return Trellis.load(place("trellis", places), device=device, dino=dino, loaded=loaded)
    return ReconViaGen.load(
        place("reconviagen", places), vggt=place("vggt-object", places), device=device, dino=dino, loaded=loaded
    )


def generate(
    model: Model,
    views: ViewSet,
    options: Options,
    *,
    progress: Progress = silent,
    cancelled: Callable[[], bool] = never,
) -> Made:
    """Progress counts all steps of both samplers, the mesh and the texture as one stage, `generate`."""
    drafted = draft(model, views, options, progress=progress, cancelled=cancelled)
    return finish(drafted, options, progress=progress, cancelled=cancelled, total=total_steps(model, options))


def draft(
    model: Model,
    views: ViewSet,
    options: Options,
    *,
    progress: Progress = silent,
    cancelled: Callable[[], bool] = never,
) -> Draft:
    """What needs the device: the networks. Same seed, same device: same draft."""
    (made,) = draft_together(model, [Begun(look(model, views, options, progress=progress, cancelled=cancelled))])
    if isinstance(made, ViewmeshError):
        raise made
    return made


@dataclass(frozen=True)
class Looked:
    """A request before the samplers run. tokens: what TRELLIS' encoder saw; ReconViaGen's encoder runs with the rest.

    company: those whose company is equal may be drafted together; None runs alone.
    """

    views: ViewSet
    options: Options
    sampling: GenerateOptions
    tokens: Tensor | None
    company: Hashable
    progress: Progress
    cancelled: Callable[[], bool]
    seconds: dict[str, float]
    warnings: tuple[str, ...]


def look(
    model: Model,
    views: ViewSet,
    options: Options,
    *,
    progress: Progress = silent,
    cancelled: Callable[[], bool] = never,
) -> Looked:
    """What may run beside another request's samplers: preparing the images and, for TRELLIS, encoding them."""
    chosen, total = sampler_options(model, options), total_steps(model, options)
    views, warnings = few_enough(views, model, chosen)
    done = {"structure": 0, "latents": chosen.structure.steps, "mesh": chosen.structure.steps + chosen.latents.steps}

    def overall(stage: str, step: int, steps: int, **metrics: float) -> None:
        progress("generate", done.get(stage, 0) + step, total, **metrics)

    began, tokens, company = time.perf_counter(), None, None
    if isinstance(model, Trellis):
        tokens = model.encode(views.images, cancelled)
        if chosen.multiimage == "stochastic" or len(views) == 1:
            company = (chosen.structure, chosen.latents)
    seconds = {"encode": time.perf_counter() - began} if tokens is not None else {}
    return Looked(views, options, chosen, tokens, company, overall, cancelled, seconds, warnings)


@dataclass(frozen=True)
class Begun:
    """A request half-way: TRELLIS' voxels are known, and where its noise goes on. Nothing of ReconViaGen's is yet."""

    call: Looked
    structured: Structured | None = None
    noise: Tensor | None = None  # state of the generator


def begin_together(model: Model, calls: Sequence[Looked]) -> list[Begun | ViewmeshError]:
    """The first half of the drafts of requests of one company, in order; an error of one is its own. Raises what is
    nobody's own."""
    if not isinstance(model, Trellis):
        return [Begun(call) for call in calls]
    requests = [_request(call, seeded(call)) for call in calls]
    made = model.structure_batch(requests, _sampling(calls))
    return [
        one if isinstance(one, ViewmeshError) else Begun(call, one, request.generator.get_state())
        for call, one, request in zip(calls, made, requests, strict=True)
    ]


def draft_together(model: Model, begun: Sequence[Begun]) -> list[Draft | ViewmeshError]:
    """The second half, of requests of one company that need not have begun together; both of those that have not."""
    calls = [one.call for one in begun]
    made: list[Generated | ViewmeshError] = []
    if isinstance(model, Trellis):
        halves = [(one, one.structured, one.noise) for one in begun if one.structured is not None]
        if len(halves) < len(begun):
            return going_on(begin_together(model, calls), lambda going: draft_together(model, going))
        requests = [_request(one.call, _going_on(noise)) for one, _, noise in halves]
        made = model.latent_batch(requests, [structured for _, structured, _ in halves], _sampling(calls))
    else:
        for call in calls:
            try:
                hooks = {"generator": seeded(call), "progress": call.progress, "cancelled": call.cancelled}
                made.append(model.generate(call.views.images, call.sampling, **hooks))
            except ViewmeshError as error:
                made.append(error)
    return [
        one if isinstance(one, ViewmeshError)
        else Draft(one.mesh, one.gaussians, {**call.seconds, **one.seconds}, (*call.warnings, *one.warnings))
        for call, one in zip(calls, made, strict=True)
    ]  # fmt: skip


def fit_together(device: torch.device) -> int:
    """How many requests the device's free memory holds at once, at least one."""
    return room(device, WORKSPACE_BYTES)


def seeded(call: Looked) -> torch.Generator:
    return torch.Generator().manual_seed(call.options.seed)


def _going_on(noise: Tensor | None) -> torch.Generator:
    """Where it was, however often the second half is tried."""
    generator = torch.Generator()
    if noise is not None:
        generator.set_state(noise)
    return generator


def _request(call: Looked, generator: torch.Generator) -> Request:
    assert call.tokens is not None
    return Request(call.tokens, generator, call.sampling.gaussians, call.progress, call.cancelled)


def _sampling(calls: Sequence[Looked]) -> GenerateOptions:
    """One view each is the same in every mode."""
    return calls[0].sampling if len(calls) == 1 else replace(calls[0].sampling, multiimage="stochastic")


def finish(
    drafted: Draft,
    options: Options,
    *,
    progress: Progress = silent,
    cancelled: Callable[[], bool] = never,
    total: int = TEXTURE_STEPS,
) -> Made:
    """What needs no networks: cleaning, simplifying, the atlas, its textures. total: steps of the stage `generate`."""

    def overall(stage: str, step: int, steps: int, **metrics: float) -> None:
        progress("generate", total - steps + step, total, **metrics)

    began = time.perf_counter()
    textured = texture(
        drafted.mesh, target_faces=options.target_faces, texture_size=options.texture_size, progress=overall,
        cancelled=cancelled,
    )  # fmt: skip
    seconds = {**drafted.seconds, "texture": time.perf_counter() - began}
    return Made(textured.mesh, drafted.gaussians, seconds, drafted.warnings)


def save_draft(draft: Draft, path: Path) -> None:
    """For whoever finishes it, in another process too."""
    save_plain(draft.mesh, path, draft.gaussians, {"seconds": draft.seconds, "warnings": draft.warnings})


def load_draft(path: Path, device: torch.device | str) -> Draft:
    """The mesh on the device; the Gaussians, which only pass by, on the CPU."""
    notes = load_notes(path)
    return Draft(load_plain(path, device), load_gaussians(path), notes["seconds"], tuple(notes["warnings"]))


def save_made(made: Made, path: Path) -> None:
    """Device and all else of the model are left behind."""
    save_mesh(made.mesh, path, made.gaussians, {"seconds": made.seconds, "warnings": made.warnings})


def load_made(path: Path) -> Made:
    notes = load_notes(path)
    return Made(load_mesh(path), load_gaussians(path), notes["seconds"], tuple(notes["warnings"]))


def sampler_options(model: Model, options: Options):
    wishes = {"steps": options.steps, "cfg": options.cfg, "gaussians": GAUSSIAN_PLY in options.formats}
    if isinstance(model, Trellis):
        return model.options(**wishes, multiimage=options.multiimage_mode)
    return model.options(**wishes)


def total_steps(model: Model, options: Options) -> int:
    chosen = sampler_options(model, options)
    return chosen.structure.steps + chosen.latents.steps + 1 + TEXTURE_STEPS


def few_enough(views: ViewSet, model: Model, options: GenerateOptions) -> tuple[ViewSet, tuple[str, ...]]:
    """At most as many views as the model looks at, evenly picked: the samplers alone would see the first ones."""
    most, why = 32, "reconviagen takes no more"
    if isinstance(model, Trellis):
        most, why = 64, "trellis takes no more"
        steps = max(options.structure.steps, options.latents.steps)
        if options.multiimage == "stochastic" and steps < most:
            most, why = steps, "trellis looks at one view per step"
    if len(views) <= most:
        return views, ()
    index = torch.linspace(0, len(views) - 1, most).round().long().tolist()
    return views.select(index), (f"{most} of the {len(views)} views are used, evenly spaced: {why}.",)
