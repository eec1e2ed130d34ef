"""Several requests through TRELLIS' networks at once. Each has its own noise, progress, cancel and outcome.

A request's result does not depend on what it was batched with, but for the rounding of larger matrix products. One
that is cancelled leaves at the next step; one that fails, fails alone. What a batch saves is the time in which the
device waits for the next kernel: much on a slow host and for small objects, little for large ones on a fast one.
Knows nothing about images: a request brings its condition.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from viewmesh.errors import Cancelled, ViewmeshError
from viewmesh.progress import Progress, never, silent
from viewmesh.trellis import stages
from viewmesh.trellis.checkpoint import free_bytes
from viewmesh.trellis.samplers import SamplerOptions, Velocity, sample, sparse_std
from viewmesh.trellis.sparse import SparseTensor, Voxels
from viewmesh.trellis.transformer import Context, FlowTransformer

if TYPE_CHECKING:
    from viewmesh.trellis.stages import Networks

T = TypeVar("T")
U = TypeVar("U")
MEMBER_BYTES = 1 << 29  # what one more request adds: 0.25 GiB measured with 12,000 voxels
PACKED_VOXELS = 60_000  # at most so many in one latent stage: beyond, nothing is gained and memory is lost


@dataclass(frozen=True)
class Request:
    """condition: (N, T, C) of N views, from Trellis.encode."""

    condition: Tensor
    generator: torch.Generator
    gaussians: bool = False
    progress: Progress = silent
    cancelled: Callable[[], bool] = never


@dataclass
class Batch:
    """here: which requests are still in it. outcomes: of those that are not."""

    requests: Sequence[Request]
    here: list[int]
    outcomes: dict[int, ViewmeshError] = field(default_factory=dict)

    def staying(self) -> list[int]:
        """Lets the cancelled go; the positions that the others had in `here`. Raises Cancelled if nobody is left."""
        positions = []
        for position, i in enumerate(self.here):
            if self.requests[i].cancelled():
                self.outcomes[i] = Cancelled("The work was cancelled.")
            else:
                positions.append(position)
        self.here = [self.here[position] for position in positions]
        if not positions:
            raise Cancelled("The work was cancelled.")
        return positions

    def condition(self, step: int) -> Tensor:
        """(1, B, 1, T, C): the view that each request shows at this step, in turn."""
        views = [self.requests[i].condition for i in self.here]
        return torch.stack([condition[step % len(condition)] for condition in views])[None, :, None]

    def progress(self, stage: str, step: int, steps: int, **metrics: float) -> None:
        for i in self.here:
            self.requests[i].progress(stage, step, steps, **metrics)

    def each(self, do: Callable[[int], T]) -> dict[int, T]:
        """do(i) for every request that is here; those for which it raises an error of ours leave with it."""
        done: dict[int, T] = {}
        for i in self.here:
            try:
                done[i] = do(i)
            except ViewmeshError as error:
                self.outcomes[i] = error
        self.here = [i for i in self.here if i in done]
        return done


def going_on(outcomes: Sequence[T | ViewmeshError], do: Callable[[list[T]], Sequence[U]]) -> list[U | ViewmeshError]:
    """What do makes of those that have not failed, in their places."""
    going = [one for one in outcomes if not isinstance(one, ViewmeshError)]
    made = iter(do(going) if going else ())
    return [one if isinstance(one, ViewmeshError) else next(made) for one in outcomes]


def room(device: torch.device, workspace: int) -> int:
    """How many requests fit into the free memory at once: at least one, which finds out for itself."""
    free = free_bytes(device)
    return 1_000_000 if free is None else 1 + max(0, free - workspace) // MEMBER_BYTES


def sample_structures(networks: "Networks", batch: Batch, options: SamplerOptions) -> dict[int, Voxels]:
    """The active voxels of each request that came so far; the others have an outcome."""
    noise = torch.cat([stages.structure_noise(networks, batch.requests[i].generator) for i in batch.here])
    velocity = _velocity(networks.structure_flow, batch, lambda x: x)
    latents = sample(
        velocity, noise, options, stage="structure", progress=batch.progress, staying=lambda x: x[batch.staying()]
    )
    of = dict(zip(batch.here, latents.split(1), strict=True))
    return batch.each(lambda i: stages.occupied(networks, of[i]))


def sample_latents(
    networks: "Networks", batch: Batch, voxels: dict[int, Voxels], options: SamplerOptions
) -> dict[int, SparseTensor]:
    """The structured latents of each request that came so far, in the decoders' units."""
    packed = together([voxels[i] for i in batch.here])
    noise = [stages.latent_noise(networks, len(voxels[i]), batch.requests[i].generator) for i in batch.here]

    def staying(x: Tensor) -> Tensor:
        nonlocal packed
        before, parts = len(batch.here), x.split(list(packed.counts))
        positions = batch.staying()
        if len(positions) == before:
            return x
        packed = together([voxels[i] for i in batch.here])
        return torch.cat([parts[position] for position in positions])

    def std(x: Tensor) -> Tensor:
        return sparse_std(packed.counts)(x)

    feats = sample(
        _velocity(networks.latent_flow, batch, lambda x: SparseTensor(x, packed)),
        torch.cat(noise),
        options,
        std=std,
        stage="latents",
        progress=batch.progress,
        staying=staying,
    )
    parts = stages.in_decoders_units(networks, feats).split(list(packed.counts))
    return {i: SparseTensor(part, voxels[i]) for i, part in zip(batch.here, parts, strict=True)}


def together(voxels: Sequence[Voxels]) -> Voxels:
    """Sets of one item each as one set of many."""
    if len(voxels) == 1:
        return voxels[0]
    coords = torch.cat([one.coords for one in voxels])
    counts = tuple(len(one) for one in voxels)
    item = torch.arange(len(counts), device=coords.device).repeat_interleave(
        torch.tensor(counts, device=coords.device), output_size=len(coords)
    )
    coords = torch.cat([item[:, None].to(coords.dtype), coords[:, 1:]], 1)
    return Voxels(coords, voxels[0].resolution, counts)


def groups(here: Sequence[int], voxels: dict[int, Voxels]) -> list[list[int]]:
    """Neighbours whose voxels together are not too many for one latent stage."""
    found: list[list[int]] = []
    size = 0
    for i in here:
        if not found or size + len(voxels[i]) > PACKED_VOXELS:
            found.append([])
            size = 0
        found[-1].append(i)
        size += len(voxels[i])
    return found


def _velocity(flow: FlowTransformer, batch: Batch, tokens: Callable[[Tensor], Tensor | SparseTensor]) -> Velocity:
    """The conditions become keys and values once, unless somebody shows several views or leaves."""
    if (recorded := flow.recorded) is not None:
        return lambda x, t, *, guided, step: stages.split(recorded(x, t, batch.condition(step), guided=guided))
    kept: tuple[list[int], Context] | None = None
    nulls = flow.nulls()

    def velocity(x: Tensor, t: Tensor, *, guided: bool, step: int) -> tuple[Tensor, Tensor | None]:
        nonlocal kept
        if kept is not None and kept[0] == batch.here:
            context = kept[1]
        else:
            context = flow.context(batch.condition(step), null=nulls)
            if all(len(batch.requests[i].condition) == 1 for i in batch.here):
                kept = list(batch.here), context
        return stages.split(flow(tokens(x), t, context if guided else context.positive()))

    return velocity
