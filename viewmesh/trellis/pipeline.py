"""TRELLIS: one or several photos of an object to a mesh. START HERE.

    trellis = Trellis.load("weights/TRELLIS-image-large", device="cuda")
    result = trellis.generate(images, generator=torch.Generator().manual_seed(1))
    result.mesh            # +y up, in [-0.5, 0.5]³, with vertex colours

generate: preprocess → encode → structure (which voxels) → latents (what is in them) → mesh. Xiang et al. 2024,
"Structured 3D Latents for Scalable and Versatile 3D Generation". Knows nothing of downloads, textures or services.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

import torch
from PIL import Image
from torch import Tensor

from viewmesh.errors import Cancelled, InputError, OptionError, ViewmeshError
from viewmesh.geometry.camera import Y_UP_FROM_Z_UP
from viewmesh.geometry.flexicubes import FlexiMesh
from viewmesh.geometry.mesh import Mesh
from viewmesh.progress import Progress, check, never, silent
from viewmesh.render.shading import srgb_to_linear
from viewmesh.trellis import checkpoint, stages
from viewmesh.trellis.batch import Batch, Request, going_on, groups, sample_latents, sample_structures
from viewmesh.trellis.decoders import Gaussians
from viewmesh.trellis.loading import (
    Loaded,
    encoder_file,
    load_encoder,
    load_networks,
    network_stem,
    require_room,
    weights_folder,
    weights_of,
)
from viewmesh.trellis.preprocess import image_tensor, trellis_image
from viewmesh.trellis.samplers import SamplerOptions, Velocity
from viewmesh.trellis.sparse import Voxels
from viewmesh.trellis.vit import DinoVisionTransformer, image_condition
from viewmesh.trellis.warm import compile_flows, record_encoder, record_structure
from viewmesh.weights.manifest import TRELLIS

S = TypeVar("S")
R = TypeVar("R")
Images = Sequence[Image.Image] | Tensor
MultiImage = Literal["stochastic", "multidiffusion"]
ENCODED_AT_ONCE = 4  # views
WORKSPACE_BYTES = 2 << 30  # activations of one request at 64³ with about 12,000 voxels, measured
RECORDED = 4  # requests at once that the structure flow is recorded for


@dataclass(frozen=True)
class GenerateOptions:
    """structure, latents: the two samplers. multiimage: how several views are combined."""

    structure: SamplerOptions
    latents: SamplerOptions
    multiimage: MultiImage = "stochastic"
    gaussians: bool = False


@dataclass(frozen=True)
class Generated:
    """mesh: +y up in [-0.5, 0.5]³, linear vertex colours. gaussians: in the same frame, if asked for.

    seconds: wall time of encode, structure, latents, mesh and (if any) gaussians; of a batch, as long as all took.
    """

    mesh: Mesh
    gaussians: Gaussians | None
    voxels: int
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Structured:
    """Between the two halves: the active voxels. seconds: as in Generated, so far."""

    voxels: Voxels
    seconds: dict[str, float]


@dataclass(frozen=True)
class Trellis:
    """The networks of TRELLIS-image-large on one device. Immutable: calls may run concurrently."""

    networks: stages.Networks
    encoder: DinoVisionTransformer
    defaults: GenerateOptions
    load_seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        weights: Path | str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        dino: Path | str | None = None,
        loaded: Loaded | None = None,
    ) -> "Trellis":
        """weights: a folder in the official layout, or a repository that `viewmesh weights download` has fetched.

        dtype: of the torsos; None is the checkpoint's own (half precision on CUDA, float32 on the CPU).
        dino: the DINOv2 file, if it lies elsewhere. loaded: what this model may share with others. Raises MissingModel,
        InputError (a file that is not what it should be) and OutOfMemory (before allocating).
        """
        device, clock, loaded = torch.device(device), Stopwatch(torch.device(device)), loaded or Loaded()
        config = checkpoint.read_pipeline(weights_folder(weights))
        encoder_weights = encoder_file(config, dino)
        files = [weights_of(network_stem(config, role)) for role in TRELLIS.roles]
        require_room(config.root.name, files, encoder_weights, WORKSPACE_BYTES, device, dtype, loaded)
        with clock("networks"):
            networks = load_networks(config, device, dtype, loaded)
        with clock("encoder"):
            encoder = load_encoder(encoder_weights, device, loaded)
        return cls(networks, encoder, default_options(config), clock.seconds)

    @property
    def device(self) -> torch.device:
        return self.networks.device

    def options(
        self,
        *,
        steps: int | None = None,
        cfg: float | None = None,
        multiimage: MultiImage = "stochastic",
        gaussians: bool = False,
    ) -> GenerateOptions:
        """The defaults with a caller's wishes; `cfg` is the strength of both stages."""
        return with_wishes(self.defaults, steps, cfg, multiimage, gaussians)

    def warm(self, *, multidiffusion: bool = False, batches: bool = False) -> dict[str, float]:
        """Compiles the flow networks and records what has one size (CUDA only); seconds by part. Calls before it ends
        work, slower.

        multidiffusion, batches: compile for that mode of several views, and for generate_batch, too; they run
        uncompiled otherwise.
        """
        tokens = self.encoder.tokens
        condition = torch.zeros(tokens, self.networks.structure_flow.cond_channels, device=self.device)
        return {
            **compile_flows(self.networks, tokens=tokens, passes=multidiffusion, batches=batches),
            **record_encoder(self.encoder, ENCODED_AT_ONCE),
            **record_structure(self.networks, condition, RECORDED if batches else 1),
        }

    @torch.no_grad()
    def generate(
        self,
        images: Images,
        options: GenerateOptions | None = None,
        *,
        generator: torch.Generator | None = None,
        progress: Progress = silent,
        cancelled: Callable[[], bool] = never,
    ) -> Generated:
        """images: PIL images whose alpha is the object's mask, or (N, H, W, 4) uint8; 1 to 64 of them.

        generator: a CPU generator gives the same noise on every device; default seed 0.
        Raises InputError, EmptyReconstruction, Cancelled.
        """
        options, generator = options or self.defaults, generator or torch.Generator().manual_seed(0)
        clock = Stopwatch(self.device)
        with clock("encode"):
            condition = self.encode(images, cancelled)
        return self._generate(Request(condition, generator, options.gaussians, progress, cancelled), options, clock)

    @torch.no_grad()
    def structure_batch(
        self, requests: Sequence[Request], options: GenerateOptions | None = None
    ) -> "list[Structured | ViewmeshError]":
        """The first half of what each request gives alone, in order, made together where that saves time: not by
        multidiffusion, whose passes fill the device. An error of one is its result and harms no other.
        `options.gaussians` is not read.

        See batch.room for how many fit. Raises what is nobody's own, such as torch's OutOfMemoryError.
        """
        options = options or self.defaults
        batch = Batch(requests, list(range(len(requests))))
        made: dict[int, Structured] = {}
        if _apart(requests, options):
            made = batch.each(lambda i: self._structured(requests[i], options, Stopwatch(self.device)))
        else:
            clock = Stopwatch(self.device)
            with suppress(Cancelled):  # all of them were
                with clock("structure"):
                    voxels = sample_structures(self.networks, batch, options.structure)
                made = {i: Structured(voxels[i], dict(clock.seconds)) for i in voxels}
        return [made[i] if i in made else batch.outcomes[i] for i in range(len(requests))]

    @torch.no_grad()
    def latent_batch(
        self, requests: Sequence[Request], structured: "Sequence[Structured]", options: GenerateOptions | None = None
    ) -> list[Generated | ViewmeshError]:
        """The second half, for requests that need not have been together before."""
        options = options or self.defaults
        batch = Batch(requests, list(range(len(requests))))
        if _apart(requests, options):
            made = batch.each(
                lambda i: self._generated(
                    requests[i], structured[i].voxels, options, Stopwatch(self.device, dict(structured[i].seconds))
                )
            )
        else:
            made = self._generated_together(batch, structured, options)
        return [made[i] if i in made else batch.outcomes[i] for i in range(len(requests))]

    def generate_batch(
        self, requests: Sequence[Request], options: GenerateOptions | None = None
    ) -> list[Generated | ViewmeshError]:
        """Both halves, one after the other."""
        options = options or self.defaults

        def second(going: "list[tuple[Request, Structured]]") -> list[Generated | ViewmeshError]:
            return self.latent_batch([request for request, _ in going], [one for _, one in going], options)

        begun = [
            one if isinstance(one, ViewmeshError) else (request, one)
            for request, one in zip(requests, self.structure_batch(requests, options), strict=True)
        ]
        return going_on(begun, second)

    def _generate(self, request: Request, options: GenerateOptions, clock: "Stopwatch") -> Generated:
        structured = self._structured(request, options, clock)
        return self._generated(request, structured.voxels, options, clock)

    def _structured(self, request: Request, options: GenerateOptions, clock: "Stopwatch") -> "Structured":
        velocity: Velocity = VIEW_MODES[options.multiimage](self.networks.structure_flow, request.condition)
        hooks = request.generator, request.progress, request.cancelled
        with clock("structure"):
            voxels = stages.sample_structure(self.networks, velocity, options.structure, *hooks)
        return Structured(voxels, dict(clock.seconds))

    def _generated(self, request: Request, voxels: Voxels, options: GenerateOptions, clock: "Stopwatch") -> Generated:
        hooks = request.generator, request.progress, request.cancelled
        with clock("latents"):
            velocity = VIEW_MODES[options.multiimage](self.networks.latent_flow, request.condition, voxels)
            latents = stages.sample_latents(self.networks, voxels, velocity, options.latents, *hooks)
        return self._decoded(latents, request, options, clock)

    def _generated_together(
        self, batch: Batch, structured: "Sequence[Structured]", options: GenerateOptions
    ) -> dict[int, Generated]:
        made: dict[int, Generated] = {}
        voxels = {i: structured[i].voxels for i in batch.here}
        for group in groups(batch.here, voxels):
            part, watch = Batch(batch.requests, group, batch.outcomes), Stopwatch(self.device)
            with suppress(Cancelled):
                with watch("latents"):
                    latents = sample_latents(self.networks, part, voxels, options.latents)
                made |= part.each(
                    lambda i, of=latents, so_far=watch.seconds: self._decoded(
                        of[i], batch.requests[i], options,
                        Stopwatch(self.device, {**structured[i].seconds, **so_far}),
                    )
                )  # fmt: skip
        return made

    def _decoded(
        self, latents: "stages.SparseTensor", request: Request, options: GenerateOptions, clock: "Stopwatch"
    ) -> Generated:
        warnings = unseen_views(len(request.condition), options)
        return decoded(
            self.networks, latents, request.gaussians, clock, request.progress, request.cancelled, warnings
        )  # fmt: skip

    @torch.no_grad()
    def encode(self, images: Images, cancelled: Callable[[], bool] = never) -> Tensor:
        """Condition tokens (N, T, 1024) float32; images are prepared in threads and encoded a few at a time."""

        def prepared(named: tuple[str, Image.Image]) -> Tensor:
            return image_tensor(trellis_image(named[1], size=self.encoder.image_size, name=named[0]))

        pixels = torch.stack(in_threads(prepared, as_images(images)))
        tokens = []
        for part in pixels.split(ENCODED_AT_ONCE):
            check(cancelled)
            tokens.append(image_condition(self.encoder, part.to(self.device)))
        return torch.cat(tokens)


