"""The transformer blocks of TRELLIS and the conditioning that they are given.

A condition enters a network only through the keys and values of its cross-attentions, so it is turned into those once
(`Context`) and used in every step. The unconditioned pass of guidance has a condition of zeros: every key is then the
same, and the whole cross-attention is one constant vector per block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from viewmesh.trellis.attention import WindowBucket, attend_to_context, attend_within_items, attend_within_windows
from viewmesh.trellis.layers import FeedForward, LayerNorm32, MultiHeadRMSNorm
from viewmesh.trellis.replay import Recorded


@dataclass(frozen=True)
class Context:
    """The conditions of a network's passes, as each block needs them.

    kv: per block (P, B, N, 2, T, H, D): P conditioned passes over B items, N views averaged after attention.
    null: per block (C,), the output of cross-attention under a condition of zeros, if there is such a last pass.
    """

    kv: tuple[Tensor, ...]
    null: tuple[Tensor, ...] | None

    @property
    def passes(self) -> int:
        return self.kv[0].shape[0] + (self.null is not None)

    def positive(self) -> "Context":
        """Without the unconditioned pass."""
        return replace(self, null=None)


class SelfAttention(nn.Module):
    def __init__(self, channels: int, heads: int, *, qk_rms_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, channels)
        self.q_rms_norm = MultiHeadRMSNorm(channels // heads, heads) if qk_rms_norm else None
        self.k_rms_norm = MultiHeadRMSNorm(channels // heads, heads) if qk_rms_norm else None

    def qkv(self, x: Tensor) -> Tensor:
        """(..., L, C) to (..., L, 3, H, D)."""
        return self.to_qkv(x).unflatten(-1, (3, self.heads, -1))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:  # (P, L, C)
        q, k, v = self.qkv(x).unbind(-3)
        if self.q_rms_norm is not None and self.k_rms_norm is not None:
            q, k = self.q_rms_norm(q), self.k_rms_norm(k)
        return self.to_out(attend_within_items(q, k, v, counts).flatten(-2))


class CrossAttention(nn.Module):
    def __init__(self, channels: int, context_channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels)
        self.to_kv = nn.Linear(context_channels, 2 * channels)
        self.to_out = nn.Linear(channels, channels)

    def kv(self, condition: Tensor) -> Tensor:
        """(..., T, C') to (..., 2, T, H, D)."""
        return self.to_kv(condition.to(self.to_kv.weight.dtype)).unflatten(-1, (2, self.heads, -1)).movedim(-3, -4)

    def null(self) -> Tensor:
        """(C,): the output for a condition of zeros, whatever the query."""
        return self.to_out(self.to_kv.bias.chunk(2)[1])

    def forward(self, x: Tensor, kv: Tensor, counts: Tensor) -> Tensor:  # (P, L, C)
        q = self.to_q(x).unflatten(-1, (self.heads, -1))
        return self.to_out(attend_to_context(q, kv, counts).flatten(-2))


class FlowBlock(nn.Module):
    """Self-attention, cross-attention, MLP; shift, scale and gate of the first and the last from the timestep."""

    def __init__(
        self, channels: int, context_channels: int, heads: int, mlp_ratio: float, *, qk_rms_norm: bool
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm32(channels, eps=1e-6, elementwise_affine=False)
        self.norm2 = LayerNorm32(channels, eps=1e-6)
        self.norm3 = LayerNorm32(channels, eps=1e-6, elementwise_affine=False)
        self.self_attn = SelfAttention(channels, heads, qk_rms_norm=qk_rms_norm)
        self.cross_attn = CrossAttention(channels, context_channels, heads)
        self.mlp = FeedForward(channels, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 6 * channels))

    def forward(
        self, x: Tensor, t_emb: Tensor, item: Tensor | None, kv: Tensor, null: Tensor | None, counts: Tensor
    ) -> Tensor:
        """x (P, L, C); t_emb (1, C) for all tokens, or (B, C) with item (L,) naming each token's row; counts (B,)."""
        modulation = self.adaLN_modulation(t_emb)
        if item is not None:
            modulation = modulation[item]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)
        x = x + gate1 * self.self_attn(self.norm1(x) * (1 + scale1) + shift1, counts)
        conditioned = kv.shape[0]
        crossed = self.cross_attn(self.norm2(x[:conditioned]), kv, counts)
        if null is not None:
            crossed = torch.cat([crossed, null.expand(x.shape[0] - conditioned, *x.shape[1:])])
        x = x + crossed
        return x + gate2 * self.mlp(self.norm3(x) * (1 + scale2) + shift2)


