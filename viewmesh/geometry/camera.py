"""Cameras, and every convention of the field converted to ours here and nowhere else.

Ours: OpenGL camera axes (+x right, +y up, looks down -z), `world_from_camera`, pinhole intrinsics in pixels, pixel
(row i, column j) has its centre at (i + 0.5, j + 0.5), row 0 is the top. World +y up unless the input says otherwise.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# camera axes: OpenGL (+y up, looks down -z) from OpenCV (+y down, looks down +z); its own inverse
OPENGL_FROM_OPENCV = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))
# world axes: +y up from +z up (a turn by -90 degrees about x)
Y_UP_FROM_Z_UP = torch.tensor(
    [[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]],
    dtype=torch.float64,
)


@dataclass(frozen=True)
class Cameras:
    """N pinhole cameras over images of one size.

    world_from_camera: (N, 4, 4) float64, rigid, OpenGL camera axes.
    fx, fy, cx, cy: (N,) float64, pixels. height, width: image size, pixels.
    """

    world_from_camera: Tensor  # (N, 4, 4)
    fx: Tensor  # (N,)
    fy: Tensor  # (N,)
    cx: Tensor  # (N,)
    cy: Tensor  # (N,)
    height: int
    width: int

    def __len__(self) -> int:
        return len(self.world_from_camera)

    def __getitem__(self, index) -> "Cameras":
        """A slice, list or tensor of indices; the result is always a batch."""
        if isinstance(index, int):
            index = [index]
        return Cameras(
            self.world_from_camera[index], self.fx[index], self.fy[index], self.cx[index], self.cy[index],
            self.height, self.width,
        )  # fmt: skip

    def to(self, device: torch.device | str) -> "Cameras":
        return Cameras(
            self.world_from_camera.to(device), self.fx.to(device), self.fy.to(device), self.cx.to(device),
            self.cy.to(device), self.height, self.width,
        )  # fmt: skip

    @property
    def camera_from_world(self) -> Tensor:  # (N, 4, 4)
        return torch.linalg.inv(self.world_from_camera)

    @property
    def centers(self) -> Tensor:
        """Camera positions in the world, (N, 3)."""
        return self.world_from_camera[:, :3, 3]

    @property
    def fov_y_rad(self) -> Tensor:  # (N,)
        return 2 * torch.atan(self.height / (2 * self.fy))

    def resized(self, height: int, width: int) -> "Cameras":
        """The same cameras over images resampled to height x width."""
        sy, sx = height / self.height, width / self.width
        return replace(
            self, fx=self.fx * sx, fy=self.fy * sy, cx=self.cx * sx, cy=self.cy * sy, height=height, width=width
        )

    def moved(self, target_from_world: Tensor) -> "Cameras":
        """The same cameras after the world moved by a (4, 4) similarity: rotations stay rigid, positions scale."""
        m = target_from_world.to(self.world_from_camera)
        scale = similarity_scale(m)
        pose = m @ self.world_from_camera
        pose = torch.cat([torch.cat([pose[:, :3, :3] / scale, pose[:, :3, 3:]], -1), pose[:, 3:]], -2)
        return replace(self, world_from_camera=pose)

    def clip_from_camera(self, near: float | Tensor, far: float | Tensor) -> Tensor:
        """(N, 4, 4) projection to OpenGL clip space with y flipped, so that clip y = -1 is image row 0 (the top).

        near and far are z-depths > 0 in world units, one for all or (N,).
        """
        p = torch.zeros(len(self), 4, 4, dtype=self.fx.dtype, device=self.fx.device)
        p[:, 0, 0] = 2 * self.fx / self.width
        p[:, 0, 2] = 1 - 2 * self.cx / self.width
        p[:, 1, 1] = -2 * self.fy / self.height
        p[:, 1, 2] = 1 - 2 * self.cy / self.height
        p[:, 2, 2] = -(far + near) / (far - near)
        p[:, 2, 3] = -2 * far * near / (far - near)
        p[:, 3, 2] = -1
        return p

    def project(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """World points (P, 3) to pixels (N, P, 2) as (x, y) = (column, row) and z-depth (N, P), world units."""
        m = self.camera_from_world.to(points)
        p = points @ m[:, :3, :3].mT + m[:, None, :3, 3]  # (N, P, 3)
        depth = -p[..., 2]
        z = torch.where(depth.abs() < 1e-9, torch.full_like(depth, 1e-9), depth)
        x = self.fx.to(points)[:, None] * p[..., 0] / z + self.cx.to(points)[:, None]
        y = -self.fy.to(points)[:, None] * p[..., 1] / z + self.cy.to(points)[:, None]
        return torch.stack([x, y], -1), depth

    def unproject(self, depth: Tensor) -> Tensor:
        """z-depth images (N, H, W) to world points (N, H, W, 3); points of unknown depth (0) are the camera centre."""
        H, W = depth.shape[-2:]
        rows = torch.arange(H, dtype=depth.dtype, device=depth.device) + 0.5
        cols = torch.arange(W, dtype=depth.dtype, device=depth.device) + 0.5
        intrinsics = [k.to(depth)[:, None, None] for k in (self.fx, self.fy, self.cx, self.cy)]
        fx, fy, cx, cy = intrinsics
        x = (cols[None, None, :] - cx) / fx * depth
        y = -(rows[None, :, None] - cy) / fy * depth
        points = torch.stack([x.expand_as(depth), y.expand_as(depth), -depth], -1)
        m = self.world_from_camera.to(depth)
        return torch.einsum("nij,nhwj->nhwi", m[:, :3, :3], points) + m[:, None, None, :3, 3]


def similarity_scale(target_from_source: Tensor) -> Tensor:
    """The uniform scale of a (4, 4) similarity, a scalar tensor."""
    return torch.linalg.det(target_from_source[:3, :3]).abs() ** (1 / 3)


def look_at(eye: Tensor, target: Tensor, up: Tensor) -> Tensor:
    """world_from_camera (..., 4, 4) float64 of cameras at eye (..., 3) looking at target with +y near up."""
    eye, target, up = torch.broadcast_tensors(*(t.to(torch.float64) for t in (eye, target, up)))
    back = torch.nn.functional.normalize(eye - target, dim=-1)
    right = torch.linalg.cross(up, back)
    # looking straight along up: any right will do, take the axis that up has least of
    degenerate = right.norm(dim=-1, keepdim=True) < 1e-6
    other = torch.nn.functional.one_hot(up.abs().argmin(-1), 3).to(up)
    right = torch.nn.functional.normalize(torch.where(degenerate, torch.linalg.cross(other, back), right), dim=-1)
    m = torch.zeros(*eye.shape[:-1], 4, 4, dtype=torch.float64)
    m[..., :3, 0], m[..., :3, 1], m[..., :3, 2], m[..., :3, 3] = right, torch.linalg.cross(back, right), back, eye
    m[..., 3, 3] = 1
    return m


def pinhole(world_from_camera: Tensor, fov_y_rad: float, height: int, width: int) -> Cameras:
    """Cameras with square pixels, a centred principal point and one vertical field of view."""
    n = len(world_from_camera)
    f = torch.full((n,), height / (2 * math.tan(fov_y_rad / 2)), dtype=torch.float64)
    return Cameras(
        world_from_camera.to(torch.float64), f, f.clone(),
        torch.full((n,), width / 2, dtype=torch.float64), torch.full((n,), height / 2, dtype=torch.float64),
        height, width,
    )  # fmt: skip


def canonical6(height: int, width: int) -> Cameras:
    """The six-view rig: front, right, back, left, top, bottom; 40 degrees vertical field of view, distance 2.2.

    front looks from +z, right from +x, top from +y (its image's up is -z), bottom from -y (its image's up is +z).
    """
    eyes = torch.tensor([[0, 0, 1], [1, 0, 0], [0, 0, -1], [-1, 0, 0], [0, 1, 0], [0, -1, 0]], dtype=torch.float64)
    ups = torch.tensor([[0, 1, 0]] * 4 + [[0, 0, -1], [0, 0, 1]], dtype=torch.float64)
    return pinhole(look_at(2.2 * eyes, torch.zeros(6, 3), ups), math.radians(40), height, width)


def fibonacci_sphere(n: int, turn_rad: float = 0.0) -> Tensor:
    """n unit directions (n, 3) float64 spread evenly over the sphere, from +y down, turned about y."""
    i = torch.arange(n, dtype=torch.float64)
    y = 1 - (2 * i + 1) / n
    r = torch.sqrt(1 - y * y)
    phi = i * math.pi * (3 - math.sqrt(5)) + turn_rad
    return torch.stack([r * torch.sin(phi), y, r * torch.cos(phi)], -1)
