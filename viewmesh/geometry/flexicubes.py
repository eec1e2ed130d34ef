"""FlexiCubes: a mesh from signed distances on a list of cubes, differentiable in all of its inputs.

Shen et al. 2023, "Flexible Isosurface Extraction for Gradient-Based Mesh Optimization": dual marching cubes with one
dual vertex per piece of surface in a cube (equations 4 to 6), weights that move the crossings (alpha), the dual
vertices (beta) and the diagonals of the quads (gamma), and the regulariser L_dev (equation 8).

The cubes are a list, not a volume: whoever has a sparse structure lists its cubes, whoever wants a dense grid calls
`dense_grid`. Order is part of the contract (a published decoder is compared with it): dual vertices come grouped by how
many their cube has, then in the order of the cubes; triangles come with the flipped quads first, then in the order of
their lattice edges. Knows nothing about networks, activations of distances, or cameras.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from viewmesh.geometry.dual_tables import CORNERS, MAX_PATCHES, DualTables, dual_tables
from viewmesh.geometry.mesh import Mesh
from viewmesh.geometry.rows import rows_at

WEIGHT_SCALE = 0.99  # keeps beta and alpha in (0.01, 1.99) and gamma in (0.005, 0.995)


@dataclass(frozen=True)
class CubeGrid:
    """C unit cubes of a lattice of resolution³ cubes, over the G lattice points that are their corners.

    points: (G, 3) int64 lattice coordinates in [0, resolution], in lexicographic order.
    coords: (C, 3) int64 cube coordinates in [0, resolution), in lexicographic order, none twice.
    corners: (C, 8) int64 rows of `points`, corner i at coords + (i & 1, i >> 1 & 1, i >> 2 & 1).
    """

    resolution: int
    points: Tensor  # (G, 3)
    coords: Tensor  # (C, 3)
    corners: Tensor  # (C, 8)

    def __len__(self) -> int:
        return len(self.coords)


@dataclass(frozen=True)
class FlexiMesh:
    """vertices (V, 3) and attributes (V, K) differentiable, faces (F, 3) int64 counter-clockwise seen from outside.

    l_dev: scalar, the mean absolute deviation of the distances from a dual vertex to its crossings (equation 8).
    cube: (V,) int64, the row of the grid that each vertex lies in; the centre vertices of a four-way split have -1.
    """

    vertices: Tensor  # (V, 3)
    faces: Tensor  # (F, 3)
    attributes: Tensor | None  # (V, K)
    l_dev: Tensor  # ()
    cube: Tensor  # (V,)

    def mesh(self) -> Mesh:
        """The bare mesh, its first three attributes as colours."""
        return Mesh(self.vertices, self.faces, None if self.attributes is None else self.attributes[:, :3])


def point_key(points: Tensor, resolution: int) -> Tensor:
    """Lattice points (..., 3) in [0, resolution] to int64 keys (...,) whose order is lexicographic."""
    x, y, z = points.long().unbind(-1)
    return (x * (resolution + 1) + y) * (resolution + 1) + z


def key_point(key: Tensor, resolution: int) -> Tensor:
    """The inverse of `point_key`: (...,) to (..., 3)."""
    n = resolution + 1
    return torch.stack([key // (n * n), key // n % n, key % n], -1)


def dense_grid(resolution: int, device: torch.device | str = "cpu") -> CubeGrid:
    """All resolution³ cubes over (resolution + 1)³ points."""

    def lattice(n: int) -> Tensor:
        axis = torch.arange(n, device=device)
        return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)

    coords = lattice(resolution)
    offsets = torch.tensor(CORNERS, device=device)
    corners = point_key(coords, resolution)[:, None] + point_key(offsets, resolution)
    return CubeGrid(resolution, lattice(resolution + 1), coords, corners)


def sparse_grid(coords: Tensor, resolution: int) -> CubeGrid:
    """The cubes at coords (C, 3), any order, none twice. Cubes that are not listed have no surface."""
    offsets = torch.tensor(CORNERS, device=coords.device)
    key = point_key(coords, resolution).sort().values
    points, corners = (key[:, None] + point_key(offsets, resolution)).unique(return_inverse=True)
    return CubeGrid(resolution, key_point(points, resolution), key_point(key, resolution), corners)


def extract(
    grid: CubeGrid,
    positions: Tensor,  # (G, 3) of grid.points, in the frame wanted for the vertices
    sdf: Tensor,  # (G,) negative inside
    weights: Tensor | None = None,  # (C, 21) before activation: beta 12, alpha 8, gamma 1
    attributes: Tensor | None = None,  # (G, K)
    *,
    split: str = "two",
) -> FlexiMesh:
    """The surface sdf = 0.

    weights pass through tanh·0.99 + 1 (beta, alpha) and sigmoid·0.99 + 0.005 (gamma); None is the same as zeros.
    split: "two" triangles per quad along the diagonal that gamma prefers, or "four" around a centre vertex, where
    gamma has a gradient (training). positions must map the lattice's axes without a reflection.
    No surface is an empty mesh. One device-to-host copy per count that shapes depend on.
    """
    assert positions.shape == (len(grid.points), 3), positions.shape
    assert sdf.shape == (len(grid.points),), sdf.shape
    assert weights is None or weights.shape == (len(grid), 21), weights.shape
    tables = dual_tables(sdf.device)

    with torch.no_grad():
        cubes, case = _surface_cubes(grid, sdf, tables)
        first = _first_vertex(tables.patches[case])  # (S,)
        owner, edges = _dual_vertices(case, first, tables)  # (V,), (V, 7)
        corners = grid.corners[cubes]  # (S, 8)
        quads = _quads(corners, case, first, sdf, tables)  # (Q, 4)
        mask, edges = edges >= 0, edges.clamp(min=0)
        ends = tables.edge_corners[edges]  # (V, 7, 2)
        point = corners[owner[:, None, None], ends]  # (V, 7, 2)

    values = positions if attributes is None else torch.cat([positions, attributes.to(positions.dtype)], 1)
    beta = alpha = gamma = None
    if weights is not None:
        raw = rows_at(weights, cubes[owner])  # (V, 21)
        beta, alpha = raw.gather(1, edges), raw.gather(1, 12 + ends.flatten(1)).view_as(ends)
        gamma = raw[:, 20]
    dual, vertex_gamma, l_dev = _placed(rows_at(values, point), rows_at(sdf, point), beta, alpha, gamma, mask)
    if split == "two":
        faces, cube = _two_triangles(quads, vertex_gamma), cubes[owner]
    elif split == "four":
        centers, faces = _four_triangles(quads, vertex_gamma, dual)
        dual = torch.cat([dual, centers])
        cube = torch.cat([cubes[owner], cubes.new_full((len(centers),), -1)])
    else:
        raise ValueError(f"split must be 'two' or 'four', got {split!r}.")
    vertices, extra = (dual, None) if attributes is None else dual.split((3, dual.shape[1] - 3), 1)
    return FlexiMesh(vertices, faces, extra, l_dev, cube)


def _placed(
    values: Tensor, distance: Tensor, beta: Tensor | None, alpha: Tensor | None, gamma: Tensor | None, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Each dual vertex's values (V, 3 + K), its gamma (V,), and L_dev.

    values (V, 7, 2, 3 + K) and distance (V, 7, 2) at both ends of the edges that the surface crosses around it, mask
    (V, 7): those that are no padding. beta (V, 7), alpha (V, 7, 2), gamma (V,) before activation, or None.
    """
    if alpha is not None:
        distance = distance * (alpha.tanh() * WEIGHT_SCALE + 1)
    # padding gets a harmless crossing, so that no infinity meets a zero weight in the backward pass
    (d0, d1), (v0, v1), padding = distance.unbind(-1), values.unbind(2), ~mask
    d0, d1 = d0.masked_fill(padding, -1.0), d1.masked_fill(padding, 1.0)
    crossing = torch.lerp(v0, v1, (d0 / (d0 - d1))[..., None])  # (V, 7, 3 + K)
    share = mask.to(distance.dtype) if beta is None else (beta.tanh() * WEIGHT_SCALE + 1) * mask
    share = share / share.sum(1, keepdim=True)
    dual = (crossing * share[..., None]).sum(1)
    if gamma is None:
        gamma = torch.zeros_like(dual[:, 0])
    gamma = gamma.sigmoid() * WEIGHT_SCALE + (1 - WEIGHT_SCALE) / 2
    offset = crossing - dual[:, None]
    return dual, gamma, _deviation(offset if offset.shape[-1] == 3 else offset[..., :3], mask)


