"""Quadric edge collapse (Garland and Heckbert 1997) in rounds, for devices that do many things at once.

Each round collapses edges that are the cheapest of their surroundings, and far enough from each other that no face
belongs to two of them. A mesh of 700,000 faces takes 30 rounds to 20,000. Tensors only, on any device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from viewmesh.geometry.normals import corner_normals, face_normals
from viewmesh.geometry.rows import contains

PICKS = 3  # times per round that surroundings which are still free choose their cheapest edge
CHEAPEST = 0.4  # share of all edges that a round may collapse: what is dear now is left to a later one
TOWARDS_MIDDLE = 1e-4  # where quadrics do not say where a vertex belongs, it goes to the middle of its edge
PREFER_SHORT = 1e-4  # of two edges that lie in one plane, the shorter one
RIM = 10.0  # how much dearer it is to leave the rim of an open surface than the surface
TURNED = 0.2  # cosine between a face's old and its new normal, below which its collapse is refused
SLIVER = 0.03  # twice the area by the longest side's square, below which no face may fall
THINNER = 0.5  # but to this part of what it had: else a mesh of slivers would keep them
PATIENCE = (
    10  # rounds in which nothing could be collapsed: then faces may be turned or thin, after as many more it ends
)
STIFFER = 4.0  # by how much what was refused gets dearer: others around it shall have their turn
NEVER = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class _Surface:
    """positions (V, 3) and quadrics (10, V) float64; stiffness (V,) grows where a collapse was refused. rim: (V,) bool,
    vertices of edges with one face only; None if there are none. Vertices that no face names stay until the end, so
    that nothing is renumbered between rounds."""

    positions: Tensor
    quadrics: Tensor
    stiffness: Tensor
    rim: Tensor | None
    faces: Tensor


@dataclass(frozen=True)
class _Edges:
    """start, end: (E,) int64. target (E, 3): where both would go; cost (E,): what that would cost."""

    start: Tensor
    end: Tensor
    target: Tensor
    cost: Tensor

    def at(self, index: Tensor) -> "_Edges":
        return _Edges(self.start[index], self.end[index], self.target[index], self.cost[index])


@torch.no_grad()
def collapse(vertices: Tensor, faces: Tensor, target_faces: int) -> tuple[Tensor, Tensor]:
    """At most target_faces of them, or as few as can be reached; both as they came in type and device.

    vertices (V, 3) float, faces (F, 3) int64 of a manifold, oriented mesh, closed or not. So is the result: an edge
    whose collapse would join what did not touch stays, and as long as there are others, one that would turn a face over
    or make it thin. On a CPU the same every time; on a GPU but for the order in which it adds.
    """
    surface, idle = _surface(vertices.double(), faces), 0
    while (surplus := len(surface.faces) - target_faces) > 0 and idle < 2 * PATIENCE:
        chosen = _independent(_edges(surface), len(vertices), (surplus + 1) // 2)
        before, surface = len(surface.faces), _collapsed(surface, chosen, shapely=idle < PATIENCE)
        idle = idle + 1 if len(surface.faces) == before else 0
    used, numbered = surface.faces.unique(return_inverse=True)
    return surface.positions[used].to(vertices.dtype), numbered


def _surface(positions: Tensor, faces: Tensor) -> _Surface:
    quadrics, rim = _quadrics(positions, faces), None
    start, end = _half_edges(faces)
    alone = _without_twin(start, end, len(positions)).nonzero()[:, 0]
    if len(alone):
        a, b = start[alone], end[alone]
        along = positions[b] - positions[a]
        upright = torch.linalg.cross(along, face_normals(positions, faces)[alone // 3])
        planes = _planes(upright, positions[a]) * RIM * along.square().sum(-1)
        quadrics.index_add_(1, a, planes).index_add_(1, b, planes)
        rim = torch.zeros(len(positions), dtype=torch.bool, device=faces.device)
        rim[a], rim[b] = True, True
    return _Surface(positions, quadrics, positions.new_ones(len(positions)), rim, faces)


def _half_edges(faces: Tensor) -> tuple[Tensor, Tensor]:
    """Number 3 f + k runs from corner k of face f to corner k + 1."""
    return faces.flatten(), faces[:, [1, 2, 0]].flatten()


def _without_twin(start: Tensor, end: Tensor, V: int) -> Tensor:
    return ~contains((end * V + start).sort().values, start * V + end)


def _quadrics(positions: Tensor, faces: Tensor) -> Tensor:
    """(10, V): per vertex the squared distances from the planes of its faces, weighted by their area."""
    cross = face_normals(positions, faces)
    planes = _planes(cross, positions[faces[:, 0]]) * cross.norm(dim=-1)
    quadrics = positions.new_zeros(10, len(positions))
    for corner in faces.unbind(1):
        quadrics.index_add_(1, corner, planes)
    return quadrics


def _planes(normals: Tensor, through: Tensor) -> Tensor:
    """(10, N): the squared distance from each plane as the upper triangle of A (xx, xy, xz, yy, yz, zz), b and c of
    vᵀA v + 2 bᵀv + c. normals, through: (N, 3); normals may have any length."""
    n = normals / normals.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    d = -(n * through).sum(-1)
    x, y, z = n.unbind(-1)
    return torch.stack([x * x, x * y, x * z, y * y, y * z, z * z, x * d, y * d, z * d, d * d])


def _candidates(surface: _Surface) -> tuple[Tensor, Tensor]:
    """Start and end of every edge that may go. One that joins two places of the rim may not: it would pinch there."""
    start, end = _half_edges(surface.faces)
    wanted = start < end
    if surface.rim is not None:
        bridging = (surface.rim[start] & surface.rim[end]).nonzero()[:, 0]
        wanted[bridging] = _without_twin(start[bridging], end[bridging], len(surface.rim))
    index = wanted.nonzero()[:, 0]
    return start[index], end[index]


def _edges(surface: _Surface) -> _Edges:
    start, end = _candidates(surface)
    a, b = surface.positions[start], surface.positions[end]
    q = surface.quadrics.index_select(1, start) + surface.quadrics.index_select(1, end)
    target, error = _best(q, (a + b) / 2)
    size = (a - b).square().sum(-1) * (q[0] + q[3] + q[5])
    cost = error.clamp_(min=0) + PREFER_SHORT * size + 1e-30
    return _Edges(start, end, target, cost * surface.stiffness[start] * surface.stiffness[end])


def _best(q: Tensor, middle: Tensor) -> tuple[Tensor, Tensor]:
    """The point (E, 3) of least error, and that error (E,). Worked out about the middle, as elsewhere large numbers
    would cancel; A, made a little firmer, as L D Lᵀ."""
    xx, xy, xz, yy, yz, zz, bx, by, bz, c = q
    x, y, z = middle.T.contiguous()
    gx = bx.addcmul(xx, x).addcmul_(xy, y).addcmul_(xz, z)  # half the gradient at the middle
    gy = by.addcmul(xy, x).addcmul_(yy, y).addcmul_(yz, z)
    gz = bz.addcmul(xz, x).addcmul_(yz, y).addcmul_(zz, z)
    error = c.addcmul(x, gx + bx).addcmul_(y, gy + by).addcmul_(z, gz + bz)
    firm = (xx + yy).add_(zz).mul_(TOWARDS_MIDDLE).add_(1e-300)
    d1 = xx + firm
    l21, l31 = xy / d1, xz / d1
    d2 = (yy + firm).addcmul_(l21, xy, value=-1)
    m32 = yz.addcmul(l21, xz, value=-1)
    l32 = m32 / d2
    d3 = (zz + firm).addcmul_(l31, xz, value=-1).addcmul_(l32, m32, value=-1)
    u2 = (l21 * gx).sub_(gy)
    z = (l31 * gx).sub_(gz).addcmul_(l32, u2, value=-1).div_(d3)
    y = u2.div_(d2).addcmul_(l32, z, value=-1)
    x = (gx / d1).neg_().addcmul_(l21, y, value=-1).addcmul_(l31, z, value=-1)
    error.addcmul_(gx, x).addcmul_(gy, y).addcmul_(gz, z)
    step = torch.stack([x, y, z], -1)
    return middle + step, error.addcmul_(firm, step.square().sum(-1), value=-1)


def _independent(edges: _Edges, V: int, most: int) -> _Edges:
    """At most `most` edges of which no two have ends that are equal or neighbours, the cheapest of their surroundings.

    A pick is a round of Luby's algorithm (1986), with costs for its random numbers.
    """
    E, device = len(edges.cost), edges.cost.device
    ends, others = torch.cat([edges.start, edges.end]), torch.cat([edges.end, edges.start])
    # Order by cost: a positive float's bits are ordered as it is. Equal costs are told apart by a scrambled number.
    scrambled = torch.arange(E, device=device) * 2654435761 & 0x7FFFFFFF
    key = (edges.cost.float().view(torch.int32).long() << 31) | scrambled
    sample = edges.cost[:: max(1, E // 20_000)]
    key.masked_fill_(edges.cost > sample.kthvalue(max(1, int(CHEAPEST * len(sample)))).values, NEVER)
    key = key.repeat(2)
    picked = torch.zeros(2 * E, dtype=torch.bool, device=device)  # by either end
    for pick in range(PICKS):
        cheapest = torch.full((V,), NEVER, device=device).scatter_reduce_(0, ends, key, "amin")
        around = cheapest.scatter_reduce(0, ends, cheapest[others], "amin")
        first = (key == around[ends]) & (key < NEVER)
        picked |= (first[:E] & first[E:]).repeat(2)
        if pick < PICKS - 1:
            taken = torch.zeros(V, dtype=torch.uint8, device=device)
            taken.scatter_reduce_(0, ends, picked.to(torch.uint8), "amax")
            near = taken.scatter_reduce(0, ends, taken[others], "amax")[ends].bool()
            key.masked_fill_((near[:E] | near[E:]).repeat(2), NEVER)
    index = picked[:E].nonzero()[:, 0]
    if len(index) > most:
        index = index[edges.cost[index].argsort(stable=True)[:most]]
    return edges.at(index)


def _collapsed(surface: _Surface, chosen: _Edges, shapely: bool = True) -> _Surface:
    """But for those that must not be; shapely: faces are to look well, too."""
    V, device = len(surface.positions), surface.faces.device
    mine = torch.arange(len(chosen.start), device=device)
    owner = torch.full((V,), -1, device=device)
    owner[chosen.start], owner[chosen.end] = mine, mine
    refused = _refused(surface, chosen, owner, shapely)
    stiffer = 1 + (STIFFER - 1) * refused.double()
    stiffness = surface.stiffness.clone()
    stiffness[chosen.start] *= stiffer
    stiffness[chosen.end] *= stiffer
    kept = (~refused).nonzero()[:, 0]
    start, end = chosen.start[kept], chosen.end[kept]
    into = torch.arange(V, device=device)
    into[end] = start
    positions, quadrics = surface.positions.clone(), surface.quadrics.clone()
    positions[start] = chosen.target[kept]
    quadrics[:, start] += quadrics[:, end]
    faces = into[surface.faces]
    flat = (faces[:, 0] == faces[:, 1]) | (faces[:, 1] == faces[:, 2]) | (faces[:, 2] == faces[:, 0])
    rim = surface.rim
    if rim is not None:
        rim = rim.clone()
        rim[start] |= rim[end]
    return _Surface(positions, quadrics, stiffness, rim, faces[~flat])


def _refused(surface: _Surface, chosen: _Edges, owner: Tensor, shapely: bool = True) -> Tensor:
    """(K,) bool. owner (V,): the chosen edge that ends at a vertex, or -1; a face has at most one."""
    V, K = len(owner), len(chosen.start)
    ends = owner[surface.faces]
    changed = ((ends >= 0).sum(1) == 1).nonzero()[:, 0]  # with two, it vanishes
    faces, of, ends = surface.faces[changed], ends[changed].amax(1), ends[changed] >= 0
    refused = torch.zeros(K, dtype=torch.int32, device=of.device)

    if shapely:
        before = surface.positions[faces]
        after = torch.where(ends[..., None], chosen.target[of][:, None], before)
        old, new = corner_normals(before), corner_normals(after)
        turned = (old * new).sum(-1) < TURNED * old.norm(dim=-1) * new.norm(dim=-1)
        thin = _roundness(new, after) < (THINNER * _roundness(old, before)).clamp(max=SLIVER)
        refused.index_add_(0, of, (turned | thin).int())

    # The neighbours of the merged vertex, in its faces' order: one that both had, besides those of the faces that
    # vanish, would be there twice. Around a vertex within, to go one way round is enough.
    corner = ends.int().argmax(1, keepdim=True)
    for step in (1,) if surface.rim is None else (1, 2):
        beside = faces.gather(1, (corner + step) % 3)[:, 0]
        key = (of * V + beside).sort().values
        twice = key[1:][key[1:] == key[:-1]] // V
        refused.index_add_(0, twice, torch.ones_like(twice, dtype=torch.int32))
    fan = torch.zeros_like(refused).index_add_(0, of, torch.ones_like(of, dtype=torch.int32))
    closed = 3 if surface.rim is None else torch.where(surface.rim[chosen.start] | surface.rim[chosen.end], 1, 3)
    return (refused > 0) | (fan < closed)


def _roundness(cross: Tensor, corners: Tensor) -> Tensor:
    longest = (corners - corners.roll(1, 1)).square().sum(-1).amax(1)
    return cross.norm(dim=-1) / longest.clamp(min=1e-300)
