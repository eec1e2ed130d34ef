"""Deep marching tetrahedra on a body-centred cubic lattice: a differentiable iso-surface for the CPU presets.

Shen et al. 2021, "Deep Marching Tetrahedra". The lattice is BCC: cube corners and cube centres; each pair of cubes that
share a face gives four tetrahedra, all congruent and far from slivers. Knows nothing of images or losses.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from viewmesh.progress import check, never

# Edges of a tetrahedron (a, b, c, d) as pairs of its corners.
_EDGES = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


@dataclass(frozen=True)
class TetGrid:
    """A tetrahedral lattice with its edges numbered once, so that no step has to search for shared edges.

    vertices: (G, 3) float32. tets: (T, 4) int64, positively oriented. edges: (E, 2) int64, each edge once.
    tet_edges: (T, 6) int64 into edges, in the order ab ac ad bc bd cd. cell: edge length of the cubes, scene units.
    shape: cubes along x, y, z.
    """

    vertices: Tensor  # (G, 3)
    tets: Tensor  # (T, 4)
    edges: Tensor  # (E, 2)
    tet_edges: Tensor  # (T, 6)
    cell: float
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class IsoSurface:
    """vertices (V, 3) and values (V, K) differentiable; faces (F, 3) int64, outward where the field is negative inside;
    edges (V,) int64: the lattice edge that each vertex lies on."""

    vertices: Tensor
    faces: Tensor
    values: Tensor
    edges: Tensor


def bcc_grid(lower: Tensor, upper: Tensor, resolution: int, cancelled: Callable[[], bool] = never) -> TetGrid:
    """A lattice over the box [lower, upper], (3,) each, with `resolution` cubes along its longest side.

    The outermost half cell has no tetrahedra (only faces between two cubes make them): leave a margin of one cell.
    Raises Cancelled between its parts: a lattice of 80 has seven million edges.
    """
    size = (upper - lower).double()
    cell = float(size.max()) / resolution
    nx, ny, nz = (max(2, int(n)) for n in torch.ceil(size / cell - 1e-6))
    corner_count = (nx + 1) * (ny + 1) * (nz + 1)

    def corner(i: Tensor) -> Tensor:  # (..., 3) lattice index → vertex number
        return (i[..., 0] * (ny + 1) + i[..., 1]) * (nz + 1) + i[..., 2]

    def center(i: Tensor) -> Tensor:
        return corner_count + (i[..., 0] * ny + i[..., 1]) * nz + i[..., 2]

    def lattice(a: int, b: int, c: int) -> Tensor:  # (a*b*c, 3)
        return torch.stack(
            torch.meshgrid(torch.arange(a), torch.arange(b), torch.arange(c), indexing="ij"), -1
        ).reshape(-1, 3)

    vertices = torch.cat([lattice(nx + 1, ny + 1, nz + 1).double(), lattice(nx, ny, nz).double() + 0.5])
    tets = []
    counts = (nx, ny, nz)
    for axis in range(3):
        step = torch.eye(3, dtype=torch.int64)[axis]
        u = torch.eye(3, dtype=torch.int64)[(axis + 1) % 3]
        v = torch.eye(3, dtype=torch.int64)[(axis + 2) % 3]
        low = lattice(
            *(n - 1 if a == axis else n for a, n in enumerate(counts))
        )  # the cube on the low side of the face
        ring = [low + step, low + step + u, low + step + u + v, low + step + v]  # the face's corners, around +axis
        for k in range(4):
            tets.append(
                torch.stack([center(low), center(low + step), corner(ring[k]), corner(ring[(k + 1) % 4])], -1),
            )
    check(cancelled)
    tets = torch.cat(tets)
    keys = torch.empty(len(tets), len(_EDGES), dtype=torch.int64)  # the same for the same two corners
    for k, (a, b) in enumerate(_EDGES):
        keys[:, k] = torch.minimum(tets[:, a], tets[:, b]) * len(vertices) + torch.maximum(tets[:, a], tets[:, b])
    check(cancelled)
    unique, inverse = torch.unique(keys, return_inverse=True)
    return TetGrid(
        vertices=(vertices * cell + lower.double()).float(),
        tets=tets,
        edges=torch.stack([unique // len(vertices), unique % len(vertices)], -1),
        tet_edges=inverse,
        cell=cell,
        shape=(nx, ny, nz),
    )


@cache
def _triangles() -> Tensor:
    """(16, 2, 3) edge numbers of the triangles of each sign case (bit k set: corner k inside), -1 where there is none.

    Derived, not typed in: the triangles face away from the inside of the positively oriented unit tetrahedron.
    """
    corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    middle = torch.stack([(corners[a] + corners[b]) / 2 for a, b in _EDGES])
    table = torch.full((16, 2, 3), -1, dtype=torch.int64)
    for case in range(1, 15):
        inside = [k for k in range(4) if case >> k & 1]
        crossed = [e for e, (a, b) in enumerate(_EDGES) if (a in inside) != (b in inside)]
        if len(crossed) == 4:  # a quad: order its corners so that neighbours share a tetrahedron corner
            start = crossed[0]
            opposite = next(e for e in crossed if not set(_EDGES[e]) & set(_EDGES[start]))
            sides = [e for e in crossed if e not in (start, opposite)]
            loops = [(start, sides[0], opposite), (start, opposite, sides[1])]
        else:
            loops = [tuple(crossed)]
        outward = corners[[k for k in range(4) if k not in inside]].mean(0) - corners[inside].mean(0)
        for row, (a, b, c) in enumerate(loops):
            normal = torch.linalg.cross(middle[b] - middle[a], middle[c] - middle[a])
            table[case, row] = torch.tensor([a, b, c] if normal @ outward > 0 else [a, c, b])
    return table


def narrowed(grid: TetGrid, keep: Tensor) -> TetGrid:
    """The same lattice with only the tetrahedra of the mask keep (T,) bool, and their edges.

    A surface moves by a fraction of a cell a step, so most steps need only a narrow band of tetrahedra around it.
    """
    rows = grid.tet_edges[keep]
    used = torch.zeros(len(grid.edges), dtype=torch.bool, device=rows.device)
    used[rows.reshape(-1)] = True
    number = used.cumsum(0) - 1
    return replace(grid, tets=grid.tets[keep], edges=grid.edges[used], tet_edges=number[rows])


def marching_tets(grid: TetGrid, positions: Tensor, sdf: Tensor, values: Tensor | None = None) -> IsoSurface:
    """The zero level set of `sdf` over the lattice; negative is inside.

    positions: (G, 3) lattice vertices, possibly deformed; sdf: (G,); values: (G, K) interpolated to the surface.
    Differentiable in all three: each vertex is the linear zero crossing of its edge (DMTet, eq. 1). May be empty.
    """
    inside = sdf.detach() < 0
    ends = inside[grid.edges]  # (E, 2)
    crossing = ends[:, 0] != ends[:, 1]
    active = crossing.nonzero()[:, 0]  # (V,) the lattice edge of each surface vertex
    vertex_of_edge = torch.full_like(grid.edges[:, 0], -1)
    vertex_of_edge[active] = torch.arange(len(active), device=active.device)

    bits = torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=sdf.device)
    case = (inside.to(torch.uint8)[grid.tets] * bits).sum(-1, dtype=torch.uint8)
    cut = ((case > 0) & (case < 15)).nonzero()[:, 0]
    triangles = _triangles().to(sdf.device)[case[cut].long()]  # (C, 2, 3) edge of its tet
    rows = grid.tet_edges[cut][:, None].expand(-1, 2, -1)
    faces = vertex_of_edge[torch.gather(rows, 2, triangles.clamp(min=0))]  # (C, 2, 3)
    faces = faces[triangles[..., 0] >= 0]

    a, b = grid.edges[active].unbind(-1)
    sa, sb = sdf[a], sdf[b]
    t = (sa / (sa - sb))[:, None]  # sa and sb differ in sign; a zero counts as outside, so sa - sb is never 0
    vertices = positions[a] * (1 - t) + positions[b] * t
    mixed = vertices.new_zeros(len(vertices), 0) if values is None else values[a] * (1 - t) + values[b] * t
    return IsoSurface(vertices, faces, mixed, active)
