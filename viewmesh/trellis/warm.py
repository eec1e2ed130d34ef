"""Compiles what runs most often: one flow block, shared by all blocks of both flow networks.

Only the CUDA path is compiled. The compiled block takes any number of tokens, so one warm-up serves every request; its
code is kept on disk by torch (TORCHINDUCTOR_CACHE_DIR), which makes the next start short.
"""

import time
from typing import TYPE_CHECKING

import torch

from viewmesh.trellis.transformer import FlowBlock, FlowTransformer

if TYPE_CHECKING:
    from viewmesh.trellis.stages import Networks


@torch.no_grad()
def compile_flows(networks: "Networks", image_size: int) -> dict[str, float]:
    """Seconds by part, empty on a device without a compiler. Until the end the networks run uncompiled."""
    if networks.device.type != "cuda":
        return {}
    compiled = torch.compile(FlowBlock.forward, dynamic=True)
    seconds = {}
    tokens = (image_size // 14) ** 2 + 5
    for name, flow in (("structure_flow", networks.structure_flow), ("latent_flow", networks.latent_flow)):
        start = time.perf_counter()
        _run_once(flow, compiled, tokens)
        torch.cuda.synchronize(networks.device)
        seconds[name] = time.perf_counter() - start
        flow.run_block = compiled  # one assignment: calls in flight go on with what they have
    return seconds


def _run_once(flow: FlowTransformer, compiled, tokens: int) -> None:
    """The compiled block on the shapes of a guided and of an unguided step, for two sizes each."""
    block = flow.blocks[0]
    assert isinstance(block, FlowBlock)
    device, dtype = block.norm2.weight.device, flow.dtype
    C = block.norm2.normalized_shape[0]
    condition = torch.zeros(1, 1, 1, tokens, block.cross_attn.to_kv.in_features, device=device)
    context = flow.context(condition, null=True)
    t_emb = torch.zeros(1, C, device=device, dtype=dtype)
    for L in (4096, 2777):
        for passes, null in ((2, context.null), (1, None)):
            x = torch.zeros(passes, L, C, device=device, dtype=dtype)
            compiled(block, x, t_emb, None, context.kv[0], None if null is None else null[0], [L])
