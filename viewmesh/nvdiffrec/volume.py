"""The material of the shape pass: dense volumes over the scene, summed over a few resolutions.

Plays the part of nvdiffrec's hash grid and MLP. On a CPU a hash table in torch costs ten times as much (its scattered
gradient), and nothing here needs 4096^3.
"""

import torch
from torch import Tensor

CHANNELS = 5  # base colour (3), roughness, metallic
SPREAD = 4.0  # how far the sum of levels is stretched before the sigmoid


def new_volume(sides: tuple[int, ...], device: torch.device | str) -> dict[str, Tensor]:
    """Variables `volume0`, `volume1`, ...: (1, 5, D, D, D), indexed [z, y, x] as grid_sample wants it; all zero."""
    return {f"volume{i}": torch.zeros(1, CHANNELS, d, d, d, device=device) for i, d in enumerate(sides)}


def material_at(variables: dict[str, Tensor], points: Tensor, half: float) -> tuple[Tensor, Tensor]:
    """Base colour (P, 3) linear in [0, 1] and ORM (P, 3) at scene points (P, 3) of the cube [-half, half]^3.

    Roughness starts at 0.6 and stays in [0.15, 1], metallic starts near 0.05: dielectric until the views say otherwise.
    """
    grid = (points / half)[None, None, None]
    levels = [
        torch.nn.functional.grid_sample(v, grid, padding_mode="border", align_corners=False)
        for name, v in variables.items()
        if name.startswith("volume")
    ]
    x = torch.stack(levels).sum(0).reshape(CHANNELS, -1).T * SPREAD  # (P, 5)
    color, roughness, metallic = x.split((3, 1, 1), -1)
    roughness = 0.15 + 0.85 * torch.sigmoid(roughness + 0.1)
    metallic = torch.sigmoid(metallic - 3.0)
    return torch.sigmoid(color), torch.cat([torch.ones_like(roughness), roughness, metallic], -1)
