"""The ground-truth mesh: marching cubes over the robot's distance field, vertices moved onto the surface.

The table of triangles is derived here, face by face: on an ambiguous face of a cell the inside corners are always kept
apart, which both cells that share the face agree on, so the mesh is closed by construction.
"""

import functools

import numpy as np

from viewmesh.sample.fields import distances, grid_distances, world_axis

# corner c of a cell lies at bits (x, y, z) = (c & 1, c >> 1 & 1, c >> 2 & 1); an edge joins a corner to corner | bit
EDGES = tuple((c, axis) for axis in range(3) for c in range(8) if not c >> axis & 1)
_EDGE_OF = {frozenset((c, c | 1 << axis)): i for i, (c, axis) in enumerate(EDGES)}


def _faces_of_cell() -> list[list[int]]:
    """The corners of the six faces, each counter-clockwise seen from outside the cell."""
    faces = []
    for axis in range(3):
        u, v = 1 << (axis + 1) % 3, 1 << (axis + 2) % 3
        faces.append([1 << axis, 1 << axis | u, 1 << axis | u | v, 1 << axis | v])
        faces.append([0, v, u | v, u])
    return faces


_FACES = _faces_of_cell()


def _loops(inside: int) -> list[list[int]]:
    """The closed curves of cell edges in which the surface meets a cell; `inside` has bit c set for inside corners."""
    following = {}
    for face in _FACES:
        flags = [inside >> c & 1 for c in face]
        for i in range(4):
            if not flags[i] and flags[(i + 1) % 4]:  # entering a run of inside corners; it ends at the next exit
                j = (i + 1) % 4
                while flags[(j + 1) % 4]:
                    j = (j + 1) % 4
                enter = _EDGE_OF[frozenset((face[i], face[(i + 1) % 4]))]
                leave = _EDGE_OF[frozenset((face[j], face[(j + 1) % 4]))]
                following[leave] = enter
    loops = []
    while following:
        start, edge = next(iter(following.items()))
        loop = [start]
        del following[start]
        while edge != start:
            loop.append(edge)
            edge = following.pop(edge)
        loops.append(loop)
    return loops


def _on_one_face(a: int, b: int) -> bool:
    ends = {EDGES[e][0] for e in (a, b)} | {EDGES[e][0] | 1 << EDGES[e][1] for e in (a, b)}
    return any(ends <= set(face) for face in _FACES)


def _fan(loop: list[int]) -> list[tuple[int, int, int]]:
    """Triangles of a loop, from the start whose diagonals lie least on the cell's faces (there they could clash)."""

    def clashes(turned: list[int]) -> int:
        return sum(_on_one_face(turned[0], other) for other in turned[2:-1])

    turned = min((loop[i:] + loop[:i] for i in range(len(loop))), key=clashes)
    return [(turned[0], turned[i + 1], turned[i]) for i in range(1, len(turned) - 1)]


@functools.cache
def triangle_table() -> tuple[np.ndarray, np.ndarray]:
    """(256, T, 3) int64 cell edges of the triangles of each of the 256 cells, and (256,) how many of them count."""
    cells = [[t for loop in _loops(inside) for t in _fan(loop)] for inside in range(256)]
    table = np.zeros((256, max(map(len, cells)), 3), dtype=np.int64)
    for inside, triangles in enumerate(cells):
        if triangles:
            table[inside, : len(triangles)] = triangles
    return table, np.array([len(t) for t in cells])


def robot_mesh(cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (V, 3) float64 in the world and faces (F, 3) int64 of the robot, `cells` cells along each axis.

    Watertight, welded, counter-clockwise seen from outside; every vertex lies on the surface to about 1e-5 except where
    that would bring two vertices of a cell together.
    """
    axis = world_axis(cells)
    values = grid_distances(axis)  # (n, n, n), n = cells + 1
    n = len(axis)
    inside = values < 0
    code = np.zeros((cells,) * 3, dtype=np.int64)
    for c in range(8):
        x, y, z = c & 1, c >> 1 & 1, c >> 2 & 1
        code |= inside[x : x + cells, y : y + cells, z : z + cells].astype(np.int64) << c
    active = np.argwhere((code > 0) & (code < 255))  # (A, 3)
    table, count = triangle_table()
    code = code[tuple(active.T)]
    triangles = table[code][np.arange(table.shape[1]) < count[code][:, None]]  # (F, 3) edges within the cell
    cell = np.repeat(active, count[code], axis=0)  # (F, 3)

    corner = np.array([[c & 1, c >> 1 & 1, c >> 2 & 1] for c, _ in EDGES])  # (12, 3) where each edge starts
    along = np.array([axis for _, axis in EDGES])
    start = cell[:, None] + corner[triangles]  # (F, 3, 3)
    key = (start @ np.array([n * n, n, 1])) * 3 + along[triangles]  # (F, 3) a number for each edge of the grid
    keys, faces = np.unique(key, return_inverse=True)
    return _on_surface(axis, values, keys), faces.reshape(-1, 3)


def _on_surface(axis: np.ndarray, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where the surface crosses the grid's edges `keys`, by false position with bisection's safety (Illinois)."""
    n = len(axis)
    point, along = keys // 3, keys % 3
    index = np.stack([point // (n * n), point // n % n, point % n], -1)  # (V, 3)
    step = np.eye(3, dtype=np.int64)[along]
    origin, h = axis[index], axis[1] - axis[0]
    a, b = np.zeros(len(keys)), np.ones(len(keys))
    fa, fb = values[tuple(index.T)], values[tuple((index + step).T)]
    t = a
    for _ in range(6):
        t = np.clip((a * fb - b * fa) / (fb - fa), a, b)
        f = distances(origin + h * t[:, None] * step)
        same_a = (f < 0) == (fa < 0)
        # the end that stays put counts half next time, else false position creeps
        fb = np.where(same_a, 0.5 * fb, f)
        fa, a, b = np.where(same_a, f, 0.5 * fa), np.where(same_a, t, a), np.where(same_a, b, t)
    # an exact hit of a grid point would give several vertices one place
    return origin + h * np.clip(t, 0.01, 0.99)[:, None] * step