class PlainBlock(nn.Module):
    """FlowBlock without a timestep and with separate query tokens: the ReconViaGen condition network's block."""

    def __init__(
        self, channels: int, context_channels: int, heads: int, mlp_ratio: float, *, qk_rms_norm: bool
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm32(channels, eps=1e-6, elementwise_affine=False)
        self.norm2 = LayerNorm32(channels, eps=1e-6)
        self.norm3 = LayerNorm32(channels, eps=1e-6, elementwise_affine=False)
        self.self_attn = SelfAttention(channels, heads, qk_rms_norm=qk_rms_norm)
        self.cross_attn = CrossAttention(channels, context_channels, heads)
        self.mlp = FeedForward(channels, mlp_ratio)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:  # (B, L, C), (B, T, C')
        counts = torch.tensor([x.shape[1]])
        x = x + self.self_attn(self.norm1(x), counts)
        x = x + self.cross_attn(self.norm2(x), self.cross_attn.kv(context)[:, None, None], counts)
        return x + self.mlp(self.norm3(x))


class WindowBlock(nn.Module):
    """The decoders' block: attention within windows, then MLP; norms without gains."""

    def __init__(self, channels: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm32(channels, eps=1e-6, elementwise_affine=False)
        self.norm2 = LayerNorm32(channels, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(channels, heads, qk_rms_norm=False)
        self.mlp = FeedForward(channels, mlp_ratio)

    def forward(self, x: Tensor, windows: Sequence[WindowBucket]) -> Tensor:  # (L, C)
        x = x + self.attn.to_out(attend_within_windows(self.attn.qkv(self.norm1(x)), windows).flatten(-2))
        return x + self.mlp(self.norm2(x))


class FlowTransformer(nn.Module):
    """A stack of FlowBlocks. Subclasses add what comes before and after it."""

    blocks: nn.ModuleList
    run_block: Callable[..., Tensor] = staticmethod(nn.Module.__call__)  # replaced by its compiled form, see warm.py
    recorded: Recorded | None = None  # `velocities`, for a network whose tokens are always as many, see warm.py

    @property
    def dtype(self) -> torch.dtype:
        """Of the torso."""
        block = self.blocks[0]
        assert isinstance(block, FlowBlock)
        return block.mlp.mlp[0].weight.dtype  # type: ignore[return-value]

    @property
    def cond_channels(self) -> int:
        block = self.blocks[0]
        assert isinstance(block, FlowBlock)
        return block.cross_attn.to_kv.in_features

    def velocities(self, x: Tensor, t: Tensor, condition: Tensor, *, guided: bool) -> Tensor:
        """The passes under conditions (P, B, N, T, C'), and that under one of zeros if `guided`: (P, ...), float32."""
        return self(x, t, self.context(condition, null=guided))

    @torch.no_grad()
    def context(
        self, condition: Tensor, negative: Tensor | None = None, *, null: bool | tuple[Tensor, ...] = False
    ) -> Context:
        """Conditions (P, B, N, T, C') → Context; `negative` is one more such pass, `null` one with zeros: True, or
        what `nulls` returned."""
        if negative is not None:
            condition = torch.cat([condition, negative.expand_as(condition[:1])])
        condition = condition.to(self.dtype)
        kv = tuple(block.cross_attn.kv(condition) for block in self.blocks)  # type: ignore[operator]
        return Context(kv, (self.nulls() if null is True else null) or None)

    @torch.no_grad()
    def nulls(self) -> tuple[Tensor, ...]:
        """The same for all conditions."""
        return tuple(block.cross_attn.null() for block in self.blocks)  # type: ignore[operator]

    def run_blocks(self, x: Tensor, t_emb: Tensor, context: Context, counts: list[int], item: Tensor | None) -> Tensor:
        """x (1 or P, L, C) through all blocks, as P = context.passes passes."""
        x = x.expand(context.passes, *x.shape[1:]).contiguous()
        t_emb = t_emb.to(x.dtype)
        if t_emb.shape[0] == 1:
            item = None
        lengths = torch.tensor(counts)  # a tensor: a compiled block then takes any number of items
        for i, block in enumerate(self.blocks):
            null = None if context.null is None else context.null[i]
            x = self.run_block(block, x, t_emb, item, context.kv[i], null, lengths)
        return x
