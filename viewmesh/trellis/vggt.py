"""VGGT: the alternating-attention aggregator and the camera head, under their published names.

Wang et al. 2025, "VGGT: Visual Geometry Grounded Transformer". The aggregator keeps only the layers asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from viewmesh.trellis.vit import DinoVisionTransformer, PatchEmbed, ViTBlock, ViTMlp, imagenet_normalized, linear

USED_LAYERS = (4, 11, 17, 23)


@dataclass(frozen=True)
class Rotation2d:
    """Rotary embedding of patch rows (first half of a head) and columns (second half); cos, sin: (L, D)."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of_grid(cls, side: int, special: int, dim: int, device: torch.device, base: float = 100.0) -> "Rotation2d":
        """Positions (row + 1, column + 1) of side² patches, after `special` tokens at position 0."""
        axis = torch.arange(1, side + 1, device=device)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
        position = torch.cat([grid.new_zeros(special, 2), grid]).float()
        exponent = torch.arange(0, dim // 2, 2, device=device).float() / (dim // 2)
        angle = position[..., None] / base**exponent  # (L, 2, D/4)
        angle = torch.cat([angle, angle], -1).flatten(1)  # (L, D)
        return cls(angle.cos(), angle.sin())

    def __call__(self, x: Tensor) -> Tensor:
        """(B, n L, H, D), any number n of repetitions of the grid."""
        n = x.shape[1] // len(self.cos)
        cos, sin = (t.repeat(n, 1)[:, None].to(x.dtype) for t in (self.cos, self.sin))
        a, b = x.unflatten(-1, (2, 2, -1)).unbind(-2)  # each half of the head turns on its own
        turned = torch.stack([-b, a], -2).flatten(-3)
        return x * cos + turned * sin


class Aggregator(nn.Module):
    """Attention within each view and over all views in turn."""

    def __init__(
        self,
        img_size: int = 518,
        patch_size: int = 14,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_register_tokens: int = 4,
        patch_embed: str = "dinov2_vitl14_reg",
        **_: object,
    ) -> None:
        super().__init__()
        self.side, self.special = img_size // patch_size, 1 + num_register_tokens
        if patch_embed == "conv":
            self.patch_embed: nn.Module = PatchEmbed(patch_size, embed_dim)
        else:
            self.patch_embed = DinoVisionTransformer(img_size, patch_size, embed_dim, depth, num_heads)
        self.camera_token = nn.Parameter(torch.zeros(1, 2, 1, embed_dim))
        self.register_token = nn.Parameter(torch.zeros(1, 2, num_register_tokens, embed_dim))

        def blocks() -> nn.ModuleList:
            return nn.ModuleList(
                ViTBlock(embed_dim, num_heads, mlp_ratio, qk_norm=True, eps=1e-5) for _ in range(depth)
            )

        self.frame_blocks, self.global_blocks = blocks(), blocks()
        self.head_dim = embed_dim // num_heads

    def forward(self, images: Tensor, layers: Sequence[int] = USED_LAYERS) -> list[Tensor]:
        """Images (B, N, 3, S, S) in [0, 1] to the tokens of each of `layers`, (B, N, 5 + patches, 2 C) float32."""
        B, N = images.shape[:2]
        flat = imagenet_normalized(images.flatten(0, 1))
        if isinstance(self.patch_embed, DinoVisionTransformer):
            patches = torch.cat([self.patch_embed.patch_tokens(view) for view in flat.split(8)])
        else:
            patches = self.patch_embed(flat)
        # the first view has tokens of its own: it is the frame of reference
        which = (torch.arange(N, device=images.device) > 0).long().repeat(B)
        x = torch.cat([self.camera_token[0][which], self.register_token[0][which], patches], 1)  # (B N, T, C)
        rotate = Rotation2d.of_grid(self.side, self.special, self.head_dim, images.device)
        kept = {}
        for i in range(max(layers) + 1):
            x = frame = self.frame_blocks[i](x, rotate)
            x = self.global_blocks[i](x.reshape(B, -1, x.shape[-1]), rotate).reshape(x.shape)
            if i in layers:
                kept[i] = torch.cat([frame, x], -1).unflatten(0, (B, N)).float()
        return [kept[i] for i in layers]


class CameraHead(nn.Module):
    """Poses from the camera token, refined in four passes.

    Output (B, N, 9): translation 3, quaternion x y z w, vertical and horizontal field of view in radians; camera from
    world, OpenCV axes, the first view's camera is the world up to the scale that the network chose.
    """

    def __init__(self, dim_in: int = 2048, trunk_depth: int = 4, num_heads: int = 16, **_: object) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*(ViTBlock(dim_in, num_heads, eps=1e-5) for _ in range(trunk_depth)))
        self.token_norm, self.trunk_norm = nn.LayerNorm(dim_in), nn.LayerNorm(dim_in)
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, 9))
        self.embed_pose = nn.Linear(9, dim_in)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim_in, 3 * dim_in))
        self.pose_branch = ViTMlp(dim_in, dim_in // 2, 9)

    def forward(self, tokens: Tensor, iterations: int = 4) -> Tensor:
        """tokens: the aggregator's last layer (B, N, T, 2 C)."""
        camera = self.token_norm(tokens[:, :, 0])
        pose: Tensor | None = None
        for _ in range(iterations):
            embedded = linear(
                self.embed_pose, self.empty_pose_tokens.expand(*camera.shape[:2], -1) if pose is None else pose
            )
            shift, scale, gate = self.poseLN_modulation(embedded).chunk(3, -1)
            modulated = F.layer_norm(camera, camera.shape[-1:], eps=1e-6) * (1 + scale) + shift
            x = self.trunk(camera + gate * modulated)
            delta = self.pose_branch(self.trunk_norm(x)).float()
            pose = delta if pose is None else pose + delta
        assert pose is not None
        return torch.cat([pose[..., :7], F.relu(pose[..., 7:])], -1)
