"""Compiles what runs most often: one flow block, shared by all blocks of both flow networks. Records what is always of
one size: the structure flow and its decoder, the image encoder.

Only the CUDA path is compiled. The compiled block takes any number of tokens, passes and views, so one warm-up serves
every request; its code is kept on disk by torch (TORCHINDUCTOR_CACHE_DIR), which makes the next start short.

Alone on an H100 a recorded evaluation is hardly faster (21.5 ms instead of 21.9): it is for hosts whose cores are busy,
see replay.py. A graph of the latent flow, whose size is each request's own, costs as much to record as it saves.
"""

import logging
import threading
import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from viewmesh.trellis.attention import planned_attention
from viewmesh.trellis.replay import Recorded
from viewmesh.trellis.transformer import Context, FlowBlock, FlowTransformer
from viewmesh.trellis.vit import DinoVisionTransformer

if TYPE_CHECKING:
    from viewmesh.trellis.stages import Networks

log = logging.getLogger(__name__)

# While one thread compiles, a call of what is compiled already fails in another one: torch's tracing is the process's.
_in_use = threading.Lock()
PATIENCE_S = 0.001  # a call takes a fraction of it, a compilation seconds


@cache
def compiled_block() -> Callable[..., Tensor]:
    """FlowBlock.forward compiled for shapes that vary; one per process, so that models share its code.

    Without guards on the block's own attributes: 24 blocks of one network differ in values alone, another network's
    width, heads and dtype are told by the tensors passed in, and checking hundreds of attributes per call took longer
    than the GPU's work.
    """
    unguarded: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    return torch.compile(FlowBlock.forward, dynamic=True, options=unguarded)


class CompiledFor:
    """Runs a block compiled for the kinds of conditions in `ready`, uncompiled for any other, while anything is being
    compiled, and from then on where the compiled code has failed: a job must not, for what only makes it faster."""

    def __init__(self, ready: frozenset[tuple[bool, bool]]) -> None:
        self.ready = ready

    def __call__(
        self,
        block: FlowBlock,
        x: Tensor,
        t_emb: Tensor,
        item: Tensor | None,
        kv: Tensor,
        null: Tensor | None,
        counts: Tensor,
    ) -> Tensor:
        known = item is None and (kv.shape[0] > 1, kv.shape[1] > 1) in self.ready
        if known and _in_use.acquire(timeout=PATIENCE_S):
            try:
                return compiled_block()(block, x, t_emb, None, kv, null, counts)
            except Exception as error:
                if _is_the_devices(error):
                    raise
                self.ready = frozenset()
                log.warning("The compiled flow block failed; the networks run uncompiled from now on.", exc_info=True)
            finally:
                _in_use.release()
        return block(x, t_emb, item, kv, null, counts)


def _is_the_devices(error: Exception) -> bool:
    """Whether the uncompiled block would fail, too: no memory, or a broken CUDA context."""
    return isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError) or "CUDA" in str(error)


@torch.no_grad()
def compile_flows(
    networks: "Networks", *, tokens: int, views: int = 1, passes: bool = False, batches: bool = False
) -> dict[str, float]:
    """Seconds by part, empty on a device without a compiler. Until the end of a part the networks run it uncompiled.

    tokens: of a view's condition. views: 2 when several views are averaged inside the cross-attentions. passes: compile
    for several conditioned passes at once too; batches: for several requests at once too.
    """
    if networks.device.type != "cuda":
        return {}
    flows = {"structure_flow": (networks.structure_flow, 1), "latent_flow": (networks.latent_flow, views)}
    seconds: dict[str, float] = {}
    ready: frozenset[tuple[bool, bool]] = frozenset()
    before = {name: getattr(flow.run_block, "ready", frozenset()) for name, (flow, _) in flows.items()}  # of a model
    # three, not two: a size that happens to equal another would be taken to always equal it
    for part, P, B in (("", 1, 1), (" in passes", 3, 1), (" in batches", 1, 3)):
        if (P > 1 and not passes) or (B > 1 and not batches):
            continue
        ready = ready | {(P > 1, B > 1)}
        for name, (flow, n) in flows.items():
            start = time.perf_counter()
            guided = flow.context(torch.zeros(P, B, n, tokens, flow.cond_channels, device=networks.device), null=True)
            for context in (guided, guided.positive()):
                _run_once(flow, context, B)
            torch.cuda.synchronize(networks.device)
            seconds[name + part] = time.perf_counter() - start
            flow.run_block = CompiledFor(ready | before[name])  # one assignment: calls in flight keep what they have
    return seconds


@torch.no_grad()
def record_structure(networks: "Networks", like: Tensor, items: int = 1) -> dict[str, float]:
    """The flow for one to `items` requests at once, each under one condition `like` (T, C'), and the decoder for one.
    Seconds by part, empty without CUDA."""
    if networks.device.type != "cuda":
        return {}
    start = time.perf_counter()
    flow, decoder = networks.structure_flow, networks.structure_decoder
    velocities, occupancy = flow.recorded or Recorded(flow.velocities), decoder.recorded or Recorded(decoder.forward)
    latent = torch.zeros(1, flow.in_channels, *(flow.resolution,) * 3, device=networks.device)
    with planned_attention():
        for B in range(1, items + 1):
            condition = like.expand(1, B, 1, *like.shape)
            for guided in (True, False):
                velocities.record(latent.repeat(B, 1, 1, 1, 1), latent.new_zeros(1), condition, guided=guided)
    occupancy.record(latent)
    flow.recorded, decoder.recorded = velocities, occupancy
    return {"structure graphs": time.perf_counter() - start}


@torch.no_grad()
def record_encoder(encoder: DinoVisionTransformer, images: int) -> dict[str, float]:
    """For one to `images` at once. Seconds by part, empty without CUDA."""
    if not encoder.pos_embed.is_cuda:
        return {}
    start = time.perf_counter()
    recorded = encoder.recorded or Recorded(encoder.forward)
    for n in range(1, images + 1):
        recorded.record(encoder.pos_embed.new_zeros(n, 3, encoder.image_size, encoder.image_size))
    encoder.recorded = recorded
    return {"encoder graphs": time.perf_counter() - start}


def _run_once(flow: FlowTransformer, context: Context, items: int) -> None:
    """The compiled block on two numbers of tokens."""
    block = flow.blocks[0]
    assert isinstance(block, FlowBlock)
    C = block.norm2.normalized_shape[0]
    t_emb = torch.zeros(1, C, device=context.kv[0].device, dtype=flow.dtype)
    null = None if context.null is None else context.null[0]
    for L in (4096, 2777):
        counts = torch.tensor([L] * (items - 1) + [L - 100 * (items > 1)])
        x = torch.zeros(context.passes, int(counts.sum()), C, device=t_emb.device, dtype=flow.dtype)
        with _in_use:
            compiled_block()(block, x, t_emb, None, context.kv[0], null, counts)
