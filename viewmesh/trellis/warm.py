"""Compiles what runs most often: one flow block, shared by all blocks of both flow networks.

Only the CUDA path is compiled. The compiled block takes any number of tokens, passes and views, so one warm-up serves
every request; its code is kept on disk by torch (TORCHINDUCTOR_CACHE_DIR), which makes the next start short.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from viewmesh.trellis.transformer import Context, FlowBlock, FlowTransformer

if TYPE_CHECKING:
    from viewmesh.trellis.stages import Networks


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
    """Runs a block compiled for conditions of so many passes, uncompiled for any other."""

    def __init__(self, passes: set[int]) -> None:
        self.passes = passes

    def __call__(
        self,
        block: FlowBlock,
        x: Tensor,
        t_emb: Tensor,
        item: Tensor | None,
        kv: Tensor,
        null: Tensor | None,
        counts: list[int],
    ) -> Tensor:
        if item is None and min(kv.shape[0], 2) in self.passes:
            return compiled_block()(block, x, t_emb, None, kv, null, counts)
        return block(x, t_emb, item, kv, null, counts)


@torch.no_grad()
def compile_flows(networks: "Networks", *, tokens: int, views: int = 1, passes: int = 1) -> dict[str, float]:
    """Seconds by part, empty on a device without a compiler. Until the end the networks run uncompiled.

    tokens: of a view's condition. views: 2 when several views are averaged inside the cross-attentions. passes: 2 to
    compile for several conditioned passes at once too.
    """
    if networks.device.type != "cuda":
        return {}
    seconds = {}
    for name, flow, n in (("structure_flow", networks.structure_flow, 1), ("latent_flow", networks.latent_flow, views)):
        start = time.perf_counter()
        for p in range(1, passes + 1):
            condition = torch.zeros(p, 1, n, tokens, flow.cond_channels, device=networks.device)
            guided = flow.context(condition, null=True)
            for context in (guided, guided.positive()):
                _run_once(flow, context)
        torch.cuda.synchronize(networks.device)
        seconds[name] = time.perf_counter() - start
        flow.run_block = CompiledFor(set(range(1, passes + 1)))  # one assignment: calls in flight keep what they have
    return seconds


def _run_once(flow: FlowTransformer, context: Context) -> None:
    """The compiled block on two numbers of tokens."""
    block = flow.blocks[0]
    assert isinstance(block, FlowBlock)
    C = block.norm2.normalized_shape[0]
    t_emb = torch.zeros(1, C, device=context.kv[0].device, dtype=flow.dtype)
    null = None if context.null is None else context.null[0]
    for L in (4096, 2777):
        x = torch.zeros(context.passes, L, C, device=t_emb.device, dtype=flow.dtype)
        compiled_block()(block, x, t_emb, None, context.kv[0], null, [L])