VIEW_MODES: dict[str, Callable[..., Velocity]] = {
    "stochastic": stages.stochastic_views,
    "multidiffusion": stages.multidiffusion_views,
}


def in_threads(function: Callable[[S], R], values: Sequence[S]) -> list[R]:
    """The results in order; image libraries work outside the interpreter's lock."""
    with ThreadPoolExecutor(min(8, len(values))) as pool:
        return list(pool.map(function, values))


def _apart(requests: Sequence[Request], options: GenerateOptions) -> bool:
    return len(requests) == 1 or options.multiimage != "stochastic"


class Stopwatch:
    """Seconds per part; waits at both ends for what this thread gave the device."""

    def __init__(self, device: torch.device, seconds: dict[str, float] | None = None) -> None:
        self.device, self.seconds = device, {} if seconds is None else seconds

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[part] = self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return time.perf_counter()


def default_options(config: checkpoint.PipelineConfig) -> GenerateOptions:
    """The samplers' interval and schedule from pipeline.json; steps and strength as the authors' example sets them."""

    def sampler(params: dict, strength: float) -> SamplerOptions:
        return SamplerOptions(
            12, strength, tuple(params.get("cfg_interval", (0.5, 1.0))), float(params.get("rescale_t", 3.0))
        )

    return GenerateOptions(sampler(config.structure_sampler, 7.5), sampler(config.latent_sampler, 3.0))


