"""The registry of models: what each is, whether it can run here, and the deployment that runs it.

A further model is one file in deployments/ and one entry in MODELS.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from serve_app.settings import AppArgs
from viewmesh.choose import Choice, choose
from viewmesh.errors import MissingModel
from viewmesh.options import Options
from viewmesh.weights import ready as weights
from viewmesh.weights.ready import Readiness


@dataclass(frozen=True)
class Model:
    """kind: an `optimiser` works in slices, a `generator` in one call. deployment: the worker's, which models may
    share; bind: args → the worker's application. fields: the options that mean something to it."""

    name: str
    deployment: str
    kind: Literal["optimiser", "generator"]
    description: str
    licence: str
    vram_bytes: int
    fields: tuple[str, ...]
    bind: Callable[[AppArgs], Any]

    def readiness(self, args: AppArgs) -> Readiness:
        """Whether this service runs the model. Named in args.models it does: its nodes have what it needs, also where
        this one has not."""
        if args.models is not None:
            hint = "Name it in args.models of the service's configuration."
            served = self.name in args.models
            return Readiness(True) if served else Readiness(False, f"This service does not run {self.name}.", hint)
        if self.kind == "optimiser":
            return Readiness(True)
        if args.fake:  # a dry run has no model but the fake one
            missing = f"The weights of {self.name} are not installed."
            return Readiness(False, missing, f"viewmesh weights download {self.name}")
        return weights.readiness(self.name, args.weights)


NONE: Mapping[str, Any] = MappingProxyType({})
COMMON = ("model", "preset", "seed", "target_faces", "texture_size", "formats", "views")
GENERATIVE = (*COMMON, "refine", "steps", "cfg", "multiimage_mode")
GENERATOR = "deployments.adapters.trellis:LibraryGenerator"


def _nvdiffrec(args: AppArgs) -> Any:
    from deployments.nvdiffrec import Nvdiffrec

    if args.fake:
        engine, engine_args = "deployments.fakes:FakeOptimiser", args.fake.model_dump()
    else:
        engine, engine_args = "deployments.adapters.nvdiffrec:NvdiffrecOptimiser", {"device": args.device}
    return Nvdiffrec.bind(args.artifacts_url(), engine, engine_args)


def _generative(args: AppArgs) -> Any:
    """One worker for all generative models; which of them it holds is its user_config's to say."""
    from deployments.trellis import Trellis

    engine_args = {"device": args.device, "weights": args.weights}
    models = [model.name for model in served(args).values() if model.kind == "generator"]
    return Trellis.bind(args.artifacts_url(), GENERATOR, engine_args, models)


MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model(
            "nvdiffrec",
            "Nvdiffrec",
            "optimiser",
            "Fits the topology, PBR material and light of one mesh to posed views by differentiable rendering.",
            "Apache-2.0",
            0,
            COMMON,
            _nvdiffrec,
        ),
        Model(
            "trellis",
            "Trellis",
            "generator",
            "TRELLIS-image-large, several views by stochastic or multidiffusion sampling.",
            "MIT (TRELLIS), Apache-2.0 (DINOv2)",
            16 * 2**30,
            GENERATIVE,
            _generative,
        ),
        Model(
            "reconviagen",
            "Trellis",
            "generator",
            "TRELLIS conditioned on VGGT multi-view features.",
            "its weights are to be treated as non-commercial",
            18 * 2**30,
            tuple(name for name in GENERATIVE if name != "multiimage_mode"),
            _generative,
        ),
    )
}


def served(args: AppArgs) -> dict[str, Model]:
    """The models that this service runs."""
    return {name: model for name, model in MODELS.items() if model.readiness(args).ready}


def workers(args: AppArgs) -> dict[str, Any]:
    """The application of each served model's worker; models that share a worker share its application."""
    bound: dict[str, Any] = {}
    models = served(args)
    for model in models.values():
        if model.deployment not in bound:
            bound[model.deployment] = model.bind(args)
    return {name: bound[model.deployment] for name, model in models.items()}


def resolve(
    options: Options, args: AppArgs, files: Iterable[str], broken: Mapping[str, Readiness] = NONE
) -> tuple[Model, str]:
    """The model that a job will run on, and why: a clause for people, "" where the caller named the model.

    files: their names in the view set, which is what `auto` goes by; what lies in an archive is not looked at here.
    broken: models that are served and have no worker, and why; `auto` does without them, a job that names one waits.
    Raises MissingModel, OptionError.
    """
    choice = Choice(options.model) if options.model != "auto" else _chosen(options, args, list(files), broken)
    model = MODELS[choice.model]
    state = model.readiness(args)
    if not state.ready:
        raise MissingModel(state.reason, hint=state.hint)
    options.for_model(choice.model)
    if options.refine and model.kind == "generator" and "nvdiffrec" not in served(args):
        raise MissingModel(
            "Refining a mesh needs nvdiffrec, which this service does not run.", hint="Leave out refine, or serve it."
        )
    return model, choice.because


def _chosen(options: Options, args: AppArgs, files: list[str], broken: Mapping[str, Readiness]) -> Choice:
    views = sum(file.startswith("views/") for file in files)
    generative = "trellis" in served(args) and "trellis" not in broken
    source = _camera_source(options, files)
    if not views and options.views.cameras == "auto" and options.views.rig is None:
        return Choice("nvdiffrec", "views in an archive are taken to come with cameras")
    try:
        return choose(views or 64, source, generative=generative)
    except MissingModel as error:
        if "trellis" not in broken:
            raise
        state = broken["trellis"]
        raise MissingModel(f"{error} {state.reason}", hint=state.hint) from error


def _camera_source(options: Options, files: list[str]) -> Any:
    rules = options.views
    if rules.cameras != "auto":
        return None if rules.cameras == "none" else rules.cameras
    if any(file.endswith(".json") for file in files):
        return "file"
    return rules.rig or "sfm"


def options_schema(model: Model) -> dict[str, Any]:
    """The JSON schema of Options, with only what this model reads."""
    schema = Options.model_json_schema()
    schema["properties"] = {name: value for name, value in schema["properties"].items() if name in model.fields}
    return schema
