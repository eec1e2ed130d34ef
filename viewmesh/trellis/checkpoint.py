"""Reads checkpoints in the official layout: pipeline.json beside ckpts/NAME.json and ckpts/NAME.safetensors.

Strict: every key and shape must be as the network expects. Only safetensors are read; the one published exception, the
DINOv2 `.pth`, is opened by torch's restricted unpickler. Knows files and memory, not what the networks compute. Never
downloads: `viewmesh.weights` does.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from viewmesh.errors import InputError, MissingModel, OutOfMemory
from viewmesh.trellis.decoders import SLatGaussianDecoder, SLatMeshDecoder
from viewmesh.trellis.multiview import ModulatedMultiViewCond, ModulatedSLATMultiViewCond
from viewmesh.trellis.slat_flow import SLatFlowModel
from viewmesh.trellis.structure import SparseStructureDecoder, SparseStructureFlowModel
from viewmesh.trellis.vit import DinoVisionTransformer

NETWORKS: dict[str, type[nn.Module]] = {
    "SparseStructureFlowModel": SparseStructureFlowModel,
    "SparseStructureDecoder": SparseStructureDecoder,
    "SLatFlowModel": SLatFlowModel,
    "SLatGaussianDecoder": SLatGaussianDecoder,
    "SLatMeshDecoder": SLatMeshDecoder,
    "ModulatedMultiViewCond": ModulatedMultiViewCond,
    "ModulatedSLATMultiViewCond": ModulatedSLATMultiViewCond,
    "DinoVisionTransformer": DinoVisionTransformer,
    # training variants of the same networks, whose names a published configuration may carry
    "ElasticSLatFlowModel": SLatFlowModel,
    "ElasticSLatGaussianDecoder": SLatGaussianDecoder,
    "ElasticSLatMeshDecoder": SLatMeshDecoder,
}

DINOV2_VITL14_REG = {
    "img_size": 518,
    "patch_size": 14,
    "embed_dim": 1024,
    "depth": 24,
    "num_heads": 16,
    "num_register_tokens": 4,
}
FULL_PRECISION = ("t_embedder", "input_layer", "out_layer")  # float32 in every checkpoint


@dataclass(frozen=True)
class PipelineConfig:
    """pipeline.json, read. models: the role of each network and its path without suffix."""

    root: Path
    models: dict[str, str]
    structure_sampler: dict[str, Any]
    latent_sampler: dict[str, Any]
    mean: list[float]
    std: list[float]
    image_encoder: str


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise MissingModel(f"{path} is missing.", hint="viewmesh weights download trellis") from None
    except ValueError as error:
        raise InputError(f"is not JSON ({error}).", file=str(path), hint="viewmesh weights verify") from None
    if not isinstance(value, dict):
        raise InputError("holds no JSON object.", file=str(path))
    return value


def read_pipeline(root: Path) -> PipelineConfig:
    """Raises MissingModel without a pipeline.json, InputError when a field is missing."""
    path = root / "pipeline.json"
    try:
        args = read_json(path)["args"]
        normal = args["slat_normalization"]
        return PipelineConfig(
            root,
            dict(args["models"]),
            dict(args["sparse_structure_sampler"]["params"]),
            dict(args["slat_sampler"]["params"]),
            [float(v) for v in normal["mean"]],
            [float(v) for v in normal["std"]],
            args.get("image_cond_model", "dinov2_vitl14_reg"),
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"lacks the field {error}.", file=str(path), hint="Use a TRELLIS pipeline.json.") from None


def locate(config: PipelineConfig, entry: str, repository: Callable[[str], Path | None]) -> Path:
    """The path without suffix of a pipeline.json entry: in the root, else in another repository "owner/name/rest".

    repository: the local folder of a Hugging Face repository, or None if it is not there.
    """
    if (config.root / f"{entry}.json").exists():
        return config.root / entry
    owner, _, rest = entry.partition("/")
    name, _, inside = rest.partition("/")
    if inside:
        folder = repository(f"{owner}/{name}")
        if folder is None:
            raise MissingModel(
                f"{config.root / 'pipeline.json'} takes {entry} from the repository {owner}/{name}, which is not here.",
                hint=f"hf download {owner}/{name}",
            )
        if (folder / f"{inside}.json").exists():
            return folder / inside
    raise MissingModel(f"{config.root / entry}.json is missing.", hint="viewmesh weights download trellis")


def load_network(stem: Path, device: torch.device, dtype: torch.dtype | None, prefix: str = "") -> nn.Module:
    """The network of STEM.json (`{"name", "args"}`) with the weights of STEM.safetensors, on `device`, in eval mode.

    dtype: of the torso; None takes half precision where the configuration says `use_fp16`, else float32.
    """
    config = read_json(stem.with_name(stem.name + ".json"))
    name, args = config.get("name"), config.get("args", {})
    if name not in NETWORKS:
        raise InputError(
            f"names the network {name!r}.", file=f"{stem}.json", hint=f"Known are {', '.join(sorted(NETWORKS))}."
        )
    if dtype is None:
        dtype = torch.float16 if args.get("use_fp16") and device.type == "cuda" else torch.float32
    return filled(
        lambda: NETWORKS[name](**args), stem.with_name(stem.name + ".safetensors"), device, dtype, prefix=prefix
    )


def filled(
    build: Callable[[], nn.Module],
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    prefix: str = "",
    ignored: str = "",
) -> nn.Module:
    """Builds a network without memory and fills it straight from the file onto the device.

    prefix: the part of the file that is this network's. ignored: a pattern of other keys that may be there.
    """
    with torch.device("meta"):
        network = build()
    expected = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    dtypes = storage_dtypes(network, dtype)
    with TensorFile(path, device) as file:
        source = {key[len(prefix) :]: key for key in file.shapes if key.startswith(prefix)}
        other = [k for k in file.shapes if not k.startswith(prefix) and not (ignored and re.match(ignored, k))]
        shapes = {ours: file.shapes[theirs] for ours, theirs in source.items()}
        _same_keys(path, expected, shapes, other)
        state = {key: file.get(source[key]).to(dtypes[key]) for key in expected}
    network.load_state_dict(state, strict=True, assign=True)
    return network.requires_grad_(False).eval()


def _same_keys(path: Path, expected: Mapping[str, tuple], found: Mapping[str, tuple], other: list[str]) -> None:
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted([*(found.keys() - expected.keys()), *other])
    reshaped = [k for k in expected if k in found and found[k] != expected[k]]
    for keys, what in ((missing, "lacks"), (unexpected, "has the unexpected")):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise InputError(
                f"{what} tensor {keys[0]}{more}.", file=str(path), hint="These are another network's weights."
            )
    if reshaped:
        k = reshaped[0]
        raise InputError(
            f"tensor {k} has shape {found[k]}, the configuration beside it wants {expected[k]}.", file=str(path)
        )


def storage_dtypes(network: nn.Module, torso: torch.dtype) -> dict[str, torch.dtype]:
    """Per state-dict key: `torso` for the weights of linear layers and convolutions in the torso, else float32."""
    dtypes = dict.fromkeys(network.state_dict(), torch.float32)
    for name, module in network.named_modules():
        holds_weights = isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) or type(module) is nn.Module
        if holds_weights and not name.startswith(FULL_PRECISION):
            dtypes |= {f"{name}.{key}": torso for key, _ in module.named_parameters(recurse=False)}
    if "multiview_cond_tokens" in dtypes:
        dtypes["multiview_cond_tokens"] = torso
    return dtypes


class TensorFile:
    """A safetensors file opened for reading, mapped and copied tensor by tensor to the device."""

    def __init__(self, path: Path, device: torch.device) -> None:
        if not path.exists():
            raise MissingModel(f"{path} is missing.", hint="viewmesh weights download")
        with path.open("rb") as file:
            head = file.read(2)
        if head[:1] == b"\x80" or head == b"PK":
            raise InputError(
                "is a pickle, which can run code when it is read; it was not opened.",
                file=str(path),
                hint="Convert it to safetensors.",
            )
        try:
            self._file = safe_open(path, framework="pt", device=str(device))
        except SafetensorError as error:
            size = path.stat().st_size
            raise InputError(
                f"is not a whole safetensors file ({size} bytes; {error}).",
                file=str(path),
                hint="viewmesh weights download resumes it, viewmesh weights verify checks it.",
            ) from None

    def __enter__(self) -> "TensorFile":
        file = self._file.__enter__()
        self.shapes = {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118  not a dict
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def get(self, key: str) -> Tensor:
        return self._file.get_tensor(key)


def load_dino_pth(path: Path, device: torch.device, dtype: torch.dtype) -> DinoVisionTransformer:
    """The published DINOv2 ViT-L/14 with registers. Opened by the unpickler that knows tensors and nothing else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        first = str(error).partition("\n")[0]
        raise InputError(
            f"is not a plain state dict of tensors ({first}).", file=str(path), hint="viewmesh weights verify dinov2"
        ) from None
    with torch.device("meta"):
        network = DinoVisionTransformer(**DINOV2_VITL14_REG)
    expected = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    _same_keys(path, expected, {k: tuple(v.shape) for k, v in state.items()}, [])
    dtypes = storage_dtypes(network, dtype)
    network.load_state_dict({k: state[k].to(device, dtypes[k]) for k in expected}, strict=True, assign=True)
    return network.requires_grad_(False).eval()


def free_bytes(device: torch.device) -> int | None:
    """What this process could still allocate on a CUDA device; None elsewhere."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def require_memory(what: str, needed: int, device: torch.device) -> None:
    """Raises OutOfMemory, with both figures, before anything is allocated."""
    free = free_bytes(device)
    if free is not None and free < needed:
        raise OutOfMemory(what, needed=needed, free=free, device=str(device), hint="Stop what else uses the device.")


def file_bytes(stem: Path) -> int:
    path = stem.with_name(stem.name + ".safetensors")
    return path.stat().st_size if path.exists() else 0
