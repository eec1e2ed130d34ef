"""Times TRELLIS and ReconViaGen at the published size with random weights, part by part.

    python bench/trellis.py [--model trellis|reconviagen] [--views 4] [--compile] [--batch 4] [--whole] [--load DIR]

12,008 active voxels (a shell of radius 0.38 at 64³), half precision on CUDA. Medians of `--repeat` runs after a first.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from viewmesh.export.write import encode
from viewmesh.trellis import stages
from viewmesh.trellis.checkpoint import DINOV2_VITL14_REG, NETWORKS, storage_dtypes
from viewmesh.trellis.pipeline import Trellis, y_up
from viewmesh.trellis.reconviagen import DEFAULTS, ReconViaGen
from viewmesh.trellis.samplers import sample, sparse_std
from viewmesh.trellis.sparse import SparseTensor, Voxels
from viewmesh.trellis.surface import surface_mesh
from viewmesh.trellis.texturing import texture
from viewmesh.trellis.tiny import GAUSSIANS
from viewmesh.trellis.vggt import Aggregator, CameraHead
from viewmesh.trellis.vit import image_condition

CHECKPOINTS = Path(tempfile.gettempdir()) / "viewmesh-bench"
FLOW: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 8,
    "model_channels": 1024,
    "cond_channels": 1024,
    "num_blocks": 24,
    "num_heads": 16,
    "mlp_ratio": 4,
    "pe_mode": "ape",
    "qk_rms_norm": True,
    "use_fp16": True,
}
DECODER: dict[str, Any] = {
    "resolution": 64,
    "model_channels": 768,
    "latent_channels": 8,
    "num_blocks": 12,
    "num_heads": 12,
    "mlp_ratio": 4,
    "attn_mode": "swin",
    "window_size": 8,
    "use_fp16": True,
}
COND = {"channels": 1024, "ctx_channels": 3072, "use_fp16": True}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "sparse_structure_flow_model": ("SparseStructureFlowModel", FLOW | {"resolution": 16, "patch_size": 1}),
    "sparse_structure_decoder": (
        "SparseStructureDecoder",
        {
            "out_channels": 1,
            "latent_channels": 8,
            "num_res_blocks": 2,
            "num_res_blocks_middle": 2,
            "channels": [512, 128, 32],
            "use_fp16": True,
        },
    ),
    "slat_flow_model": (
        "SLatFlowModel",
        FLOW | {"resolution": 64, "patch_size": 2, "num_io_res_blocks": 2, "io_block_channels": [128]},
    ),
    "slat_decoder_mesh": ("SLatMeshDecoder", DECODER | {"representation_config": {"use_color": True}}),
    "slat_decoder_gs": ("SLatGaussianDecoder", DECODER | {"representation_config": GAUSSIANS | {"num_gaussians": 32}}),
    "sparse_structure_vggt_cond": (
        "ModulatedMultiViewCond",
        COND | {"num_heads": 16, "mlp_ratio": 4.0, "qk_rms_norm": True},
    ),
    "slat_vggt_cond": ("ModulatedSLATMultiViewCond", COND),
    "image_encoder": ("DinoVisionTransformer", DINOV2_VITL14_REG),
}


def random_state(network: nn.Module, half: torch.dtype) -> dict[str, Tensor]:
    """Weights as after initialisation; convolution weights that start at zero get small noise."""
    dtypes = storage_dtypes(network, half)
    state = {}
    for key, value in network.state_dict().items():
        if value.ndim > 1 and not bool(value.any()):
            value = torch.randn_like(value) * 0.02
        state[key] = value.to(dtypes[key]).contiguous().cpu()
    return state


def checkpoint(folder: Path, model: str) -> Path:
    """The folder of a model in `folder`: the official layout at the published size, random weights, written once."""
    if not (folder / model / "pipeline.json").exists():
        write_checkpoint(folder / model, model)
    return folder / model


def write_checkpoint(folder: Path, model: str) -> None:
    (folder / "ckpts").mkdir(parents=True, exist_ok=True)
    roles = {r: v for r, v in PUBLISHED.items() if model == "reconviagen" or not r.endswith("vggt_cond")}
    for role, (kind, args) in roles.items():
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            network = NETWORKS[kind](**args)
        half = torch.float32 if role == "image_encoder" else torch.float16
        save_file(random_state(network, half), folder / "ckpts" / f"{role}.safetensors")
        (folder / "ckpts" / f"{role}.json").write_text(json.dumps({"name": kind, "args": args}))
    sampler = {"params": {"steps": 25, "cfg_strength": 5.0, "cfg_interval": [0.5, 1.0], "rescale_t": 3.0}}
    args = {
        "models": {role: f"ckpts/{role}" for role in roles if role != "image_encoder"},
        "sparse_structure_sampler": sampler,
        "slat_sampler": sampler,
        "slat_normalization": {"mean": [0.0] * 8, "std": [1.0] * 8},
        "image_cond_model": "ckpts/image_encoder",
    }
    (folder / "pipeline.json").write_text(json.dumps({"name": "random", "args": args}))
    if model == "reconviagen":
        (folder / "vggt").mkdir(exist_ok=True)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            parts = {"aggregator": Aggregator(), "camera_head": CameraHead()}
        state = {f"{p}.{k}": v for p, net in parts.items() for k, v in random_state(net, torch.float32).items()}
        save_file(state, folder / "vggt" / "model.safetensors")
        (folder / "vggt" / "config.json").write_text(json.dumps({"img_size": 518, "patch_size": 14, "embed_dim": 1024}))
    torch.cuda.empty_cache()


def shell(resolution: int, thickness: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Voxels (L, 3) whose centre is within `thickness` of a sphere of radius 0.38, and all their corner distances."""
    axis = torch.arange(resolution, device=device)
    coords = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    distance = ((coords + 0.5) / resolution - 0.5).norm(dim=1) - 0.38
    coords = coords[distance.abs() < thickness]
    corner = torch.tensor([[i & 1, i >> 1 & 1, i >> 2 & 1] for i in range(8)], device=device)
    return coords, ((coords[:, None] + corner) / resolution - 0.5).norm(dim=-1) - 0.38


