"""The shape pass's geometry: a signed distance lattice whose zero level is the mesh of the moment.

Two lattices behind one pair of functions, `surface` and `regularity`: tetrahedra (DMTet) for the CPU presets,
FlexiCubes for the GPU ones. The field is stored in units of one cell, negative inside.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from viewmesh.geometry.flexicubes import CubeGrid, extract, sparse_grid
from viewmesh.geometry.tets import TetGrid, bcc_grid, marching_tets, narrowed
from viewmesh.nvdiffrec.initial import Field
from viewmesh.nvdiffrec.losses import box_crossings, box_smoothness, crossings_of, field_smoothness, sign_entropy
from viewmesh.nvdiffrec.optim import Variables
from viewmesh.nvdiffrec.presets import Preset
from viewmesh.progress import check, never

BAND = 2.0  # cells: tetrahedra this near to the surface are looked at until the next `band`
BAND_EVERY = 20  # steps; a surface moves by well under BAND cells in that time


@dataclass(frozen=True, eq=False)
class TetShape:
    """A tetrahedral lattice and the band of it that is being looked at."""

    grid: TetGrid
    near: TetGrid

    @staticmethod
    def over(field: Field, preset: Preset, device: torch.device | str, cancelled: Callable[[], bool]) -> "TetShape":
        margin = 2.5 * float((field.upper - field.lower).max()) / preset.lattice
        grid = bcc_grid(field.lower - margin, field.upper + margin, preset.lattice, cancelled)
        moved = replace(
            grid,
            vertices=grid.vertices.to(device),
            tets=grid.tets.to(device),
            edges=grid.edges.to(device),
            tet_edges=grid.tet_edges.to(device),
        )
        return TetShape(moved, moved)

    def variables(self, field: Field) -> Variables:
        vertices = self.grid.vertices
        return {"sdf": field.at(vertices) / self.grid.cell, "deform": torch.zeros_like(vertices)}

    def band(self, sdf: Tensor) -> Tensor:
        """Which tetrahedra are near the present surface, (T,) bool."""
        return (sdf.abs() < BAND)[self.grid.tets].any(-1)

    def focused(self, band: Tensor | None) -> "TetShape":
        """With only the tetrahedra of a band; None is all of them."""
        return TetShape(self.grid, self.grid) if band is None else TetShape(self.grid, narrowed(self.grid, band))

    def surface(self, variables: Variables) -> tuple[Tensor, Tensor, Tensor]:
        """Vertices (V, 3), faces (F, 3) of the zero level and a penalty (none here).

        A lattice vertex moves by at most 0.45 of a half cell, so no tetrahedron turns over.
        """
        positions = self.grid.vertices + 0.45 * 0.5 * self.grid.cell * torch.tanh(variables["deform"])
        mesh = marching_tets(self.near, positions, variables["sdf"])
        return mesh.vertices, mesh.faces, mesh.vertices.new_zeros(())

    def final(self, variables: Variables) -> tuple[Tensor, Tensor]:
        """The surface as it leaves the pass, from the whole lattice."""
        vertices, faces, _ = TetShape(self.grid, self.grid).surface(variables)
        return vertices, faces

    def regularity(self, variables: Variables, preset: Preset, progress: float) -> Tensor:
        """Sign entropy and smoothness of the field; progress in [0, 1] fades them from their first to their last."""
        sdf = variables["sdf"]
        nx, ny, nz = self.grid.shape
        corners = (nx + 1) * (ny + 1) * (nz + 1)
        smooth = field_smoothness(
            sdf[:corners].reshape(nx + 1, ny + 1, nz + 1), sdf[corners:].reshape(nx, ny, nz), band=BAND
        )
        entropy = sign_entropy(sdf, crossings_of(sdf, self.near.edges))
        return fade(preset.sdf_sign, progress) * entropy + fade(preset.sdf_smooth, progress) * smooth


@dataclass(frozen=True, eq=False)
class FlexiShape:
    """A box of cubes; vertices (G, 3) scene units; points: how many of them along x, y, z; cell in scene units."""

    grid: CubeGrid
    vertices: Tensor
    points: tuple[int, int, int]
    cell: float

    @staticmethod
    def over(field: Field, preset: Preset, device: torch.device | str, cancelled: Callable[[], bool]) -> "FlexiShape":
        size = field.upper - field.lower
        cell = float(size.max()) / (preset.lattice - 5)
        counts = (torch.ceil(size / cell) + 5).long()
        axes = torch.meshgrid(*(torch.arange(int(n)) for n in counts), indexing="ij")
        grid = sparse_grid(torch.stack(axes, -1).reshape(-1, 3).to(device), int(counts.max()))
        check(cancelled)
        vertices = grid.points.float() * cell + (field.lower - 2.5 * cell).to(device)
        x, y, z = (counts + 1).tolist()
        return FlexiShape(grid, vertices, (x, y, z), cell)

    def variables(self, field: Field) -> Variables:
        return {
            "sdf": field.at(self.vertices) / self.cell,
            "deform": torch.zeros_like(self.vertices),
            "weights": torch.zeros(len(self.grid), 21, device=self.vertices.device),
        }

    def band(self, sdf: Tensor) -> None:
        """A GPU looks at the whole box."""

    def focused(self, band: Tensor | None) -> "FlexiShape":
        return self

    def surface(self, variables: Variables) -> tuple[Tensor, Tensor, Tensor]:
        """Vertices (V, 3), faces (F, 3) and L_dev in scene units; a lattice vertex moves by at most 0.45 of a cell."""
        positions = self.vertices + 0.45 * self.cell * torch.tanh(variables["deform"])
        mesh = extract(self.grid, positions, variables["sdf"], variables["weights"], split="four")
        return mesh.vertices, mesh.faces, mesh.l_dev

    def final(self, variables: Variables) -> tuple[Tensor, Tensor]:
        """The surface as it leaves the pass: two triangles a quad."""
        positions = self.vertices + 0.45 * self.cell * torch.tanh(variables["deform"])
        mesh = extract(self.grid, positions, variables["sdf"], variables["weights"])
        return mesh.vertices, mesh.faces

    def regularity(self, variables: Variables, preset: Preset, progress: float) -> Tensor:
        """Sign entropy, smoothness of the field, and weights that stay near their neutral value."""
        field = variables["sdf"].reshape(self.points)
        weights = variables["weights"].abs().mean(0)[:20].mean()  # all but gamma
        return (
            fade(preset.sdf_sign, progress) * sign_entropy(field, box_crossings(field))
            + fade(preset.sdf_smooth, progress) * box_smoothness(field, BAND)
            + preset.flexi_weights * weights
        )


Shape = TetShape | FlexiShape


def new_shape(field: Field, preset: Preset, device: torch.device, cancelled: Callable[[], bool] = never) -> Shape:
    """A lattice around the field's object. Raises Cancelled."""
    kind = {"dmtet": TetShape, "flexicubes": FlexiShape}[preset.surface]
    return kind.over(field, preset, device, cancelled)


def fade(weights: tuple[float, float], progress: float) -> float:
    """From the first weight to the last over the first half of the pass (nvdiffrec fades over the first quarter)."""
    first, last = weights
    return first + (last - first) * min(1.0, 2 * progress)