def _surface_cubes(grid: CubeGrid, sdf: Tensor, tables: DualTables) -> tuple[Tensor, Tensor]:
    """Rows (S,) of the cubes that the surface crosses, and their cases (S,), ambiguities resolved."""
    inside = sdf < 0
    bit = 1 << torch.arange(8, device=sdf.device)
    count = inside[grid.corners].sum(1)
    cubes = ((count > 0) & (count < 8)).nonzero()[:, 0]
    case = (inside[grid.corners[cubes]] * bit).sum(1)

    # C16 and C19 facing each other across their problem side: both become their complement
    offset, coords = tables.invert_if[case], grid.coords[cubes]
    problem, there = (offset != 0).any(1), coords + offset
    in_lattice = ((there >= 0) & (there < grid.resolution)).all(1)
    key = point_key(coords, grid.resolution)  # sorted, as the cubes are
    wanted = point_key(there, grid.resolution)
    at = torch.searchsorted(key, wanted).clamp(max=max(len(key) - 1, 0))
    faces_another = problem & in_lattice & (key[at] == wanted) & problem[at]
    return cubes, torch.where(faces_another, 255 - case, case)


def _first_vertex(patches: Tensor) -> Tensor:
    """The number of each cube's first dual vertex: cubes with one patch first, then those with two, three, four."""
    kind = torch.arange(1, MAX_PATCHES + 1, device=patches.device)[:, None]
    # one long sum: along the rows of a matrix of four columns a GPU adds with four threads
    through = ((patches == kind) * kind).flatten().cumsum(0).view(MAX_PATCHES, -1)  # all before, and this cube's
    return through.gather(0, (patches - 1).clamp(min=0)[None])[0] - patches


