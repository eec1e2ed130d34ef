"""The second stage: a flow transformer on the features of the active voxels (structured latents)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from viewmesh.trellis.layers import LayerNorm32, TimestepEmbedder, position_embedding
from viewmesh.trellis.sparse import SparseTensor, Voxels, convolve, downsample
from viewmesh.trellis.transformer import Context, FlowBlock, FlowTransformer


class SubmanifoldConv(nn.Module):
    """Holds the weight of a 3x3x3 convolution under the key `conv`, laid out (Cout, 3, 3, 3, Cin)."""

    def __init__(self, in_channels: int, out_channels: int, size: int = 3) -> None:
        super().__init__()
        self.conv = nn.Module()
        self.conv.weight = nn.Parameter(torch.zeros(out_channels, size, size, size, in_channels))
        self.conv.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, feats: Tensor, table: Tensor) -> Tensor:
        return convolve(feats, table, self.conv.weight, self.conv.bias)  # type: ignore[arg-type]


class SparseResBlock3d(nn.Module):
    """Residual block on (..., L, C), modulated by the timestep; `move` changes the resolution first."""

    def __init__(self, in_channels: int, emb_channels: int, out_channels: int, move: str | None = None) -> None:
        super().__init__()
        assert move in (None, "down", "up"), move
        self.move = move
        self.norm1 = LayerNorm32(in_channels, eps=1e-6)
        self.norm2 = LayerNorm32(out_channels, eps=1e-6, elementwise_affine=False)
        self.conv1 = SubmanifoldConv(in_channels, out_channels)
        self.conv2 = SubmanifoldConv(out_channels, out_channels)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels))
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Linear(in_channels, out_channels)

    def forward(self, x: Tensor, voxels: Voxels, t_emb: Tensor) -> Tensor:
        """x lies on `voxels` ("up": on voxels.coarse), the result on `voxels` ("down": on voxels.coarse)."""
        if self.move == "down":
            x, voxels = downsample(x, voxels), voxels.coarse
        up = self.move == "up"
        # norm, activation and skip act on each voxel alone, so they come before copying parents to children
        h = self.conv1(F.silu(self.norm1(x)), voxels.neighbor_parents if up else voxels.neighbors)
        scale, shift = self.emb_layers(t_emb.to(x.dtype)).chunk(2, -1)
        if len(scale) > 1:
            scale, shift = scale[voxels.item], shift[voxels.item]
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift), voxels.neighbors)
        skip = self.skip_connection(x)
        return h + (skip.index_select(-2, voxels.parent) if up else skip)


class SLatFlowModel(FlowTransformer):
    """The velocity of structured latents (L, 8) at time t; the transformer runs on voxels of twice the size."""

    def __init__(
        self,
        resolution: int,
        in_channels: int,
        model_channels: int,
        cond_channels: int,
        out_channels: int,
        num_blocks: int,
        num_heads: int,
        io_block_channels: list[int],
        mlp_ratio: float = 4,
        patch_size: int = 2,
        num_io_res_blocks: int = 2,
        pe_mode: str = "ape",
        use_skip_connection: bool = True,
        qk_rms_norm: bool = False,
        **_: object,
    ) -> None:
        super().__init__()
        if patch_size != 2 or len(io_block_channels) != 1 or pe_mode != "ape" or not use_skip_connection:
            raise ValueError(
                "Only patch_size 2 with one io_block_channels entry, pe_mode 'ape' and skip connections is published, "
                f"got {patch_size}, {io_block_channels}, {pe_mode!r} and {use_skip_connection}."
            )
        self.resolution, self.in_channels, width = resolution, in_channels, io_block_channels[0]
        self.t_embedder = TimestepEmbedder(model_channels)
        self.input_layer = nn.Linear(in_channels, width)
        same = [(width, width, None)] * (num_io_res_blocks - 1)
        self.input_blocks = nn.ModuleList(
            SparseResBlock3d(a, model_channels, b, move) for a, b, move in [*same, (width, model_channels, "down")]
        )
        self.blocks = nn.ModuleList(
            FlowBlock(model_channels, cond_channels, num_heads, mlp_ratio, qk_rms_norm=qk_rms_norm)
            for _ in range(num_blocks)
        )
        self.out_blocks = nn.ModuleList(
            SparseResBlock3d(2 * a, model_channels, b, move)
            for a, b, move in [(model_channels, width, "up"), *[(width, width, None)] * (num_io_res_blocks - 1)]
        )
        self.out_layer = nn.Linear(width, out_channels)

    def forward(self, x: SparseTensor, t: Tensor, context: Context) -> Tensor:
        """x.feats (L, C); t (1,) or (B,) in [0, 1000] → velocities (P, L, C) float32."""
        voxels, coarse = x.voxels, x.voxels.coarse
        t_emb = self.t_embedder(t)
        h = self.input_layer(x.feats).to(self.dtype)
        skips = []
        for block in self.input_blocks:
            h = block(h, voxels, t_emb)
            skips.append(h)
        h = h + position_embedding(coarse.coords[:, 1:], h.shape[-1]).to(h.dtype)
        h = self.run_blocks(h[None], t_emb, context, list(coarse.counts), coarse.item)
        for block in self.out_blocks:
            skip = skips.pop()
            h = block(torch.cat([h, skip.expand(len(h), *skip.shape)], -1), voxels, t_emb)
        return self.out_layer(F.layer_norm(h, h.shape[-1:]).float())