def with_wishes(
    defaults: GenerateOptions, steps: int | None, cfg: float | None, multiimage: MultiImage, gaussians: bool
) -> GenerateOptions:
    if steps is not None and steps < 1:
        raise OptionError(f"steps must be at least 1, got {steps}.")
    if multiimage not in VIEW_MODES:
        raise OptionError(f"multiimage must be one of {', '.join(VIEW_MODES)}, got {multiimage!r}.")
    changes = {k: v for k, v in {"steps": steps, "strength": cfg}.items() if v is not None}
    structure, latents = replace(defaults.structure, **changes), replace(defaults.latents, **changes)
    return GenerateOptions(structure, latents, multiimage, gaussians)


def unseen_views(views: int, options: GenerateOptions) -> tuple[str, ...]:
    steps = min(options.structure.steps, options.latents.steps)
    if options.multiimage == "multidiffusion" or views <= steps:
        return ()
    return (f"{views} views but {steps} steps: stochastic uses one view per step, only the first {steps} are seen.",)


def as_images(images: Images) -> list[tuple[str, Image.Image]]:
    """Names for messages, and PIL images. Raises InputError for none, or more than 64."""
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[-1] != 4 or images.dtype != torch.uint8:
            raise InputError(f"images must be (N, H, W, 4) uint8, got {tuple(images.shape)} {images.dtype}.")
        images = [Image.fromarray(image.cpu().numpy()) for image in images]
    if not 1 <= len(images) <= 64:
        raise InputError(f"TRELLIS takes 1 to 64 views, got {len(images)}.")
    return [(f"view {i}", image) for i, image in enumerate(images)]


def decoded(
    networks: stages.Networks,
    latents: "stages.SparseTensor",
    gaussians: bool,
    clock: Stopwatch,
    progress: Progress,
    cancelled: Callable[[], bool],
    warnings: tuple[str, ...] = (),
) -> Generated:
    """The latents as a mesh, +y up."""
    check(cancelled)
    with clock("mesh"):
        mesh = y_up(stages.decode_mesh(networks, latents)).validate()
    progress("mesh", 1, 1)
    splats = None
    if gaussians:
        with clock("gaussians"):
            splats = stages.decode_gaussians(networks, latents).rotated(Y_UP_FROM_Z_UP[:3, :3])
    return Generated(mesh, splats, len(latents.voxels), dict(clock.seconds), warnings)


def y_up(extracted: FlexiMesh) -> Mesh:
    """From the networks' +z up and sRGB to +y up and linear."""
    attributes = extracted.attributes
    colors = None
    if attributes is not None:
        colors = srgb_to_linear(attributes[:, :3])
    return Mesh(extracted.vertices, extracted.faces, colors).transformed(Y_UP_FROM_Z_UP)
