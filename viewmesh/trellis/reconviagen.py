"""ReconViaGen: TRELLIS conditioned on what VGGT and DINOv2 see in all views together.

    model = ReconViaGen.load("reconviagen", device="cuda")
    result = model.generate(images)          # like Trellis.generate
    cameras = model.cameras(images)          # VGGT's poses of the preprocessed views

Chang et al. 2025, "ReconViaGen: Towards Accurate Multi-view 3D Object Reconstruction via Generation". Its weights are
to be treated as non-commercial (see viewmesh.weights.manifest).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from viewmesh.errors import InputError, MissingModel
from viewmesh.geometry.camera import OPENGL_FROM_OPENCV, Cameras
from viewmesh.progress import Progress, check, never, silent
from viewmesh.trellis import checkpoint, stages
from viewmesh.trellis.loading import (
    Loaded,
    encoder_file,
    load_encoder,
    load_network,
    load_networks,
    network_stem,
    require_room,
    weights_folder,
    weights_of,
)
from viewmesh.trellis.multiview import ModulatedMultiViewCond, ModulatedSLATMultiViewCond
from viewmesh.trellis.pipeline import (
    Generated,
    GenerateOptions,
    Images,
    Stopwatch,
    as_images,
    decoded,
    in_threads,
    with_wishes,
)
from viewmesh.trellis.preprocess import image_tensor, reconviagen_image
from viewmesh.trellis.samplers import SamplerOptions
from viewmesh.trellis.vggt import USED_LAYERS, Aggregator, CameraHead
from viewmesh.trellis.vit import DinoVisionTransformer, image_condition
from viewmesh.trellis.warm import compile_flows, record_structure
from viewmesh.weights.manifest import CONDITION_ROLES, RECONVIAGEN

# the authors' application
DEFAULTS = GenerateOptions(
    SamplerOptions(30, 7.5, (0.6, 1.0), 5.0, 0.7, "reconviagen"),
    SamplerOptions(12, 7.5, (0.6, 1.0), 3.0, 0.5, "reconviagen"),
)
BYTES_PER_VIEW = 160 << 20  # keys and values of 24 blocks, or tokens and activations at 518²; 150 MiB measured
WORKSPACE_BYTES = 2 << 30
OTHER_HEADS = r"(camera|point|depth|track)_head\."  # parts of the VGGT file that are not loaded


@dataclass(frozen=True)
class ReconViaGen:
    """All networks on one device. Immutable: calls may run concurrently."""

    networks: stages.Networks
    encoder: DinoVisionTransformer
    aggregator: Aggregator
    camera_head: CameraHead
    structure_condition: ModulatedMultiViewCond
    latent_condition: ModulatedSLATMultiViewCond
    defaults: GenerateOptions = DEFAULTS
    load_seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        weights: Path | str = "reconviagen",
        *,
        vggt: Path | str = "vggt-object",
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        dino: Path | str | None = None,
        loaded: Loaded | None = None,
    ) -> "ReconViaGen":
        """weights, vggt: folders, or names or repositories that `viewmesh weights download` has fetched.

        Raises like Trellis.load.
        """
        device, clock, loaded = torch.device(device), Stopwatch(torch.device(device)), loaded or Loaded()
        config, vggt_root = checkpoint.read_pipeline(weights_folder(weights)), weights_folder(vggt)
        encoder_weights = encoder_file(config, dino)
        files = [weights_of(network_stem(config, role)) for role in RECONVIAGEN.roles]
        more = vggt_bytes(vggt_root, device) + WORKSPACE_BYTES
        require_room(config.root.name, files, encoder_weights, more, device, dtype, loaded)
        with clock("networks"):
            networks = load_networks(config, device, dtype, loaded)
            structure = load_network(config, CONDITION_ROLES[0], ModulatedMultiViewCond, device, dtype, loaded)
            latent = load_network(config, CONDITION_ROLES[1], ModulatedSLATMultiViewCond, device, dtype, loaded)
        with clock("encoder"):
            encoder = load_encoder(encoder_weights, device, loaded)
        with clock("vggt"):
            aggregator, camera_head = load_vggt(vggt_root, device)
        return cls(networks, encoder, aggregator, camera_head, structure, latent, DEFAULTS, clock.seconds)

    @property
    def device(self) -> torch.device:
        return self.networks.device

    def options(
        self, *, steps: int | None = None, cfg: float | None = None, gaussians: bool = False
    ) -> GenerateOptions:
        """The defaults with a caller's wishes; `steps` and `cfg` apply to both stages."""
        return with_wishes(self.defaults, steps, cfg, "stochastic", gaussians)

    def warm(self) -> dict[str, float]:
        """Compiles the flow networks and records the first (CUDA only); seconds by part. Calls before it ends work,
        slower."""
        return {
            **compile_flows(self.networks, tokens=self.encoder.tokens, views=2),
            **record_structure(self.networks, self.structure_condition.multiview_cond_tokens[0]),
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
        """images: PIL images whose alpha is the object's mask, or (N, H, W, 4) uint8; 1 to 32 of them.

        Raises InputError, OutOfMemory (before it runs, for that many views), EmptyReconstruction, Cancelled.
        """
        options, generator = options or self.defaults, generator or torch.Generator().manual_seed(0)
        clock = Stopwatch(self.device)
        with clock("encode"):
            pixels = self.preprocess(images)
            checkpoint.require_memory(f"ReconViaGen with {len(pixels)} views", working_bytes(len(pixels)), self.device)
            vggt = self.aggregator(pixels[None])
            check(cancelled)
            image = torch.cat([image_condition(self.encoder, view) for view in pixels.split(8)])[None]
            structure = self.structure_condition(vggt, image)  # (1, T, C)
            latent = self.latent_condition(vggt, image)  # (1, N, T, C)
            del vggt, image
        with clock("structure"):
            velocity = stages.fused_views(self.networks.structure_flow, structure)
            voxels = stages.sample_structure(self.networks, velocity, options.structure, generator, progress, cancelled)
        with clock("latents"):
            velocity = stages.fused_views(self.networks.latent_flow, latent[0], voxels)
            latents = stages.sample_latents(
                self.networks, voxels, velocity, options.latents, generator, progress, cancelled
            )
        return decoded(self.networks, latents, options.gaussians, clock, progress, cancelled)

    def preprocess(self, images: Images) -> Tensor:
        """(N, 3, S, S) float32 in [0, 1] on the device."""
        named = as_images(images)
        if len(named) > 32:
            raise InputError(f"ReconViaGen takes 1 to 32 views, got {len(named)}.")
        size = self.encoder.image_size
        prepare = lambda view: image_tensor(reconviagen_image(view[1], size=size, name=view[0]))  # noqa: E731
        return torch.stack(in_threads(prepare, named)).to(self.device)

    @torch.no_grad()
    def cameras(self, images: Images) -> Cameras:
        """VGGT's cameras of the preprocessed views, OpenGL axes; the world is the first view's camera turned to +y up,
        in the network's own scale. Raises OutOfMemory before it runs."""
        pixels = self.preprocess(images)
        what = f"VGGT's cameras of {len(pixels)} views"
        checkpoint.require_memory(what, working_bytes(len(pixels)), self.device)
        pose = self.camera_head(self.aggregator(pixels[None], USED_LAYERS[-1:])[0])[0]
        return cameras_of(pose.cpu(), self.encoder.image_size)


def cameras_of(pose: Tensor, size: int) -> Cameras:
    """VGGT's pose encoding (N, 9) as cameras over size² images."""
    pose = pose.to(torch.float64)
    rigid = torch.eye(4, dtype=torch.float64).repeat(len(pose), 1, 1)
    rigid[:, :3, :3], rigid[:, :3, 3] = _rotation(pose[:, 3:7]), pose[:, :3]
    world_from_camera = OPENGL_FROM_OPENCV @ torch.linalg.inv(rigid) @ OPENGL_FROM_OPENCV
    fy, fx = (size / 2 / torch.tan(pose[:, i].clamp(1e-3, 3.1) / 2) for i in (7, 8))
    center = torch.full((len(pose),), size / 2, dtype=torch.float64)
    return Cameras(world_from_camera, fx, fy, center, center.clone(), size, size)


def _rotation(xyzw: Tensor) -> Tensor:
    x, y, z, w = nn.functional.normalize(xyzw, dim=-1).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def working_bytes(views: int) -> int:
    """What a run over `views` views needs beside the weights, at the published size."""
    return WORKSPACE_BYTES + views * BYTES_PER_VIEW


def vggt_bytes(root: Path, device: torch.device) -> int:
    """What load_vggt allocates."""
    per = {"aggregator.": half_precision(device).itemsize, "camera_head.": 4}
    with checkpoint.TensorFile(vggt_file(root), torch.device("cpu")) as file:
        parts = {key: next((b for p, b in per.items() if key.startswith(p)), 0) for key in file.shapes}
        return sum(parts[key] * math.prod(shape) for key, shape in file.shapes.items())


def vggt_file(root: Path) -> Path:
    path = root / "model.safetensors"
    if not path.exists():
        raise MissingModel(f"{path} is missing.", hint="viewmesh weights download vggt-object")
    return path


def half_precision(device: torch.device) -> torch.dtype:
    """What VGGT's authors run the aggregator in on CUDA; float32 elsewhere."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def load_vggt(root: Path, device: torch.device) -> tuple[Aggregator, CameraHead]:
    """The aggregator (half precision on CUDA) and the camera head (float32)."""
    config, path = checkpoint.read_json(root / "config.json"), vggt_file(root)
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
    args = {name: config[name] for name in names if name in config}
    aggregator = checkpoint.filled(
        lambda: Aggregator(**args), path, device, half_precision(device), prefix="aggregator.", ignored=OTHER_HEADS
    )
    width = 2 * args.get("embed_dim", 1024)
    heads = args.get("num_heads", 16)
    camera_head = checkpoint.filled(
        lambda: CameraHead(width, num_heads=heads),
        path,
        device,
        torch.float32,
        prefix="camera_head.",
        ignored=rf"aggregator\.|{OTHER_HEADS}",
    )
    assert isinstance(aggregator, Aggregator)
    assert isinstance(camera_head, CameraHead)
    return aggregator, camera_head
