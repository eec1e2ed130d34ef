"""The four primitives written out pixel by pixel in float64: slow, plain, differentiable by autograd.

The twin of every back-end. Shares no code with them.
"""

import math

import numpy as np
import torch
from torch import Tensor


def barycentrics(corners: Tensor, X: float, Y: float) -> Tensor | None:
    """corners (3, 4) clip space; the perspective-correct weights (3,) of the point seen at NDC (X, Y), unclipped.

    Weights b and the depth factor w solve sum b_i (x_i, y_i, w_i) = w (X, Y, 1), sum b_i = 1.
    """
    A = corners[:, [0, 1, 3]].T
    if abs(torch.linalg.det(A.detach()).item()) < 1e-12:
        return None
    scaled = torch.linalg.solve(A, torch.tensor([X, Y, 1.0], dtype=torch.float64))
    return scaled / scaled.sum()


def rasterize(clip: Tensor, faces: Tensor, H: int, W: int) -> tuple[Tensor, Tensor]:
    """(B, H, W, 4) u, v, z/w, id + 1 and (B, H, W, 4) du/dX, du/dY, dv/dX, dv/dY by central differences."""
    clip = clip.double()
    rast = [[[torch.zeros(4, dtype=torch.float64)] * W for _ in range(H)] for _ in range(len(clip))]
    db = [[[torch.zeros(4, dtype=torch.float64)] * W for _ in range(H)] for _ in range(len(clip))]
    for b in range(len(clip)):
        for row in range(H):
            for col in range(W):
                best, winner = math.inf, -1
                X, Y = (2 * col + 1) / W - 1, (2 * row + 1) / H - 1
                for f, face in enumerate(faces.tolist()):
                    corners = clip[b, face].detach()
                    weights = barycentrics(corners, X, Y)
                    if weights is None or bool((weights < 0).any()):
                        continue
                    _, _, z, w = (weights @ corners).tolist()
                    if w > 0 and -1 <= z / w <= 1 and z / w < best:
                        best, winner = z / w, f
                if winner < 0:
                    continue
                corners = clip[b, faces[winner]]
                weights = barycentrics(corners, X, Y)
                rast[b][row][col] = torch.cat([weights[:2], torch.tensor([best, winner + 1], dtype=torch.float64)])
                h = 1e-4
                dX = [barycentrics(corners, X + s * h * 2 / W, Y)[:2] for s in (1, -1)]
                dY = [barycentrics(corners, X, Y + s * h * 2 / H)[:2] for s in (1, -1)]
                db[b][row][col] = torch.stack([(dX[0] - dX[1]) / (2 * h), (dY[0] - dY[1]) / (2 * h)], -1).reshape(4)
    stack = [torch.stack([torch.stack([torch.stack(r) for r in image]) for image in images]) for images in (rast, db)]
    return stack[0], stack[1]


def interpolate(attributes: Tensor, rast: Tensor, faces: Tensor, db: Tensor) -> tuple[Tensor, Tensor]:
    """rast, db (P, 4) to (P, C) and (P, 2C)."""
    out, da = [], []
    for row, d in zip(rast, db, strict=True):
        if row[3] == 0:
            out.append(torch.zeros_like(attributes[0]))
            da.append(torch.zeros_like(attributes[0]).repeat(2))
            continue
        a0, a1, a2 = attributes[faces[int(row[3]) - 1]]
        out.append(row[0] * a0 + row[1] * a1 + (1 - row[0] - row[1]) * a2)
        dX = d[0] * (a0 - a2) + d[2] * (a1 - a2)
        dY = d[1] * (a0 - a2) + d[3] * (a1 - a2)
        da.append(torch.stack([dX, dY], -1).reshape(-1))
    return torch.stack(out), torch.stack(da)


def texture(image: Tensor, uv: Tensor, boundary: str, filter: str = "linear") -> Tensor:
    """image (H, W, C), uv (P, 2); one mip level."""
    H, W, C = image.shape

    def texel(row: int, col: int) -> Tensor:
        if boundary == "wrap":
            return image[row % H, col % W]
        if boundary == "clamp":
            return image[min(max(row, 0), H - 1), min(max(col, 0), W - 1)]
        return image[row, col] if 0 <= row < H and 0 <= col < W else torch.zeros(C, dtype=image.dtype)

    out = []
    for u, v in uv:
        if filter == "nearest":
            out.append(texel(math.floor(v * H), math.floor(u * W)))
            continue
        x, y = u * W - 0.5, v * H - 0.5
        if boundary == "clamp":
            x, y = x.clamp(0, W - 1), y.clamp(0, H - 1)
        col, row = math.floor(x), math.floor(y)
        fx, fy = x - col, y - row
        out.append(
            (1 - fy) * ((1 - fx) * texel(row, col) + fx * texel(row, col + 1))
            + fy * ((1 - fx) * texel(row + 1, col) + fx * texel(row + 1, col + 1))
        )
    return torch.stack(out)


# the OpenGL specification's table: major axis, and what s and t run along
CUBE_FACES = [
    ((1, 0, 0), (0, 0, -1), (0, -1, 0)),
    ((-1, 0, 0), (0, 0, 1), (0, -1, 0)),
    ((0, 1, 0), (1, 0, 0), (0, 0, 1)),
    ((0, -1, 0), (1, 0, 0), (0, 0, -1)),
    ((0, 0, 1), (1, 0, 0), (0, -1, 0)),
    ((0, 0, -1), (-1, 0, 0), (0, -1, 0)),
]


