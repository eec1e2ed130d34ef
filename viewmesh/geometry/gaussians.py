"""Gaussians: what a generative model can hand out beside its mesh. A noun; nothing here draws."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussians:
    """G Gaussians, in the frame of whatever made them.

    centers (G, 3); colors (G, 3) sRGB, about [0, 1]; scales (G, 3) standard deviations; rotations (G, 4) unit
    quaternions, w first; opacities (G,) in [0, 1].
    """

    centers: Tensor
    colors: Tensor
    scales: Tensor
    rotations: Tensor
    opacities: Tensor

    def rotated(self, rotation: Tensor) -> "Gaussians":
        """In a frame turned by a (3, 3) rotation."""
        r = rotation.to(self.centers)
        turn = _quaternion(rotation).to(self.rotations)
        return replace(self, centers=self.centers @ r.mT, rotations=_quaternion_product(turn, self.rotations))

    def scaled(self, scale: float, shift: Tensor) -> "Gaussians":
        """In a frame scaled, then shifted by (3,)."""
        return replace(self, centers=self.centers * scale + shift.to(self.centers), scales=self.scales * scale)

    def tensors(self) -> dict[str, Tensor]:
        """By name, float32 on the CPU; Gaussians(**tensors) is the same again."""
        return {f.name: getattr(self, f.name).detach().float().cpu().contiguous() for f in fields(self)}


def _quaternion(rotation: Tensor) -> Tensor:
    """The unit quaternion (4,) float64, w first, of a (3, 3) rotation.

    Its outer product with itself, times four, is made of sums of the rotation's entries; the row of its largest
    component is the quaternion times something that is never small, half turns included (Shepperd 1978).
    """
    (a, b, c), (d, e, f), (g, h, i) = rotation.detach().double().cpu().tolist()
    outer = torch.tensor([
        [1 + a + e + i, h - f, c - g, d - b],
        [h - f, 1 + a - e - i, b + d, c + g],
        [c - g, b + d, 1 - a + e - i, f + h],
        [d - b, c + g, f + h, 1 - a - e + i],
    ], dtype=torch.float64)  # fmt: skip
    row = outer[outer.diagonal().argmax()]
    return row / row.norm()


def _quaternion_product(a: Tensor, b: Tensor) -> Tensor:
    """Hamilton product of (4,) and (G, 4), w first: the turn b, then the turn a."""
    w, v = b[:, :1], b[:, 1:]
    scalar = a[0] * w - (v * a[1:]).sum(-1, keepdim=True)
    return torch.cat([scalar, a[0] * v + w * a[1:] + torch.linalg.cross(a[1:].expand_as(v), v)], -1)