def _dual_vertices(case: Tensor, first: Tensor, tables: DualTables) -> tuple[Tensor, Tensor]:
    """For each dual vertex its cube (V,), counted among the surface cubes, and its crossed edges (V, 7), -1 padded."""
    patches = tables.patches[case]
    which = torch.arange(MAX_PATCHES, device=case.device)
    cube, patch = (which < patches[:, None]).nonzero(as_tuple=True)
    number = first[cube] + patch
    owner = torch.empty_like(cube).index_copy_(0, number, cube)
    patch = torch.empty_like(patch).index_copy_(0, number, patch)
    return owner, tables.edges_of_patch[case[owner], patch]


def _deviation(offset: Tensor, mask: Tensor) -> Tensor:
    """L_dev from offsets (V, 7, 3) of the crossings to their dual vertex."""
    distance = torch.linalg.vector_norm(offset, dim=-1)
    mean = (distance * mask).sum(1) / mask.sum(1)
    return ((distance - mean[:, None]).abs() * mask).sum() / mask.sum().clamp(min=1)


def _quads(corners: Tensor, case: Tensor, first: Tensor, sdf: Tensor, tables: DualTables) -> Tensor:
    """The dual vertices (Q, 4) around each crossed edge that four cubes share, in winding order."""
    patch = tables.patch_of_edge[case]  # (S, 12)
    cube, edge = (patch >= 0).nonzero(as_tuple=True)
    point = corners[cube[:, None], tables.edge_corners[edge]]  # (P, 2)
    # lattice edges in lexicographic order of their two points; the cubes around one stay in the order of the cubes
    key = point[:, 0] * 3 + tables.edge_rank[edge]
    if 3 * len(sdf) < 2**31:
        key = key.int()
    key, order = key.sort(stable=True)
    shared = (key[3:] == key[:-3]).nonzero()[:, 0]  # at most four cubes share an edge, so this is the first of four
    four = order[shared[:, None] + torch.arange(4, device=case.device)]  # (Q, 4)
    quads = (first[cube] + patch[cube, edge])[four]
    flipped = sdf[point[four[:, 0], 0]] > 0
    first_flipped = (~flipped).byte().argsort(stable=True)  # two selections would each wait for the device
    flipped, (a, b, c, d) = flipped[first_flipped], quads[first_flipped].unbind(1)
    # the cubes around an edge come as (-,-) (-,+) (+,-) (+,+): around it in a ring is 0 1 3 2
    return torch.where(flipped[:, None], torch.stack([a, b, d, c], 1), torch.stack([c, d, b, a], 1))


def _two_triangles(quads: Tensor, gamma: Tensor) -> Tensor:
    g, (a, b, c, d) = gamma.detach()[quads], quads.unbind(1)
    along_02 = g[:, 0] * g[:, 2] > g[:, 1] * g[:, 3]
    split_02, split_13 = torch.stack([a, b, c, a, c, d], 1), torch.stack([a, b, d, d, b, c], 1)
    return torch.where(along_02[:, None], split_02, split_13).reshape(-1, 3)


def _four_triangles(quads: Tensor, gamma: Tensor, dual: Tensor) -> tuple[Tensor, Tensor]:
    """Centre values (Q, K): the two diagonals' midpoints, weighted by gamma; and the faces around them."""
    g, d = rows_at(gamma, quads), rows_at(dual, quads)  # (Q, 4), (Q, 4, K)
    (g0, g1, g2, g3), (d0, d1, d2, d3) = g.unbind(1), d.unbind(1)
    g_02, g_13 = g0 * g2, g1 * g3
    t = (g_13 / (g_02 + g_13))[:, None]
    centers = torch.lerp((d0 + d2) / 2, (d1 + d3) / 2, t)
    center = torch.arange(len(quads), device=quads.device) + len(dual)
    rim = torch.stack([quads, quads.roll(-1, 1)], -1)  # (Q, 4, 2)
    faces = torch.cat([rim, center[:, None, None].expand(-1, 4, 1)], -1)
    return centers, faces.reshape(-1, 3)