def views(n: int) -> list[Image.Image]:
    """1024² RGBA images of a disc with texture."""
    y, x = np.mgrid[:1024, :1024]
    rgb = np.stack([(x * (i + 3) // 7 + y * 5) % 256 for i in range(3)], -1).astype(np.uint8)
    alpha = (((x - 512) ** 2 + (y - 512) ** 2) < 400**2).astype(np.uint8)[..., None] * 255
    return [Image.fromarray(np.roll(np.concatenate([rgb, alpha], -1), 17 * i, 1)) for i in range(n)]


class Table:
    """Median seconds per part and the peak memory while it ran."""

    def __init__(self, device: torch.device, repeat: int) -> None:
        self.device, self.repeat, self.total = device, repeat, 0.0

    def row(self, part: str, run: Callable[[], Any], note: str = "", *, counted: bool = False) -> Any:
        result = run()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(self.repeat):
            self._wait()
            start = time.perf_counter()
            result = run()
            self._wait()
            seconds.append(time.perf_counter() - start)
        median = statistics.median(seconds)
        self.total += median if counted else 0
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0
        print(f"{part:44} {median * 1e3:9.1f} ms   peak {peak:5.1f} GiB   {note}", flush=True)
        return result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def batched(flow: Any, conditions: Tensor, voxels: Voxels | None) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The velocity of B items at once; conditions (B, N, T, C). Replayed where it has been recorded, as in requests."""
    if (recorded := flow.recorded) is not None and voxels is None:
        return lambda x, t, *, guided, step: stages.split(recorded(x, t, conditions[None], guided=guided))
    context = flow.context(conditions[None], null=True)

    def velocity(x: Tensor, t: Tensor, *, guided: bool, step: int) -> tuple[Tensor, Tensor | None]:
        v = flow(x if voxels is None else SparseTensor(x, voxels), t, context if guided else context.positive())
        return v[0], v[1] if guided else None

    return velocity


def bench_flows(
    table: Table, networks: stages.Networks, options: Any, structure: Tensor, latent: Tensor, batch: int
) -> None:
    """structure (1, N, T, C), latent (1, N, T, C): the conditions of the two flows."""
    device = networks.device
    coords, _ = shell(64, 0.0125, device)
    items = [torch.cat([torch.full_like(coords[:, :1], b), coords], 1) for b in range(batch)]
    fixed = torch.cat(items).int()
    R = networks.structure_flow.resolution
    many = f" x{batch}" if batch > 1 else ""
    noise = torch.randn(batch, 8, R, R, R, device=device)
    n = options.structure.steps
    latent_noise = torch.randn(len(fixed), 8, device=device)

    def run_structure() -> Tensor:
        conditions = structure.expand(batch, *structure.shape[1:])
        return sample(batched(networks.structure_flow, conditions, None), noise, options.structure)

    def run_latents() -> SparseTensor:
        voxels = Voxels(fixed, 64, (len(coords),) * batch)
        conditions = latent.expand(batch, *latent.shape[1:])
        velocity = batched(networks.latent_flow, conditions, voxels)
        feats = sample(velocity, latent_noise, options.latents, std=sparse_std(voxels.counts))
        return SparseTensor(feats, voxels)

    z = table.row(f"structure flow, {n} steps, cfg {options.structure.strength}{many}", run_structure, counted=True)
    table.row(f"structure decoder{many}", lambda: networks.structure_decoder(z).float().sum())
    note = f"{len(coords)} voxels"
    n = options.latents.steps
    table.row(f"latent flow, {n} steps, cfg {options.latents.strength}{many}", run_latents, note, counted=True)
    feats = torch.randn(len(fixed), 8, device=device)

    def decode() -> SparseTensor:
        return networks.mesh_decoder(SparseTensor(feats, Voxels(fixed, 64, (len(coords),) * batch)))

    table.row(f"mesh decoder{many}", decode, counted=True)
    if batch == 1:
        fine, distance = shell(256, 0.02, device)
        channels = torch.cat([distance, 0.1 * torch.randn(len(fine), 93, device=device)], 1)
        mesh = table.row(
            "mesh extraction", lambda: surface_mesh(fine, channels, 256), f"{len(fine)} voxels", counted=True
        )
        print(f"{'':44} {len(mesh.vertices)} vertices, {len(mesh.faces)} faces")
    print(f"{'the four together' + many:44} {table.total * 1e3:9.1f} ms   {table.total / batch * 1e3:.1f} ms each")


def bench_conditions(table: Table, model: Trellis | ReconViaGen, n: int) -> tuple[Tensor, Tensor]:
    """The conditions of the two flows, (1, N, T, C) each."""
    images = views(n)
    if isinstance(model, Trellis):
        tokens = table.row(f"preprocess and encode, {n} views", lambda: model.encode(images))
        return tokens[:1][None], tokens[:1][None]  # stochastic: one view per step
    pixels = table.row(f"preprocess, {n} views", lambda: model.preprocess(images))
    vggt = table.row("VGGT aggregator", lambda: model.aggregator(pixels[None]))
    image = table.row("DINOv2", lambda: image_condition(model.encoder, pixels)[None])
    table.row(f"VGGT's cameras, {n} views", lambda: model.cameras(images))
    structure = table.row("structure condition", lambda: model.structure_condition(vggt, image))
    return structure[:, None], table.row("latent condition", lambda: model.latent_condition(vggt, image))


def bench_whole(table: Table, model: Trellis, n: int) -> None:
    """From n images of 1024² to the bytes of a GLB of 20,000 faces and a 1024² texture.

    Random weights give no shape: the shell's voxels stand in for the decoded structure and the shell's distances for
    the decoded channels. Every part runs on inputs of the real size.
    """
    networks, options, device = model.networks, model.defaults, model.networks.device
    images = views(n)
    coords, _ = shell(64, 0.0125, device)
    voxels = Voxels(torch.cat([torch.zeros_like(coords[:, :1]), coords], 1).int(), 64, (len(coords),))
    fine, distance = shell(256, 0.02, device)
    channels = torch.cat([distance, 0.1 * torch.randn(len(fine), 93, device=device)], 1)
    R = networks.structure_flow.resolution
    parts: dict[str, float] = {}

    def run() -> bytes:
        began = time.perf_counter()
        tokens = model.encode(images)[:1][None]
        noise = torch.randn(1, 8, R, R, R, device=device)
        z = sample(batched(networks.structure_flow, tokens, None), noise, options.structure)
        float(networks.structure_decoder(z).float().sum())
        latents = torch.randn(len(coords), 8, device=device)
        std = sparse_std(voxels.counts)
        feats = sample(batched(networks.latent_flow, tokens, voxels), latents, options.latents, std=std)
        networks.mesh_decoder(SparseTensor(feats, voxels))
        mesh = y_up(surface_mesh(fine, channels, 256))
        parts["networks"] = time.perf_counter() - began
        textured = texture(mesh, target_faces=20_000, texture_size=1024)
        parts.update(textured.seconds)
        began = time.perf_counter()
        data = encode(textured.mesh, "glb")["mesh.glb"]
        parts["glb"] = time.perf_counter() - began
        return data

    data = table.row(f"{n} images to GLB, 20,000 faces, 1024²", run)
    print(f"{'':44} {len(data) / 2**20:.1f} MiB; " + ", ".join(f"{k} {v:.2f} s" for k, v in parts.items()))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("trellis", "reconviagen"), default="trellis")
    parser.add_argument("--views", type=int, nargs="+", default=[4])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--compile", action="store_true", help="also time the compiled networks")
    parser.add_argument("--whole", action="store_true", help="also time the way from images to a textured GLB")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--load", type=Path, default=CHECKPOINTS, help="where the checkpoint is written")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    folder = checkpoint(arguments.load, arguments.model)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {arguments.model}")
    start = time.perf_counter()
    model: Trellis | ReconViaGen
    if arguments.model == "trellis":
        model = Trellis.load(folder, device=device)
        options = model.defaults
    else:
        model = ReconViaGen.load(folder, vggt=folder / "vggt", device=device)
        options = DEFAULTS
    parts = ", ".join(f"{k} {v:.2f}" for k, v in model.load_seconds.items())
    print(f"load {time.perf_counter() - start:.2f} s ({parts})", flush=True)
    for compiled in (False, True) if arguments.compile else (False,):
        print(f"\n--- {'compiled' if compiled else 'eager'}")
        if compiled:
            start = time.perf_counter()
            more = {"batches": max(arguments.batch) > 1} if isinstance(model, Trellis) else {}
            parts = ", ".join(f"{k} {v:.2f}" for k, v in model.warm(**more).items())
            print(f"warm {time.perf_counter() - start:.2f} s ({parts})", flush=True)
        for n in arguments.views:
            table = Table(device, arguments.repeat)
            structure, latent = bench_conditions(table, model, n)
            for batch in arguments.batch:
                table.total = 0
                bench_flows(table, model.networks, options, structure, latent, batch)
            if arguments.whole and isinstance(model, Trellis):
                bench_whole(table, model, n)


if __name__ == "__main__":
    main()
