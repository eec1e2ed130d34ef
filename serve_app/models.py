"""The registry of models: what each is, whether it can run here, and the deployment that runs it.

A further model is one file in deployments/ and one entry in MODELS.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from serve_app.settings import AppArgs
from viewmesh.errors import MissingModel
from viewmesh.options import Options


@dataclass(frozen=True)
class Readiness:
    ready: bool
    reason: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Model:
    """kind: an `optimiser` works in slices, a `generator` in one call. bind: args → the application of its worker, or
    None while there is none. fields: the options that mean something to it."""

    name: str
    kind: Literal["optimiser", "generator"]
    description: str
    licence: str
    vram_bytes: int
    fields: tuple[str, ...]
    bind: Callable[[AppArgs], Any] | None
    readiness: Callable[[], Readiness]


COMMON = ("model", "preset", "seed", "target_faces", "texture_size", "formats", "views")
GENERATIVE = (*COMMON, "refine", "steps", "cfg", "multiimage_mode")


def _nvdiffrec(args: AppArgs) -> Any:
    from deployments.nvdiffrec import Nvdiffrec

    if args.fake:
        engine, engine_args = "deployments.fakes:FakeOptimiser", args.fake.model_dump()
    else:
        engine, engine_args = "deployments.adapters.nvdiffrec:NvdiffrecOptimiser", {"device": args.device}
    return Nvdiffrec.bind(args.artifacts_url(), engine, engine_args)


def _weights(name: str) -> Callable[[], Readiness]:
    def readiness() -> Readiness:
        return Readiness(False, f"The weights of {name} are not installed.", f"viewmesh weights download {name}")

    return readiness


MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model(
            "nvdiffrec",
            "optimiser",
            "Fits the topology, PBR material and light of one mesh to posed views by differentiable rendering.",
            "Apache-2.0",
            0,
            COMMON,
            _nvdiffrec,
            lambda: Readiness(True),
        ),
        Model(
            "trellis",
            "generator",
            "TRELLIS-image-large, several views by stochastic or multidiffusion sampling.",
            "MIT (TRELLIS), Apache-2.0 (DINOv2)",
            16 * 2**30,
            GENERATIVE,
            None,
            _weights("trellis"),
        ),
        Model(
            "reconviagen",
            "generator",
            "TRELLIS conditioned on VGGT multi-view features.",
            "its weights are to be treated as non-commercial",
            18 * 2**30,
            GENERATIVE,
            None,
            _weights("reconviagen"),
        ),
    )
}


def resolve(name: str) -> Model:
    """The model that a job will run on; `auto` is the first that is ready. Raises MissingModel."""
    if name == "auto":
        name = next((model.name for model in MODELS.values() if model.readiness().ready), "nvdiffrec")
    model = MODELS[name]
    state = model.readiness()
    if model.bind is None or not state.ready:
        raise MissingModel(state.reason or f"The model {name} is not part of this service.", hint=state.hint)
    return model


def options_schema(model: Model) -> dict[str, Any]:
    """The JSON schema of Options, with only what this model reads."""
    schema = Options.model_json_schema()
    schema["properties"] = {name: value for name, value in schema["properties"].items() if name in model.fields}
    return schema
