"""From structured latents to Gaussians and to the 101 channels per fine voxel that become a mesh."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from viewmesh.geometry.gaussians import Gaussians
from viewmesh.trellis.layers import position_embedding
from viewmesh.trellis.slat_flow import SubmanifoldConv
from viewmesh.trellis.sparse import SparseTensor, Voxels, group_norm
from viewmesh.trellis.transformer import WindowBlock

SH_DC = 0.28209479177387814  # the constant spherical harmonic


class WindowTransformer(nn.Module):
    """Blocks of attention within windows of size³, every other one shifted by half a window."""

    blocks: nn.ModuleList

    def __init__(
        self,
        model_channels: int,
        latent_channels: int,
        num_blocks: int,
        num_heads: int,
        mlp_ratio: float,
        window_size: int,
        attn_mode: str,
    ) -> None:
        super().__init__()
        if attn_mode != "swin":
            raise ValueError(f"Only attn_mode 'swin' is published, got {attn_mode!r}.")
        self.window_size = window_size
        self.input_layer = nn.Linear(latent_channels, model_channels)
        self.blocks = nn.ModuleList(WindowBlock(model_channels, num_heads, mlp_ratio) for _ in range(num_blocks))

    def transform(self, x: SparseTensor) -> Tensor:
        """(L, 8) float32 to (L, C) in the torso's dtype."""
        h = self.input_layer(x.feats)
        h = h + position_embedding(x.voxels.coords[:, 1:], h.shape[-1])
        h = h.to(self.blocks[0].mlp.mlp[0].weight.dtype)  # type: ignore[union-attr, index]
        for i, block in enumerate(self.blocks):
            h = block(h, x.voxels.windows(self.window_size, self.window_size // 2 * (i % 2)))
        return h


class SLatGaussianDecoder(WindowTransformer):
    """A fixed number of Gaussians per voxel."""

    def __init__(
        self,
        resolution: int,
        model_channels: int,
        latent_channels: int,
        num_blocks: int,
        representation_config: dict[str, Any],
        num_heads: int,
        mlp_ratio: float = 4,
        attn_mode: str = "swin",
        window_size: int = 8,
        **_: object,
    ) -> None:
        super().__init__(model_channels, latent_channels, num_blocks, num_heads, mlp_ratio, window_size, attn_mode)
        self.resolution, self.config = resolution, representation_config
        n = representation_config["num_gaussians"]
        self.offset_perturbation: Tensor
        self.register_buffer("offset_perturbation", torch.zeros(n, 3))
        self.sizes = {"_xyz": 3, "_features_dc": 3, "_scaling": 3, "_rotation": 4, "_opacity": 1}
        self.out_layer = nn.Linear(model_channels, n * sum(self.sizes.values()))

    def forward(self, x: SparseTensor) -> list[Gaussians]:
        h = self.transform(x).float()
        h = self.out_layer(F.layer_norm(h, h.shape[-1:]))
        items = zip(x.with_feats(h).item_feats(), x.voxels.coords.split(list(x.voxels.counts)), strict=True)
        return [self._activate(feats, coords) for feats, coords in items]

    def _activate(self, feats: Tensor, coords: Tensor) -> Gaussians:
        c, n = self.config, self.config["num_gaussians"]
        parts = feats.split([n * size for size in self.sizes.values()], -1)
        raw = {
            name: part.reshape(len(feats), n, size) * c["lr"][name]
            for (name, size), part in zip(self.sizes.items(), parts, strict=True)
        }
        offset = raw["_xyz"] + self.offset_perturbation if c["perturb_offset"] else raw["_xyz"]
        offset = offset.tanh() / self.resolution * 0.5 * c["voxel_size"]
        centers = (coords[:, None, 1:] + 0.5) / self.resolution + offset - 0.5
        if c["scaling_activation"] != "softplus":
            raise ValueError(f"Only scaling_activation 'softplus' is published, got {c['scaling_activation']!r}.")
        scale_bias = c["scaling_bias"] + math.log(-math.expm1(-c["scaling_bias"]))  # inverse softplus
        scales = (F.softplus(raw["_scaling"] + scale_bias).square() + c["3d_filter_kernel_size"] ** 2).sqrt()
        identity = torch.tensor([1.0, 0, 0, 0], device=feats.device)
        opacity = (raw["_opacity"] + math.log(c["opacity_bias"] / (1 - c["opacity_bias"]))).sigmoid()
        return Gaussians(
            centers.flatten(0, 1),
            (SH_DC * raw["_features_dc"] + 0.5).flatten(0, 1),
            scales.flatten(0, 1),
            F.normalize(raw["_rotation"] + identity, dim=-1).flatten(0, 1),
            opacity.flatten(),
        )


class GroupNorm32(nn.GroupNorm):
    """Group norm over the voxels of each item, in float32."""

    def sparse(self, x: Tensor, counts: tuple[int, ...]) -> Tensor:
        return group_norm(x, counts, self.num_groups, self.weight, self.bias, self.eps)


class SubdivideBlock3d(nn.Module):
    """A residual block that splits every voxel into 8. Keys act_layers.0, out_layers.{0,1,3}, skip_connection."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.act_layers = nn.Sequential(GroupNorm32(32, in_channels), nn.SiLU())
        self.out_layers = nn.Sequential(
            SubmanifoldConv(in_channels, out_channels),
            GroupNorm32(32, out_channels),
            nn.SiLU(),
            SubmanifoldConv(out_channels, out_channels),
        )
        self.skip_connection = SubmanifoldConv(in_channels, out_channels, size=1)

    def forward(self, x: Tensor, voxels: Voxels) -> Tensor:
        """(L, C) on `voxels` to (8 L, C') on voxels.subdivided."""
        fine = voxels.subdivided
        norm, conv1, norm1, conv2 = self.act_layers[0], self.out_layers[0], self.out_layers[1], self.out_layers[3]
        assert isinstance(norm, GroupNorm32)
        assert isinstance(norm1, GroupNorm32)
        # norm and activation act alike on the 8 copies of a voxel, so they come before copying
        h = conv1(F.silu(norm.sparse(x, voxels.counts)), fine.neighbor_parents)
        h = conv2(F.silu(norm1.sparse(h, fine.counts)), fine.neighbors)
        skip = self._skip(x)
        return (h.unflatten(0, (-1, 8)) + skip[:, None]).flatten(0, 1)

    def _skip(self, x: Tensor) -> Tensor:
        # The weight is stored (Cout, 1, 1, 1, Cin), but the library that trained it read the same memory as
        # (Cin, Cout): a reinterpretation, not a transpose.
        weight, bias = self.skip_connection.conv.weight, self.skip_connection.conv.bias
        assert isinstance(weight, Tensor)
        assert isinstance(bias, Tensor)
        return torch.addmm(bias, x, weight.reshape(x.shape[-1], -1))


class SLatMeshDecoder(WindowTransformer):
    """Latents at 64³ to 101 channels per voxel at 256³ (see `surface.CHANNELS`)."""

    def __init__(
        self,
        resolution: int,
        model_channels: int,
        latent_channels: int,
        num_blocks: int,
        representation_config: dict[str, Any],
        num_heads: int,
        mlp_ratio: float = 4,
        attn_mode: str = "swin",
        window_size: int = 8,
        **_: object,
    ) -> None:
        super().__init__(model_channels, latent_channels, num_blocks, num_heads, mlp_ratio, window_size, attn_mode)
        self.resolution = resolution
        self.upsample = nn.ModuleList(
            [
                SubdivideBlock3d(model_channels, model_channels // 4),
                SubdivideBlock3d(model_channels // 4, model_channels // 8),
            ]
        )
        self.out_layer = nn.Linear(model_channels // 8, 101 if representation_config.get("use_color") else 53)

    def forward(self, x: SparseTensor) -> SparseTensor:
        h, voxels = self.transform(x), x.voxels
        for block in self.upsample:
            h, voxels = block(h, voxels), voxels.subdivided
        return SparseTensor(self.out_layer(h.float()), voxels)
