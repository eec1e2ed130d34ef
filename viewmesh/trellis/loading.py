"""What a model consists of, from its files to its device: networks by their role in pipeline.json, the image encoder.

Two models in one process share what their files share (`Loaded`). Memory is looked at before anything is allocated.
Knows files and memory, not what the networks compute; never downloads.
"""

import filecmp
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

import torch
from torch import nn

from viewmesh.errors import InputError, MissingModel
from viewmesh.trellis import checkpoint
from viewmesh.trellis.attention import prefer_attention_without_plans
from viewmesh.trellis.checkpoint import PipelineConfig
from viewmesh.trellis.decoders import SLatGaussianDecoder, SLatMeshDecoder
from viewmesh.trellis.slat_flow import SLatFlowModel
from viewmesh.trellis.split import fast_on
from viewmesh.trellis.stages import Networks
from viewmesh.trellis.structure import SparseStructureDecoder, SparseStructureFlowModel
from viewmesh.trellis.vit import DinoVisionTransformer
from viewmesh.weights.manifest import NETWORK_ROLES
from viewmesh.weights.store import local_folder

T = TypeVar("T", bound=nn.Module)


class Loaded:
    """Networks that are in memory, found by the content of their files. It keeps none of them there: what no model
    uses any more is gone."""

    def __init__(self) -> None:
        self._networks: WeakValueDictionary[tuple[Path, torch.device, torch.dtype | None], nn.Module] = (
            WeakValueDictionary()
        )

    def find(self, file: Path, device: torch.device, dtype: torch.dtype | None) -> nn.Module | None:
        for (other, *kind), network in list(self._networks.items()):
            if kind == [device, dtype] and _alike(file, other):
                return network
        return None

    def get(
        self, file: Path, device: torch.device, dtype: torch.dtype | None, load: Callable[[], nn.Module]
    ) -> nn.Module:
        """The network of a file of weights; loaded if it is not here."""
        network = self.find(file, device, dtype)
        if network is None:
            network = load()
        self._networks[file, device, dtype] = network
        return network

    def missing_bytes(self, files: Iterable[Path], device: torch.device, dtype: torch.dtype | None) -> int:
        """What loading these files would take, those not counted that are here already."""
        half = 2 if dtype == torch.float32 else 1  # the torsos are stored in half precision
        absent = [file for file in files if file.exists() and self.find(file, device, dtype) is None]
        return half * sum(file.stat().st_size for file in absent)


def _alike(a: Path, b: Path) -> bool:
    """The same bytes, under the same configuration. Files of different networks differ in their first megabytes."""
    if a == b:
        return True
    if not (a.exists() and b.exists()) or a.suffix != b.suffix:
        return False
    configs = [file.with_suffix(".json") for file in (a, b)]
    both = [config.read_bytes() if config.exists() else None for config in configs]
    return both[0] == both[1] and filecmp.cmp(a, b, shallow=False)


def weights_folder(weights: Path | str) -> Path:
    """A folder as it is; a repository id or a manifest name becomes its downloaded folder. MissingModel if absent."""
    if Path(weights).is_dir():
        return Path(weights)
    folder = local_folder(str(weights))
    if folder is None:
        raise MissingModel(
            f"The weights {weights} are neither a folder nor a repository that has been downloaded.",
            hint="viewmesh weights download trellis",
        )
    return folder


def load_networks(config: PipelineConfig, device: torch.device, dtype: torch.dtype | None, loaded: Loaded) -> Networks:
    """The five networks that make a mesh and Gaussians."""
    if device.type == "cuda":
        prefer_attention_without_plans()

    def load(field_name: str, kind: type[T]) -> T:
        return load_network(config, NETWORK_ROLES[field_name], kind, device, dtype, loaded)

    return Networks(
        load("structure_flow", SparseStructureFlowModel),
        load("structure_decoder", SparseStructureDecoder),
        load("latent_flow", SLatFlowModel),
        load("mesh_decoder", SLatMeshDecoder),
        load("gaussian_decoder", SLatGaussianDecoder),
        torch.tensor(config.mean, device=device),
        torch.tensor(config.std, device=device),
    )


def load_network(
    config: PipelineConfig,
    role: str,
    kind: type[T],
    device: torch.device,
    dtype: torch.dtype | None,
    loaded: Loaded,
) -> T:
    """The network that pipeline.json names for a role. Raises InputError if it is not of that kind."""
    stem = network_stem(config, role)
    load = lambda: checkpoint.load_network(stem, device, dtype)  # noqa: E731
    network = loaded.get(weights_of(stem), device, dtype, load)
    if not isinstance(network, kind):
        raise InputError(f"is a {type(network).__name__}, expected a {kind.__name__}.", file=f"{stem}.json")
    return network


def network_stem(config: PipelineConfig, role: str) -> Path:
    if role not in config.models:
        raise InputError(f"names no {role}.", file=str(config.root / "pipeline.json"))
    return checkpoint.locate(config, config.models[role], local_folder)


def weights_of(stem: Path) -> Path:
    return stem.with_name(stem.name + ".safetensors")


def encoder_file(config: PipelineConfig, given: Path | str | None = None) -> Path:
    """The image encoder's file: the given one, one that pipeline.json names, one beside it, or the downloaded one."""
    stem = config.root / config.image_encoder
    if given is not None:
        return Path(given)
    if stem.with_name(stem.name + ".json").exists():
        return weights_of(stem)
    folder = local_folder("dinov2")
    beside = [f for name in ("safetensors", "pth") for f in config.root.glob(f"dinov2_vitl14_reg4*.{name}")]
    kept = [] if folder is None else [f for name in ("safetensors", "pth") for f in folder.glob(f"*.{name}")]
    if not beside + kept:
        raise MissingModel(
            "The image encoder dinov2_vitl14_reg4_pretrain.pth is missing.", hint="viewmesh weights download dinov2"
        )
    return (beside + kept)[0]


def load_encoder(file: Path, device: torch.device, loaded: Loaded) -> DinoVisionTransformer:
    """DINOv2 in float32. Without a configuration beside it, the file is of the published ViT-L/14."""

    def load() -> nn.Module:
        return fast_on(device, read())

    def read() -> nn.Module:
        if file.suffix == ".pth":
            return checkpoint.load_dino_pth(file, device, torch.float32)
        if file.with_suffix(".json").exists():
            return checkpoint.load_network(file.with_suffix(""), device, torch.float32)
        build = lambda: DinoVisionTransformer(**checkpoint.DINOV2_VITL14_REG)  # noqa: E731
        return checkpoint.filled(build, file, device, torch.float32)

    network = loaded.get(file, device, torch.float32, load)
    if not isinstance(network, DinoVisionTransformer):
        raise InputError(
            f"is a {type(network).__name__}, expected DinoVisionTransformer.", file=str(file.with_suffix(".json"))
        )
    return network


def require_room(
    what: str,
    networks: Iterable[Path],
    encoder: Path,
    more: int,
    device: torch.device,
    dtype: torch.dtype | None,
    loaded: Loaded,
) -> None:
    """Raises OutOfMemory, with both figures, if what has to be loaded does not fit, `more` bytes included."""
    needed = loaded.missing_bytes(networks, device, dtype)
    if loaded.find(encoder, device, torch.float32) is None and encoder.exists():
        needed += encoder.stat().st_size
    checkpoint.require_memory(what, needed + more, device)
