"""The first stage: a dense flow transformer on a 16³ latent, and the decoder from that latent to 64³ occupancy."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from viewmesh.trellis.layers import ChannelLayerNorm32, TimestepEmbedder, position_embedding
from viewmesh.trellis.replay import Recorded
from viewmesh.trellis.transformer import Context, FlowBlock, FlowTransformer


class SparseStructureFlowModel(FlowTransformer):
    """The velocity of the structure latent: (B, 8, R, R, R) at time t, R = 16 in the published model."""

    def __init__(
        self,
        resolution: int,
        in_channels: int,
        model_channels: int,
        cond_channels: int,
        out_channels: int,
        num_blocks: int,
        num_heads: int,
        mlp_ratio: float = 4,
        patch_size: int = 1,
        pe_mode: str = "ape",
        qk_rms_norm: bool = False,
        **_: object,
    ) -> None:
        super().__init__()
        if patch_size != 1 or pe_mode != "ape":
            raise ValueError(f"Only patch_size 1 and pe_mode 'ape' are published, got {patch_size} and {pe_mode!r}.")
        self.resolution, self.in_channels = resolution, in_channels
        self.t_embedder = TimestepEmbedder(model_channels)
        axis = torch.arange(resolution)
        lattice = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
        self.pos_emb: Tensor
        self.register_buffer("pos_emb", position_embedding(lattice, model_channels))
        self.input_layer = nn.Linear(in_channels, model_channels)
        self.blocks = nn.ModuleList(
            FlowBlock(model_channels, cond_channels, num_heads, mlp_ratio, qk_rms_norm=qk_rms_norm)
            for _ in range(num_blocks)
        )
        self.out_layer = nn.Linear(model_channels, out_channels)

    def forward(self, x: Tensor, t: Tensor, context: Context) -> Tensor:
        """x (B, C, R, R, R); t (1,) or (B,) in [0, 1000] → velocities (P, B, C, R, R, R) float32."""
        B, n = x.shape[0], self.resolution**3
        tokens = x.flatten(2).mT.reshape(1, B, n, -1)  # (1, B, n, C)
        h = (self.input_layer(tokens) + self.pos_emb).reshape(1, B * n, -1).to(self.dtype)
        item = None if t.shape[0] == 1 else torch.arange(B, device=x.device).repeat_interleave(n)
        h = self.run_blocks(h, self.t_embedder(t), context, [n] * B, item).float()
        v = self.out_layer(F.layer_norm(h, h.shape[-1:]))
        return v.reshape(-1, B, n, v.shape[-1]).mT.reshape(-1, B, v.shape[-1], *x.shape[2:])


class ResBlock3d(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = ChannelLayerNorm32(channels)
        self.norm2 = ChannelLayerNorm32(channels)
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class UpsampleBlock3d(nn.Module):
    """Convolution to 8 times the channels, which become 2³ voxels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels * 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        B, C, *size = y.shape
        y = y.reshape(B, C // 8, 2, 2, 2, *size).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return y.reshape(B, C // 8, *(2 * n for n in size))


class SparseStructureDecoder(nn.Module):
    """Latent (B, 8, R, R, R) to occupancy logits (B, 1, 4R, 4R, 4R), float32; occupied where positive."""

    def __init__(
        self,
        out_channels: int,
        latent_channels: int,
        num_res_blocks: int,
        channels: list[int],
        num_res_blocks_middle: int = 2,
        norm_type: str = "layer",
        **_: object,
    ) -> None:
        super().__init__()
        if norm_type != "layer":
            raise ValueError(f"Only norm_type 'layer' is published, got {norm_type!r}.")
        self.recorded: Recorded | None = None  # the network for one item, see warm.py
        self.input_layer = nn.Conv3d(latent_channels, channels[0], 3, padding=1)
        self.middle_block = nn.Sequential(*(ResBlock3d(channels[0]) for _ in range(num_res_blocks_middle)))
        blocks: list[nn.Module] = []
        for i, width in enumerate(channels):
            blocks += [ResBlock3d(width) for _ in range(num_res_blocks)]
            if i + 1 < len(channels):
                blocks.append(UpsampleBlock3d(width, channels[i + 1]))
        self.blocks = nn.Sequential(*blocks)
        self.out_layer = nn.Sequential(
            ChannelLayerNorm32(channels[-1]), nn.SiLU(), nn.Conv3d(channels[-1], out_channels, 3, padding=1)
        )

    def forward(self, latent: Tensor) -> Tensor:
        h = self.input_layer(latent)
        torso = next(m for m in self.blocks.modules() if isinstance(m, nn.Conv3d)).weight.dtype
        return self.out_layer(self.blocks(self.middle_block(h.to(torso))).float())
