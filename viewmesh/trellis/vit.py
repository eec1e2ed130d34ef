"""Vision transformer parts with the state-dict names of DINOv2, and DINOv2 with registers itself."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from viewmesh.trellis.attention import attend
from viewmesh.trellis.replay import Recorded

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def imagenet_normalized(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] to zero mean and unit variance over ImageNet."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device)[:, None, None]
    std = torch.tensor(IMAGENET_STD, device=images.device)[:, None, None]
    return (images - mean) / std


class LayerScale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """In the layer's own dtype, so that a float32 residual stream can pass through half-precision layers."""
    return layer(x.to(layer.weight.dtype) if isinstance(layer, nn.Linear) else x)


class ViTAttention(nn.Module):
    def __init__(self, channels: int, heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.q_norm = nn.LayerNorm(channels // heads) if qk_norm else None
        self.k_norm = nn.LayerNorm(channels // heads) if qk_norm else None

    def forward(self, x: Tensor, rotate: Callable[[Tensor], Tensor] | None = None) -> Tensor:  # (B, L, C)
        q, k, v = linear(self.qkv, x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, L, H, D)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q.float()), self.k_norm(k.float())
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        return self.proj(attend(q.to(v.dtype), k.to(v.dtype), v).flatten(-2))


class ViTMlp(nn.Module):
    def __init__(self, channels: int, hidden: int, out_channels: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, out_channels or channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(linear(self.fc1, x)))


class ViTBlock(nn.Module):
    """x += ls1(attention(norm1 x)); x += ls2(mlp(norm2 x))."""

    def __init__(
        self, channels: int, heads: int, mlp_ratio: float = 4, *, qk_norm: bool = False, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=eps)
        self.attn = ViTAttention(channels, heads, qk_norm=qk_norm)
        self.ls1 = LayerScale(channels)
        self.norm2 = nn.LayerNorm(channels, eps=eps)
        self.mlp = ViTMlp(channels, int(channels * mlp_ratio))
        self.ls2 = LayerScale(channels)

    def forward(self, x: Tensor, rotate: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), rotate))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Images (B, 3, H, W), H and W multiples of the patch, to (B, H/p W/p, C), rows first."""

    def __init__(self, patch_size: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, channels, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images.to(self.proj.weight.dtype)).flatten(2).mT.float()


class DinoVisionTransformer(nn.Module):
    """DINOv2 with registers, for images of the size that it was trained at: no resampling of positions."""

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4,
        num_register_tokens: int = 4,
        **_: object,
    ) -> None:
        super().__init__()
        self.image_size = img_size
        self.recorded: Recorded | None = None  # the network for so many images, see warm.py
        patches = (img_size // patch_size) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, embed_dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, num_register_tokens, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))  # of training; in every checkpoint
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.blocks = nn.ModuleList(ViTBlock(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) to tokens before the last norm (B, T, C): class, registers, patches."""
        assert images.shape[-2:] == (self.image_size, self.image_size), images.shape
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), self.patch_embed(images)], 1) + self.pos_embed
        x = torch.cat([x[:, :1], self.register_tokens.expand(len(images), -1, -1), x[:, 1:]], 1)
        for block in self.blocks:
            x = block(x)
        return x

    @property
    def tokens(self) -> int:
        """Per image."""
        return self.pos_embed.shape[1] + self.register_tokens.shape[1]

    def patch_tokens(self, images: Tensor) -> Tensor:
        """(B, patches, C) after the last norm."""
        return self.norm(self(images))[:, 1 + self.register_tokens.shape[1] :]


def image_condition(model: DinoVisionTransformer, images: Tensor) -> Tensor:
    """Images (B, 3, S, S) in [0, 1] to TRELLIS's condition tokens (B, T, C), layer-normed without gain, float32."""
    tokens = (model.recorded or model)(imagenet_normalized(images)).float()
    return F.layer_norm(tokens, tokens.shape[-1:])