def cube_point(face: int, row: float, col: float, R: int) -> np.ndarray:
    """The centre of a texel, or of one beyond the face, on the plane of the face of the cube [-1, 1]^3."""
    major, s, t = (np.array(v, dtype=float) for v in CUBE_FACES[face])
    return major + ((col + 0.5) * 2 / R - 1) * s + ((row + 0.5) * 2 / R - 1) * t


def cube_texel(cube: Tensor, face: int, row: int, col: int) -> Tensor:
    """The texel; one beyond an edge is found by folding its plane around the edge."""
    R = cube.shape[1]
    if not 0 <= row < R and not 0 <= col < R:
        inner_row, inner_col = min(max(row, 0), R - 1), min(max(col, 0), R - 1)
        return (
            cube[face, inner_row, inner_col]
            + cube_texel(cube, face, row, inner_col)
            + cube_texel(cube, face, inner_row, col)
        ) / 3
    if 0 <= row < R and 0 <= col < R:
        return cube[face, row, col]
    p = cube_point(face, row, col, R)
    over = int(np.argmax(np.abs(p)))
    major = int(np.argmax(np.abs(np.array(CUBE_FACES[face][0]))))
    p[major] -= np.sign(p[major]) * (abs(p[over]) - 1)
    p[over] = np.sign(p[over])
    nearest = min(
        ((f, r, c) for f in range(6) for r in range(R) for c in range(R)),
        key=lambda i: float(np.linalg.norm(cube_point(*i, R) - p)),
    )
    return cube[nearest]


def cube_texture(cube: Tensor, directions: Tensor) -> Tensor:
    """cube (6, R, R, C), directions (P, 3); one mip level."""
    R = cube.shape[1]
    frames = torch.tensor(CUBE_FACES, dtype=torch.float64)
    out = []
    for d in directions:
        face = int((frames[:, 0] @ d.detach()).argmax())
        major, s, t = frames[face] @ d
        x, y = (s / major + 1) / 2 * R - 0.5, (t / major + 1) / 2 * R - 0.5
        col, row = math.floor(x), math.floor(y)
        fx, fy = x - col, y - row
        out.append(
            (1 - fy) * ((1 - fx) * cube_texel(cube, face, row, col) + fx * cube_texel(cube, face, row, col + 1))
            + fy * ((1 - fx) * cube_texel(cube, face, row + 1, col) + fx * cube_texel(cube, face, row + 1, col + 1))
        )
    return torch.stack(out)


def antialias(color: Tensor, rast: Tensor, clip: Tensor, faces: Tensor) -> Tensor:
    """color (B, H, W, C): Laine et al. 2020, section 3.4, one pair of pixels at a time."""
    B, H, W, _ = color.shape
    change = {}

    def screen(b: int, vertex: int) -> Tensor:
        p = clip[b, vertex]
        return torch.stack([(p[0] / p[3] + 1) / 2 * W, (p[1] / p[3] + 1) / 2 * H])

    def side(a: Tensor, b: Tensor, c: Tensor) -> bool:
        return bool((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]) > 0)

    def silhouette(b: int, f: int, i: int, j: int) -> bool:
        own = next(v for v in faces[f].tolist() if v not in (i, j))
        others = [g for g in range(len(faces)) if g != f and {i, j} <= set(faces[g].tolist())]
        if len(others) != 1:
            return True
        mate = next(v for v in faces[others[0]].tolist() if v not in (i, j))
        p, q = screen(b, i), screen(b, j)
        return side(p, q, screen(b, own)) == side(p, q, screen(b, mate))

    for b in range(B):
        for row in range(H):
            for col in range(W):
                for axis, other in ((0, (row, col + 1)), (1, (row + 1, col))):
                    if other[0] >= H or other[1] >= W:
                        continue
                    here, there = rast[b, row, col], rast[b, other[0], other[1]]
                    if here[3] == there[3]:
                        continue
                    near, far, way = (row, col), other, 1
                    if here[3] == 0 or (there[3] > 0 and there[2] < here[2]):
                        near, far, way = other, (row, col), -1
                    f = int(rast[b, near[0], near[1], 3]) - 1
                    centre = torch.tensor([near[1] + 0.5, near[0] + 0.5], dtype=torch.float64)
                    for k in range(3):
                        i, j = int(faces[f, (k + 1) % 3]), int(faces[f, (k + 2) % 3])
                        if not silhouette(b, f, i, j):
                            continue
                        p, q = screen(b, i) - centre, screen(b, j) - centre
                        along, across = (q - p).abs()[axis], (q - p).abs()[1 - axis]
                        if across < along or (across == along and axis == 1):
                            continue  # belongs to the other direction of pairs
                        if (p[1 - axis] > 0) == (q[1 - axis] > 0):
                            continue
                        crossing = way * (p - p[1 - axis] * (q - p) / (q - p)[1 - axis])[axis]
                        if not 0 <= crossing <= 1:
                            continue
                        share = crossing - 0.5
                        to = far if share > 0 else near
                        delta = share * (color[b, near[0], near[1]] - color[b, far[0], far[1]])
                        change[(b, *to)] = change.get((b, *to), 0) + delta
                        break
    rows = [
        torch.stack([torch.stack([color[b, r, c] + change.get((b, r, c), 0) for c in range(W)]) for r in range(H)])
        for b in range(B)
    ]
    return torch.stack(rows)
