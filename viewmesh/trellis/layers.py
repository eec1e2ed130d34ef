"""The small layers that the TRELLIS networks share, under the names of their published state dicts.

Mixed precision rule of the published checkpoints: linear layers and convolutions of a network's torso are half
precision; norms, timestep embedding, input and output layers are float32. A layer here computes in the dtype of what
it is given and of its own weights; norms always in float32.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LayerNorm32(nn.LayerNorm):
    """Layer norm in float32, cast back to the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps).to(x.dtype)


class ChannelLayerNorm32(LayerNorm32):
    """Layer norm over dimension 1 of (B, C, D, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1).contiguous()


class MultiHeadRMSNorm(nn.Module):
    """Unit length per head times √D, times a gain per head and channel: (..., H, D)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(heads, dim))

    def forward(self, x: Tensor) -> Tensor:
        return (F.normalize(x.float(), dim=-1) * self.gamma * math.sqrt(x.shape[-1])).to(x.dtype)


class FeedForward(nn.Module):
    """Linear, GELU (tanh form), Linear. Keys `mlp.0`, `mlp.2`."""

    def __init__(self, channels: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(channels * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class TimestepEmbedder(nn.Module):
    """Sinusoids of t (B,), t in [0, 1000], through a small MLP: (B, C), float32."""

    FREQUENCIES = 128

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * self.FREQUENCIES, channels), nn.SiLU(), nn.Linear(channels, channels))

    def forward(self, t: Tensor) -> Tensor:
        half = self.FREQUENCIES
        exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angle = t.float()[:, None] * torch.exp(-math.log(10000) * exponent)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], -1))


def position_embedding(coords: Tensor, channels: int) -> Tensor:
    """Absolute sinusoidal embedding of integer coordinates (L, 3): (L, C) float32, x then y then z, zero-padded."""
    n = channels // 3 // 2
    exponent = torch.arange(n, dtype=torch.float32, device=coords.device) / n
    angle = coords.float()[..., None] * (1.0 / 10000**exponent)  # (L, 3, n)
    embedded = torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)
    return F.pad(embedded, (0, channels - embedded.shape[-1]))
