"""The stages that every TRELLIS-like model shares: structure, latents, mesh. Conditions are somebody else's business.

Frames: everything here is +z up in [-0.5, 0.5]³, as the networks were trained.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from viewmesh.errors import EmptyReconstruction
from viewmesh.geometry.flexicubes import FlexiMesh
from viewmesh.progress import Progress
from viewmesh.trellis.decoders import Gaussians, SLatGaussianDecoder, SLatMeshDecoder
from viewmesh.trellis.samplers import SamplerOptions, Velocity, sample, sparse_std
from viewmesh.trellis.slat_flow import SLatFlowModel
from viewmesh.trellis.sparse import SparseTensor, Voxels
from viewmesh.trellis.structure import SparseStructureDecoder, SparseStructureFlowModel
from viewmesh.trellis.surface import surface_mesh
from viewmesh.trellis.transformer import Context, FlowTransformer

VIEWS_AT_ONCE = 4  # positive passes of multidiffusion that run together


@dataclass(frozen=True)
class Networks:
    """The networks of the two stages, all on one device. mean, std: (8,) of the structured latents."""

    structure_flow: SparseStructureFlowModel
    structure_decoder: SparseStructureDecoder
    latent_flow: SLatFlowModel
    mesh_decoder: SLatMeshDecoder
    gaussian_decoder: SLatGaussianDecoder
    mean: Tensor
    std: Tensor

    @property
    def device(self) -> torch.device:
        return self.mean.device


def sample_structure(
    networks: Networks,
    velocity: Velocity,
    options: SamplerOptions,
    generator: torch.Generator,
    progress: Progress,
    cancelled: Callable[[], bool],
) -> Voxels:
    """The active voxels. Raises EmptyReconstruction when there are none."""
    noise = structure_noise(networks, generator)
    return occupied(
        networks, sample(velocity, noise, options, stage="structure", progress=progress, cancelled=cancelled)
    )


def occupied(networks: Networks, latent: Tensor) -> Voxels:
    """The voxels of one structure latent (1, C, R, R, R). Raises EmptyReconstruction when there are none."""
    decoder = networks.structure_decoder
    logits = (decoder.recorded or decoder)(latent)  # (1, 1, 4R, 4R, 4R)
    coords = (logits[:, 0] > 0).nonzero()  # item, x, y, z, in that order of significance
    if len(coords) == 0:
        raise EmptyReconstruction("The structure stage left no voxel: the model saw no object in the views.")
    return Voxels(coords.int(), logits.shape[-1], (len(coords),))


def sample_latents(
    networks: Networks,
    voxels: Voxels,
    velocity: Velocity,
    options: SamplerOptions,
    generator: torch.Generator,
    progress: Progress,
    cancelled: Callable[[], bool],
) -> SparseTensor:
    """Structured latents of the voxels, (L, 8), in the decoders' units."""
    noise = latent_noise(networks, len(voxels), generator)
    std = sparse_std(voxels.counts)
    feats = sample(velocity, noise, options, std=std, stage="latents", progress=progress, cancelled=cancelled)
    return SparseTensor(in_decoders_units(networks, feats), voxels)


def in_decoders_units(networks: Networks, feats: Tensor) -> Tensor:
    return feats * networks.std + networks.mean


def decode_mesh(networks: Networks, latents: SparseTensor) -> FlexiMesh:
    """Raises EmptyReconstruction when the decoded distances enclose nothing."""
    channels = networks.mesh_decoder(latents)
    return surface_mesh(channels.voxels.coords[:, 1:], channels.feats, channels.voxels.resolution)


def decode_gaussians(networks: Networks, latents: SparseTensor) -> Gaussians:
    return networks.gaussian_decoder(latents)[0]


def structure_noise(networks: Networks, generator: torch.Generator) -> Tensor:  # (1, C, R, R, R)
    R, C = networks.structure_flow.resolution, networks.structure_flow.in_channels
    return _noise((1, C, R, R, R), generator, networks.device)


def latent_noise(networks: Networks, voxels: int, generator: torch.Generator) -> Tensor:  # (L, C)
    return _noise((voxels, networks.latent_flow.in_channels), generator, networks.device)


def _noise(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Drawn where the generator lives: a CPU generator gives the same noise for every device."""
    return torch.randn(shape, generator=generator, device=generator.device).to(device)


def fused_views(flow: FlowTransformer, condition: Tensor, voxels: Voxels | None = None) -> Velocity:
    """One condition (N, T, C) of N views, averaged inside the cross-attentions (N = 1: the plain model)."""
    if (recorded := flow.recorded) is not None:
        return lambda x, t, *, guided, step: split(recorded(x, t, condition[None, None], guided=guided))
    guided_context = flow.context(condition[None, None], null=True)

    def velocity(x: Tensor, t: Tensor, *, guided: bool, step: int) -> tuple[Tensor, Tensor | None]:
        return _evaluate(flow, x, t, guided_context if guided else guided_context.positive(), voxels)

    return velocity


def stochastic_views(flow: FlowTransformer, conditions: Tensor, voxels: Voxels | None = None) -> Velocity:
    """One view per step in turn; conditions (N, T, C). Views beyond the number of steps are never seen."""
    if len(conditions) == 1:
        return fused_views(flow, conditions, voxels)
    nulls = flow.nulls()

    def velocity(x: Tensor, t: Tensor, *, guided: bool, step: int) -> tuple[Tensor, Tensor | None]:
        condition = conditions[step % len(conditions)][None, None, None]
        if flow.recorded is not None:
            return split(flow.recorded(x, t, condition, guided=guided))
        return _evaluate(flow, x, t, flow.context(condition, null=guided and nulls), voxels)

    return velocity


def multidiffusion_views(flow: FlowTransformer, conditions: Tensor, voxels: Voxels | None = None) -> Velocity:
    """The mean of the views' velocities; conditions (N, T, C). N + 1 passes per guided step, a few at a time."""
    groups = conditions.split(VIEWS_AT_ONCE)
    kept = flow.context(conditions[:, None, None], null=True) if len(groups) == 1 else None

    def velocity(x: Tensor, t: Tensor, *, guided: bool, step: int) -> tuple[Tensor, Tensor | None]:
        total, negative = torch.zeros_like(x), None
        for i, group in enumerate(groups):
            null = guided and i == 0
            context = flow.context(group[:, None, None], null=null) if kept is None else kept
            v = _passes(flow, x, t, context if null else context.positive(), voxels)
            total += v[: len(group)].sum(0)
            negative = v[len(group)] if null else negative
        return total / len(conditions), negative

    return velocity


def _passes(flow: FlowTransformer, x: Tensor, t: Tensor, context: Context, voxels: Voxels | None) -> Tensor:
    return flow(x if voxels is None else SparseTensor(x, voxels), t, context)


def _evaluate(
    flow: FlowTransformer, x: Tensor, t: Tensor, context: Context, voxels: Voxels | None
) -> tuple[Tensor, Tensor | None]:
    return split(_passes(flow, x, t, context, voxels))


def split(v: Tensor) -> tuple[Tensor, Tensor | None]:
    """(1 or 2, ...): the conditioned pass and the other one, if there is one."""
    return v[0], v[1] if len(v) > 1 else None
