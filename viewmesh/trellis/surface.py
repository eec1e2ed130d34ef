"""From the mesh decoder's 101 channels per voxel to a mesh, over the active voxels and what touches them.

The published decoder fills a dense lattice: points that no voxel touches are outside (sdf = +1), cubes without a voxel
have zero weights and still carry surface where they touch a negative point. Here those cubes are listed instead of the
volume, so memory follows the surface. Vertex and face order are those of the dense version.
"""

import torch
from torch import Tensor

from viewmesh.errors import EmptyReconstruction
from viewmesh.geometry.dual_tables import CORNERS
from viewmesh.geometry.flexicubes import CubeGrid, FlexiMesh, extract, key_point, point_key
from viewmesh.geometry.rows import contains

CHANNELS = {"sdf": (0, 8), "deform": (8, 32), "weights": (32, 53), "color": (53, 101)}
OUTSIDE = 1.0  # the sdf of a lattice point that no voxel touches


def surface_mesh(coords: Tensor, feats: Tensor, resolution: int) -> FlexiMesh:
    """coords (L, 3) integer, none twice; feats (L, 53) or (L, 101) → mesh in [-0.5, 0.5]³, +z up.

    attributes: (V, 6) in [0, 1], colour (sRGB) then normal (0.5 is zero), if the features have them.
    Raises EmptyReconstruction when no point is inside.
    """
    feats = feats.float()
    voxel = point_key(coords, resolution)
    points, values, touching, corner_row = _point_values(voxel, feats, resolution)
    sdf = values[:, 0] - 1 / resolution  # as in training: the surface is drawn a little outwards
    grid, values, sdf, voxel_of_cube = _surface_grid(voxel, points, values, sdf, touching, corner_row, resolution)

    weights = feats[:, slice(*CHANNELS["weights"])]
    weights = torch.where(voxel_of_cube[:, None] >= 0, weights[voxel_of_cube], 0.0)
    deform = (1 - 1e-8) / (resolution * 2) * values[:, 1:4].tanh()
    positions = grid.points / resolution - 0.5 + deform
    attributes = values[:, 4:].sigmoid() if values.shape[1] > 4 else None
    mesh = extract(grid, positions, sdf, weights, attributes)
    if len(mesh.faces) == 0:
        raise EmptyReconstruction("The mesh decoder's distances enclose no volume: no surface to mesh.")
    return mesh


def _point_values(voxel: Tensor, feats: Tensor, resolution: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Corner features averaged over the voxels that share the corner.

    Returns point keys (G,) sorted, values (G, 4 or 10) as sdf, deform, colour; the number of voxels at each (G,); and
    the row of each voxel's corners (L, 8).
    """
    offset = point_key(torch.tensor(CORNERS, device=voxel.device), resolution)
    points, row, touching = (voxel[:, None] + offset).unique(return_inverse=True, return_counts=True)
    L = len(voxel)
    names = ("sdf", "deform", "color") if feats.shape[1] > CHANNELS["color"][0] else ("sdf", "deform")
    values = torch.cat([feats[:, slice(*CHANNELS[name])].reshape(L, 8, -1) for name in names], -1)  # (L, 8, 10)
    total = values.new_zeros(len(points), values.shape[-1]).index_add_(0, row.flatten(), values.flatten(0, 1))
    return points, total / touching[:, None], touching, row


def _surface_grid(
    voxel: Tensor, points: Tensor, values: Tensor, sdf: Tensor, touching: Tensor, corner_row: Tensor, resolution: int
) -> tuple[CubeGrid, Tensor, Tensor, Tensor]:
    """The cubes that can carry surface, over their points; values and sdf of those; each cube's voxel row or -1."""
    offset = point_key(torch.tensor(CORNERS, device=voxel.device), resolution)
    inside = sdf < 0

    # a cube without a voxel carries surface only where it touches a negative point at the rim of the active region
    rim = points[inside & (touching < 8)]
    around = key_point(rim, resolution)[:, None] - torch.tensor(CORNERS, device=rim.device)  # (R, 8, 3)
    around = around[((around >= 0) & (around < resolution)).all(-1)]
    empty = point_key(around, resolution).unique()
    empty = empty[~contains(voxel.sort().values, empty)]

    count = inside[corner_row].sum(1)
    mixed = ((count > 0) & (count < 8)).nonzero()[:, 0]  # voxels with surface
    key = torch.cat([voxel[mixed], empty])
    key, order = key.sort()
    voxel_of_cube = torch.cat([mixed, torch.full_like(empty, -1)])[order]

    used, corners = (key[:, None] + offset).unique(return_inverse=True)
    at = torch.searchsorted(points, used).clamp(max=len(points) - 1)
    known = points[at] == used
    grid = CubeGrid(resolution, key_point(used, resolution), key_point(key, resolution), corners)
    values = torch.where(known[:, None], values[at], 0.0)
    return grid, values, torch.where(known, sdf[at], OUTSIDE), voxel_of_cube
