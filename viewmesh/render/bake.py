"""Between a surface and its textures: which surface point each texel shows, values there, and filling the gaps.

Any device; no optimisation and no files. Textures have row 0 at the top and UV (0, 0) in the top-left corner.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from viewmesh.geometry.texels import texels_inside

BORDER = 2  # texels around a chart that belong to it: a bilinear lookup inside reaches one, a diagonal one a bit more


@dataclass(frozen=True)
class TexelMap:
    """face: (H, W) int64, the face whose point a texel's centre shows, -1 outside the charts and their border.
    barycentric: (H, W, 3) float32 weights of that face's corners, 0 where face is -1.
    inside: (H, W) bool, True where the centre itself lies in the chart, False in its border."""

    face: Tensor  # (H, W)
    barycentric: Tensor  # (H, W, 3)
    inside: Tensor  # (H, W)

    @property
    def valid(self) -> Tensor:
        """(H, W) bool, True where the texel shows a surface point."""
        return self.face >= 0


def texel_map(uvs: Tensor, uv_faces: Tensor, size: int) -> TexelMap:
    """The surface point at each texel centre of a size x size texture.

    uvs: (T, 2) in [0, 1]; uv_faces: (F, 3). Where faces share an edge through a centre, the lower face number wins.
    Texels just outside a chart that bilinear lookups inside it touch take the nearest point of the face nearest them.
    """
    corners = uvs.detach().double()[uv_faces] * size
    face, x, y, weight = texels_inside(corners, margin=-1e-6)
    inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    face, texel, weight = face[inside], (y * size + x)[inside], weight[inside]
    winner = torch.full((size * size,), len(uv_faces), dtype=torch.long, device=uvs.device)
    winner.scatter_reduce_(0, texel, face, "amin")
    wins = winner[texel] == face
    barycentric = torch.zeros(size * size, 3, dtype=torch.float64, device=uvs.device)
    barycentric[texel[wins]] = weight[wins]
    covered = winner < len(uv_faces)
    winner[~covered] = -1
    winner, barycentric = _with_border(winner, barycentric, corners, size)
    barycentric = barycentric.clamp(min=0)
    barycentric = barycentric / barycentric.sum(-1, keepdim=True).clamp(min=1e-12)
    return TexelMap(winner.view(size, size), barycentric.float().view(size, size, 3), covered.view(size, size))


def sample_at(texels: TexelMap, values: Tensor, faces: Tensor) -> Tensor:
    """values (V, C) of the corners that faces (F, 3) name, interpolated at every texel: (H, W, C), 0 where invalid."""
    out = torch.zeros(*texels.face.shape, values.shape[-1], dtype=values.dtype, device=values.device)
    valid = texels.valid
    corners = values[faces[texels.face[valid]]]  # (K, 3, C)
    out[valid] = (corners * texels.barycentric[valid][..., None].to(values.dtype)).sum(1)
    return out


def dilate(image: Tensor, valid: Tensor, texels: int = 8) -> Tensor:
    """image (H, W, C) with every invalid texel filled, so that neither bilinear lookups nor mips bleed.

    valid: (H, W) bool. Up to `texels` away from the charts the nearest valid colour, further out a smooth blend
    (pull-push). Valid texels are not touched; with none valid, the image is returned as it is.
    """
    if not bool(valid.any()) or bool(valid.all()):
        return image
    nearest, distance = _nearest_valid(valid)
    out = _pull_push(image, valid)
    near = (distance <= texels) & ~valid
    flat = image.reshape(-1, image.shape[-1])
    out[near] = flat[nearest[near]]
    out[valid] = image[valid]
    return out


def _with_border(winner: Tensor, barycentric: Tensor, corners: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """winner (S,) and barycentric (S, 3) extended by BORDER texels; the weights there are not clamped yet."""
    valid = (winner >= 0).view(size, size)
    if not bool(valid.any()):
        return winner, barycentric
    nearest, distance = _nearest_valid(valid)
    border = torch.nonzero(((distance <= BORDER) & ~valid).view(-1))[:, 0]
    face = winner[nearest.view(-1)[border]]
    centre = torch.stack([border % size, border // size], 1) + 0.5
    winner, barycentric = winner.clone(), barycentric.clone()
    winner[border] = face
    barycentric[border] = _closest_in_triangle(centre.double(), corners[face])
    return winner, barycentric


def _closest_in_triangle(point: Tensor, corners: Tensor) -> Tensor:
    """Barycentric (K, 3) of the point on the border of triangles (K, 3, 2) nearest to points (K, 2) outside them."""
    start, edge = corners, corners.roll(-1, 1) - corners
    t = ((point[:, None] - start) * edge).sum(-1) / (edge * edge).sum(-1).clamp(min=1e-30)
    t = t.clamp(0, 1)
    distance = (start + t[..., None] * edge - point[:, None]).norm(dim=-1)  # (K, 3)
    best = distance.argmin(1)
    t = t.gather(1, best[:, None])
    out = torch.zeros(len(point), 3, dtype=point.dtype, device=point.device)
    out.scatter_(1, best[:, None], 1 - t)
    return out.scatter_(1, ((best + 1) % 3)[:, None], t)


def _nearest_valid(valid: Tensor) -> tuple[Tensor, Tensor]:
    """For each texel the flat index (H, W) of the nearest valid one and its distance (H, W) in texels."""
    mask = valid.cpu().numpy()
    distance, label = cv2.distanceTransformWithLabels(
        (~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    label = np.asarray(label, np.int64)
    index_of_label = np.zeros(int(label.max()) + 1, np.int64)
    index_of_label[label[mask]] = np.flatnonzero(mask)
    return torch.from_numpy(index_of_label[label]).to(valid.device), torch.from_numpy(distance).to(valid.device)


def _pull_push(image: Tensor, valid: Tensor) -> Tensor:
    """Gortler et al. 1996: average valid texels into ever coarser images, then fill each from the coarser one."""
    color = (image * valid[..., None]).permute(2, 0, 1)[None]
    weight = valid.to(image.dtype)[None, None]
    levels = []
    while min(color.shape[-2:]) > 1:
        levels.append((color, weight))
        color, weight = (
            interpolate(color, scale_factor=0.5, mode="area"),
            interpolate(weight, scale_factor=0.5, mode="area"),
        )
        color, weight = color / weight.clamp(min=1e-8) * (weight > 0), (weight > 0).to(image.dtype)
    filled = color
    for color, weight in reversed(levels):
        coarse = interpolate(filled, size=color.shape[-2:], mode="bilinear", align_corners=False)
        filled = torch.where(weight > 0, color, coarse)
    return filled[0].permute(1, 2, 0).contiguous()
