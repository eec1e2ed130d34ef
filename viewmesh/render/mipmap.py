"""Mip levels, and the look-ups that need no compiled code. Shared by every back-end of our own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from viewmesh.render.cubemap import face_coordinates


def mip_chain(texture: Tensor, mips: Sequence[Tensor] | None = None) -> list[Tensor]:
    """The levels below texture (H, W, C) or (6, R, R, C): those given, or averages of 2x2 texels down to one.

    Raises ValueError if levels must be built and a side is not a power of two.
    """
    if mips is not None:
        return list(mips)
    H, W = texture.shape[-3:-1]
    if H & (H - 1) or W & (W - 1):
        raise ValueError(f"Trilinear filtering of a {H}x{W} texture needs sides that are powers of two, or `mips`.")
    chain, level = [], texture
    while max(level.shape[-3:-1]) > 1:
        level = halved(level)
        chain.append(level)
    return chain


def halved(texture: Tensor) -> Tensor:
    """Averages of 2x2 texels (2x1 where a side is 1 already), (..., H, W, C) to (..., H/2, W/2, C)."""
    H, W, C = texture.shape[-3:]
    pairs = (min(H, 2), min(W, 2))
    pooled = torch.nn.functional.avg_pool2d(texture.reshape(-1, H, W, C).permute(0, 3, 1, 2), pairs)
    return pooled.permute(0, 2, 3, 1).reshape(*texture.shape[:-3], H // pairs[0], W // pairs[1], C)


def footprint_level(texture: Tensor, uv_da: Tensor | None, level: Tensor | None, levels: int) -> Tensor:
    """The mip level (...,) of each look-up, in [0, levels - 1]: given, or log2 of the footprint's long axis in texels.

    uv_da: (..., 4) du/dX, du/dY, dv/dX, dv/dY. The footprint of a pixel is the ellipse J J^T (Heckbert 1989); the
    square of its long axis is the larger eigenvalue.
    """
    if level is None:
        if uv_da is None:
            raise ValueError("Trilinear filtering needs uv_da or level.")
        H, W = texture.shape[-3:-1]
        ux, uy, vx, vy = (uv_da * uv_da.new_tensor([W, W, H, H])).unbind(-1)
        xx, yy, xy = ux * ux + vx * vx, uy * uy + vy * vy, ux * uy + vx * vy
        square = 0.5 * (xx + yy) + torch.sqrt(0.25 * (xx - yy) ** 2 + xy * xy + 1e-30)
        level = 0.5 * torch.log2(square.clamp_min(1e-20))
    return level.clamp(0, levels - 1)


def nearest(texture: Tensor, uv: Tensor, boundary: str) -> Tensor:
    """The texel that uv lies in; gradients go to the texture only."""
    shape, C = uv.shape[:-1], texture.shape[-1]
    H, W = texture.shape[-3:-1]
    with torch.no_grad():
        if boundary == "cube":
            st, face = face_coordinates(uv.reshape(-1, 3))
        else:
            st, face = uv.reshape(-1, 2), 0
        x, y = torch.floor(st[:, 0] * W).nan_to_num(0).long(), torch.floor(st[:, 1] * H).nan_to_num(0).long()
        inside = (x >= 0) & (x < W) & (y >= 0) & (y < H)
        x, y = (x % W, y % H) if boundary == "wrap" else (x.clamp(0, W - 1), y.clamp(0, H - 1))
        index = (face * H + y) * W + x
    out = texture.reshape(-1, C).index_select(0, index)
    if boundary == "zero":
        out = torch.where(inside[:, None], out, torch.zeros_like(out))
    return out.reshape(*shape, C)
