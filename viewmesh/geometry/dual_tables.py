"""The case tables of dual marching cubes, derived from the cube rather than typed in.

Knows the numbering of a cube's corners, edges and sides, and which crossed edges belong to one dual vertex ("patch").
Does not know about signed distances, positions or tensors on a device other than the one asked for.

Numbering (shared with the published FlexiCubes weights, so it cannot be chosen freely):

    corner i = (i & 1, i >> 1 & 1, i >> 2 & 1) in (x, y, z)          a set bit i of a case: corner i is inside (sdf < 0)

          6 -------- 7                                                 edges 0..11 as in EDGE_CORNERS: the four around
         /|         /|        z                                        the side y = 0, the four around y = 1, then the
        4 -------- 5 |        |  y                                     four along y
        | 2 -------|-3        | /
        |/         |/         |/
        0 -------- 1          +----- x

Rule on an ambiguous side (inside corners on a diagonal): the inside corners are kept apart. Two cubes that share such
a side and both have all four of its crossings in one patch would meet in an edge used by four quads; those are
Nielson's cases C16 and C19, and both cubes are then read as their complement (Nielson 2004, "Dual Marching Cubes";
Wenger 2013, "Isosurfaces", section 3).
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

CORNERS = tuple((i & 1, i >> 1 & 1, i >> 2 & 1) for i in range(8))
EDGE_CORNERS = ((0, 1), (1, 5), (4, 5), (0, 4), (2, 3), (3, 7), (6, 7), (2, 6), (2, 0), (3, 1), (7, 5), (6, 4))
# the axis of each edge, by where its second corner lies in the lattice's order: y goes back, z forth by one, x far
EDGE_RANK = tuple({2: 0, 4: 1, 1: 2}[a ^ b] for a, b in EDGE_CORNERS)
MAX_PATCHES = 4
MAX_PATCH_EDGES = 7


@dataclass(frozen=True)
class DualTables:
    """Per sign case, all int64 on one device.

    patches: (256,) number of dual vertices. patch_of_edge: (256, 12) which one a crossed edge belongs to, else -1.
    edges_of_patch: (256, 4, 7) the same the other way round, padded with -1.
    invert_if: (256, 3) the offset to the neighbouring cube across the problem side of a C16 or C19 case, else 0.
    edge_corners: (12, 2) and edge_rank: (12,), the constants of those names.
    """

    patches: Tensor  # (256,)
    patch_of_edge: Tensor  # (256, 12)
    edges_of_patch: Tensor  # (256, 4, 7)
    invert_if: Tensor  # (256, 3)
    edge_corners: Tensor  # (12, 2)
    edge_rank: Tensor  # (12,)


def _sides() -> list[tuple[tuple[int, int, int], list[int], list[int]]]:
    """The six sides of the cube: outward direction, its corners, its edges."""
    sides = []
    for axis in range(3):
        for at in (0, 1):
            corners = [i for i, corner in enumerate(CORNERS) if corner[axis] == at]
            edges = [e for e, (a, b) in enumerate(EDGE_CORNERS) if a in corners and b in corners]
            direction = [0, 0, 0]
            direction[axis] = 2 * at - 1
            sides.append((tuple(direction), corners, edges))
    return sides


def _patches_of_case(case: int) -> list[list[int]]:
    """Crossed edges grouped by the piece of surface that they lie on, in the order of their first inside corner."""
    inside = [bool(case >> i & 1) for i in range(8)]
    crossed = [e for e, (a, b) in enumerate(EDGE_CORNERS) if inside[a] != inside[b]]
    group = {e: {e} for e in crossed}

    def join(a: int, b: int) -> None:
        merged = group[a] | group[b]
        for e in merged:
            group[e] = merged

    for _, corners, edges in _sides():
        here = [e for e in edges if e in group]
        if len(here) == 2:
            join(*here)
        elif len(here) == 4:  # ambiguous: the surface turns around each inside corner
            for corner in (c for c in corners if inside[c]):
                join(*(e for e in here if corner in EDGE_CORNERS[e]))

    fewer = sum(inside) <= 5  # with six or seven inside, the outside corners give the order

    def first_corner(patch: frozenset[int]) -> int:
        return min(c for e in patch for c in EDGE_CORNERS[e] if inside[c] == fewer)

    return [sorted(g) for g in sorted({frozenset(g) for g in group.values()}, key=first_corner)]


def _problem_side(case: int, patches: list[list[int]]) -> tuple[int, int, int]:
    """The direction of the ambiguous side whose four crossings share one patch, or (0, 0, 0)."""
    for direction, _, edges in _sides():
        if any(set(edges) <= set(patch) for patch in patches):
            return direction
    return (0, 0, 0)


@cache
def dual_tables(device: torch.device) -> DualTables:
    """The tables on `device`, built once per process and device (a few milliseconds)."""
    patch_of_edge = torch.full((256, 12), -1)
    edges_of_patch = torch.full((256, MAX_PATCHES, MAX_PATCH_EDGES), -1)
    count, invert_if = torch.zeros(256, dtype=torch.int64), torch.zeros(256, 3, dtype=torch.int64)
    for case in range(256):
        patches = _patches_of_case(case)
        count[case] = len(patches)
        invert_if[case] = torch.tensor(_problem_side(case, patches))
        for k, patch in enumerate(patches):
            patch_of_edge[case, patch] = k
            edges_of_patch[case, k, : len(patch)] = torch.tensor(patch)
    edges = torch.tensor(EDGE_CORNERS), torch.tensor(EDGE_RANK)
    return DualTables(*(t.to(device) for t in (count, patch_of_edge, edges_of_patch, invert_if, *edges)))
