"""ReconViaGen's condition networks: VGGT and DINOv2 tokens of N views to what the two flow networks attend to."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from viewmesh.trellis.transformer import PlainBlock

SPECIAL_TOKENS = 5  # class or camera token and four registers, first in both encoders' token rows


class ModulatedMultiViewCond(nn.Module):
    """Learned tokens that gather from all views: the condition of the structure stage, (B, 4096, 1024)."""

    def __init__(
        self,
        channels: int,
        ctx_channels: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qk_rms_norm: bool = True,
        num_init_tokens: int = 4096,
        **_: object,
    ) -> None:
        super().__init__()
        self.multiview_cond_tokens = nn.Parameter(torch.zeros(1, num_init_tokens, channels))
        self.cond_blocks = nn.ModuleList(
            PlainBlock(channels, ctx_channels, num_heads, mlp_ratio, qk_rms_norm=qk_rms_norm) for _ in range(4)
        )

    def forward(self, vggt: Sequence[Tensor], image: Tensor) -> Tensor:
        """vggt: four (B, N, T, 2048), layers 4, 11, 17, 23; image: (B, N, T, 1024); both with special tokens."""
        dtype = self.multiview_cond_tokens.dtype
        x = self.multiview_cond_tokens.expand(image.shape[0], -1, -1)
        for block, tokens in zip(self.cond_blocks, vggt, strict=True):
            both = torch.cat([tokens[:, :, SPECIAL_TOKENS:], image[:, :, SPECIAL_TOKENS:]], -1)
            x = block(x, both.flatten(1, 2).to(dtype))
        return x


class ModulatedSLATMultiViewCond(nn.Module):
    """Per view, DINOv2 tokens corrected by VGGT's: the condition of the latent stage, (B, N, T, 1024)."""

    def __init__(self, channels: int, ctx_channels: int, **_: object) -> None:
        super().__init__()
        self.linear_blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(ctx_channels, channels), nn.ReLU()) for _ in range(4)
        )

    def forward(self, vggt: Sequence[Tensor], image: Tensor) -> Tensor:
        """vggt: four (B, N, T, 2048), layers 4, 11, 17, 23; image: (B, N, T, 1024); both with special tokens."""
        c = image
        for block, tokens in zip(self.linear_blocks, vggt, strict=True):
            linear = block[0]  # type: ignore[index]
            c = F.relu(linear(torch.cat([tokens, c], -1).to(linear.weight.dtype))) + image
        return c
