"""A tiny checkpoint in the official layout, for tests, demonstrations and continuous integration.

Random weights, small widths, the same files and names as the published one. A few weights are set so that every input
gives the same closed, ball-like mesh with colours: enough to drive the whole way to a file in seconds on a CPU.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from viewmesh.trellis.checkpoint import NETWORKS
from viewmesh.trellis.decoders import SLatMeshDecoder
from viewmesh.trellis.structure import SparseStructureDecoder, SparseStructureFlowModel
from viewmesh.trellis.vggt import Aggregator, CameraHead

CHANNELS = 32  # of the flow networks and of the condition
IMAGE = 56
FLOW = {
    "in_channels": 8,
    "out_channels": 8,
    "model_channels": CHANNELS,
    "cond_channels": CHANNELS,
    "num_blocks": 2,
    "num_heads": 2,
    "mlp_ratio": 4,
    "pe_mode": "ape",
    "qk_rms_norm": True,
    "use_fp16": True,
}
DECODER = {
    "resolution": 16,
    "latent_channels": 8,
    "num_blocks": 2,
    "num_heads": 4,
    "mlp_ratio": 4,
    "attn_mode": "swin",
    "window_size": 8,
    "use_fp16": True,
}
GAUSSIANS = {
    "lr": {"_xyz": 1.0, "_features_dc": 1.0, "_opacity": 1.0, "_scaling": 1.0, "_rotation": 0.1},
    "perturb_offset": True,
    "voxel_size": 1.5,
    "num_gaussians": 4,
    "2d_filter_kernel_size": 0.1,
    "3d_filter_kernel_size": 0.0009,
    "scaling_bias": 0.004,
    "opacity_bias": 0.1,
    "scaling_activation": "softplus",
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {  # role: file, class, arguments
    "sparse_structure_flow_model": (
        "ss_flow",
        "SparseStructureFlowModel",
        FLOW | {"resolution": 4, "patch_size": 1},
    ),
    "sparse_structure_decoder": (
        "ss_dec",
        "SparseStructureDecoder",
        {"out_channels": 1, "latent_channels": 8, "num_res_blocks": 1, "channels": [16, 16, 8], "use_fp16": True},
    ),
    "slat_flow_model": (
        "slat_flow",
        "SLatFlowModel",
        FLOW | {"resolution": 16, "patch_size": 2, "num_io_res_blocks": 2, "io_block_channels": [16]},
    ),
    "slat_decoder_mesh": (
        "slat_dec_mesh",
        "SLatMeshDecoder",
        DECODER | {"model_channels": 256, "representation_config": {"use_color": True}},
    ),
    "slat_decoder_gs": (
        "slat_dec_gs",
        "SLatGaussianDecoder",
        DECODER | {"model_channels": 32, "representation_config": GAUSSIANS},
    ),
}
ENCODER = (
    "DinoVisionTransformer",
    {"img_size": IMAGE, "patch_size": 14, "embed_dim": CHANNELS, "depth": 2, "num_heads": 2},
)
VGGT: dict[str, Any] = {"img_size": IMAGE, "patch_size": 14, "embed_dim": CHANNELS, "depth": 24, "num_heads": 2}
CONDITIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sparse_structure_vggt_cond": (
        "ss_vggt_cond",
        "ModulatedMultiViewCond",
        {"channels": CHANNELS, "ctx_channels": 3 * CHANNELS, "num_heads": 2, "num_init_tokens": 24, "use_fp16": True},
    ),
    "slat_vggt_cond": (
        "slat_vggt_cond",
        "ModulatedSLATMultiViewCond",
        {"channels": CHANNELS, "ctx_channels": 3 * CHANNELS, "use_fp16": True},
    ),
}


def write_tiny_trellis(folder: Path, seed: int = 0) -> Path:
    """Writes pipeline.json, ckpts/*.json and ckpts/*.safetensors into `folder`, made if need be; returns it."""
    return _write(folder, seed, {})


def write_tiny_reconviagen(folder: Path, seed: int = 0) -> Path:
    """The same with the two condition networks; VGGT's config.json and model.safetensors go to folder/vggt."""
    _write(folder, seed, CONDITIONS)
    generator = torch.Generator().manual_seed(seed + 1)
    (folder / "vggt").mkdir(exist_ok=True)
    (folder / "vggt" / "config.json").write_text(json.dumps(VGGT))
    parts = {"aggregator": Aggregator(**VGGT), "camera_head": CameraHead(2 * CHANNELS, num_heads=2)}
    state = {f"{k}.{key}": t for k, part in parts.items() for key, t in _random_state(part, generator).items()}
    state["track_head.unused.weight"] = torch.zeros(1)  # the published file has heads that nobody loads
    save_file(state, folder / "vggt" / "model.safetensors")
    return folder


def _write(folder: Path, seed: int, more: dict[str, tuple[str, str, dict[str, Any]]]) -> Path:
    generator = torch.Generator().manual_seed(seed)
    (folder / "ckpts").mkdir(parents=True, exist_ok=True)
    models = MODELS | more
    for file, kind, args in [*models.values(), ("image_encoder", *ENCODER)]:
        network = NETWORKS[kind](**args)
        state = _shaped(network, _random_state(network, generator))
        save_file(state, folder / "ckpts" / f"{file}.safetensors")
        (folder / "ckpts" / f"{file}.json").write_text(json.dumps({"name": kind, "args": args}))
    params = {"steps": 25, "cfg_strength": 5.0, "cfg_interval": [0.5, 1.0], "rescale_t": 3.0}
    sampler = {"name": "FlowEulerGuidanceIntervalSampler", "args": {"sigma_min": 1e-5}, "params": params}
    pipeline = {
        "name": "TrellisImageTo3DPipeline",
        "args": {
            "models": {role: f"ckpts/{file}" for role, (file, _, _) in models.items()},
            "sparse_structure_sampler": sampler,
            "slat_sampler": sampler,
            "slat_normalization": {"mean": [0.0] * 8, "std": [1.0] * 8},
            "image_cond_model": "ckpts/image_encoder",
        },
    }
    (folder / "pipeline.json").write_text(json.dumps(pipeline, indent=2))
    return folder


def _random_state(network: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Small random weights; gains of one; buffers as built."""
    buffers = dict(network.named_buffers())
    state = {}
    for key, value in network.state_dict().items():
        if key in buffers:
            state[key] = value.clone()
        elif value.ndim < 2 or key.endswith("gamma"):
            one = key.endswith(("weight", "gamma"))
            state[key] = (1.0 if one else 0.0) + 0.05 * torch.randn(value.shape, generator=generator)
        else:
            fan_in = value[0].numel()
            state[key] = torch.randn(value.shape, generator=generator) * (0.7 / fan_in**0.5)
    return state


def _shaped(network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Lets the structure be a ball and the mesh its surface, whatever the input."""
    if isinstance(network, SparseStructureFlowModel):
        R = network.resolution
        axis = (torch.arange(R) + 0.5) / R * 2 - 1
        radius = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).square().sum(0).sqrt().flatten()
        # two opposed channels survive the final layer norm as a sign: inside or outside the ball
        sign = torch.where(radius < 0.9, 1.0, -1.0)
        state["pos_emb"][:, 0], state["pos_emb"][:, 1] = 20 * sign, -20 * sign
        state["out_layer.weight"][0] = 0
        state["out_layer.weight"][0, :2] = torch.tensor([-3.0, 3.0])
    if isinstance(network, SparseStructureDecoder):
        for key, weight in state.items():
            if weight.ndim == 5 and ("conv1" in key or "conv2" in key):
                weight *= 0.01  # residual blocks that change little
            elif weight.ndim == 5:
                weight *= 0.01
                state["out_layer.2.bias"][:] = -3.0
                _carry_two_channels(weight, split=8 if ".conv." in key else 1, last=key.startswith("out_layer"))
    if isinstance(network, SLatMeshDecoder):
        state["out_layer.weight"][:8] *= 0.02
        state["out_layer.bias"][:8] = -0.5  # every voxel is inside: the surface is where the voxels end
        state["out_layer.weight"][8:32] *= 0.2
    return state


def _carry_two_channels(weight: Tensor, split: int, last: bool) -> None:
    """Makes a (Cout, Cin, 3, 3, 3) convolution pass a quantity on in its first two channels, as itself and negated."""
    if last:  # two channels to one logit
        # the mean of 27 signs; with the bias, a voxel stays where nearly all around it, within the lattice, are inside
        weight[0, 0], weight[0, 1] = 2 / 27, -2 / 27
        return
    for out in range(2 * split):  # the input layer has one channel to start from, the others two
        sign = 1.0 if out < split else -1.0
        weight[out, 0, 1, 1, 1] = sign
