"""The coarse half of registration: every rotation of a fine grid is tried by splatting points into small masks.

For each rotation, scale and position follow in closed form from the masks' areas and centroids; then silhouettes,
depths and colours are compared. Nothing is rendered, so thousands of rotations take seconds.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from viewmesh.nvdiffrec.register_proxy import Proxy, Sights
from viewmesh.progress import check
from viewmesh.views.normalise import center_of_view

FITS = 2  # rounds of scale and position per rotation
CHUNK = {"cpu": 48, "cuda": 256}
Z_BITS, POINT_BITS = 15, 11  # of a splat's sort key; 2**POINT_BITS points at most
EMPTY = 2 ** (Z_BITS + POINT_BITS)
COLOR_WEIGHT, DEPTH_WEIGHT = 0.3, 0.5


@dataclass(frozen=True)
class Poses:
    """K similarities: x_scene = scale * rotation @ (x_mesh - proxy.center) + position."""

    rotation: Tensor  # (K, 3, 3)
    scale: Tensor  # (K,)
    position: Tensor  # (K, 3)
    score: Tensor  # (K,)

    def __getitem__(self, index) -> "Poses":
        return Poses(self.rotation[index], self.scale[index], self.position[index], self.score[index])

    def matrices(self, proxy: Proxy) -> Tensor:
        """(K, 4, 4) float64 scene_from_mesh."""
        linear = self.scale.double()[:, None, None] * self.rotation.double()
        m = torch.eye(4, dtype=torch.float64, device=linear.device).repeat(len(linear), 1, 1)
        m[:, :3, :3] = linear
        m[:, :3, 3] = self.position.double() - linear @ proxy.center.double()
        return m


def super_fibonacci(count: int) -> Tensor:
    """Rotation matrices (count, 3, 3) float64 spread evenly over SO(3): Alexa 2022, "Super-Fibonacci Spirals: Fast,
    Low-Discrepancy Sampling of SO(3)"."""
    phi, psi = math.sqrt(2), 1.533751168755204288118041413
    s = torch.arange(count, dtype=torch.float64) + 0.5
    inner, outer = (s / count).sqrt(), (1 - s / count).sqrt()
    alpha, beta = 2 * math.pi * s / phi, 2 * math.pi * s / psi
    quaternion = torch.stack([inner * alpha.sin(), inner * alpha.cos(), outer * beta.sin(), outer * beta.cos()], -1)
    return rotation_matrices(quaternion)


def rotation_matrices(quaternion: Tensor) -> Tensor:
    """(..., 4) unit quaternions, x y z w, to (..., 3, 3)."""
    x, y, z, w = quaternion.unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w),
        2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w),
        2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, -1).reshape(*x.shape, 3, 3)


def angle_between(a: Tensor, b: Tensor) -> Tensor:
    """Radians between rotations (..., 3, 3)."""
    trace = (a * b).sum((-2, -1))
    return torch.arccos(((trace - 1) / 2).clamp(-1, 1))


def distinct(poses: Poses, count: int, apart_rad: float) -> Poses:
    """The best `count` of the poses that are at least apart_rad from every better one."""
    order = poses.score.argsort(descending=True)
    kept: list[int] = []
    for i in order.tolist():
        if all(float(angle_between(poses.rotation[i], poses.rotation[k])) >= apart_rad for k in kept):
            kept.append(i)
            if len(kept) == count:
                break
    return poses[kept]


@torch.no_grad()
def search(
    proxy: Proxy, sights: Sights, rotations: Tensor, step: Callable[[float], None], cancelled: Callable[[], bool]
) -> Poses:
    """All rotations (R, 3, 3) with their best scale and position, scored. step hears the share that is done."""
    device = proxy.points.device
    frame = _Frame(proxy, sights)
    found = []
    chunks = rotations.to(device, torch.float32).split(CHUNK.get(device.type, 48))
    for i, chunk in enumerate(chunks):
        check(cancelled)
        found.append(frame.fit(chunk))
        step((i + 1) / len(chunks))
    fields = ("rotation", "scale", "position", "score")
    return Poses(*(torch.cat([getattr(f, name) for f in found]) for name in fields))


class _Frame:
    """What is the same for all rotations."""

    def __init__(self, proxy: Proxy, sights: Sights) -> None:
        device, S = proxy.points.device, sights.size
        self.points, self.colors, self.radius = proxy.points - proxy.center, proxy.point_colors, proxy.radius
        self.sights, self.colored = sights, proxy.colored
        self.mask = sights.alpha >= 0.5  # (N, S, S)
        cameras = sights.cameras
        self.fx, self.fy = cameras.fx.float().to(device), cameras.fy.float().to(device)
        self.cx, self.cy = cameras.cx.float().to(device), cameras.cy.float().to(device)
        at = torch.arange(S, device=device) + 0.5
        self.grid = torch.stack([at[None].expand(S, S), at[:, None].expand(S, S)], -1).reshape(-1, 2)  # x, y
        self.area, self.centroid = self.moments(self.mask.reshape(1, len(sights), -1).float())  # (1, N), (1, N, 2)
        self.start = center_of_view(cameras, self.centroid[0].double().cpu()).float().to(device)
        world = sights.camera_from_scene
        z = -(world[:, :3] @ torch.cat([self.start, torch.ones(1, device=device)]))[:, 2]  # (N,)
        self.z = z
        # a shift d in the scene moves a view's centroid by these rows times d
        rows = torch.stack(
            [self.fx[:, None] / z[:, None] * world[:, 0, :3], -self.fy[:, None] / z[:, None] * world[:, 1, :3]], 1
        ).reshape(-1, 3)
        ridge = 1e-3 * float(rows.square().sum()) / 3 * torch.eye(3, device=device)
        self.shift = torch.linalg.solve(rows.T @ rows + ridge, rows.T)  # (3, 2N)
        # mean silhouette of the mesh by Cauchy's formula is not known; its radius against the masks' will do to begin
        reach = (self.area[0] / math.pi).sqrt() * z / self.fx
        self.scale = 0.8 * float(reach.mean()) / self.radius
        self.near, self.far = float(z.min()) * 0.3, float(z.max()) * 2

    def moments(self, coverage: Tensor) -> tuple[Tensor, Tensor]:
        """(K, N) areas in pixels and (K, N, 2) centroids of coverages (K, N, S*S)."""
        area = coverage.sum(-1)
        return area, (coverage @ self.grid) / area[..., None].clamp(min=1)

    def fit(self, rotation: Tensor) -> Poses:
        K = len(rotation)
        scale = torch.full((K,), self.scale, device=rotation.device)
        position = self.start.expand(K, 3)
        turned = self.points @ rotation.mT  # (K, P, 3)
        for _ in range(FITS):
            covered = (self.splat(turned, scale, position) < EMPTY).float()
            area, centroid = self.moments(covered)
            factor = (self.area.clamp(min=1).log() - area.clamp(min=1).log()).mean(1).mul(0.5).exp().clamp(0.5, 2)
            scale = scale * factor
            position = position + (self.centroid - centroid).reshape(K, -1) @ self.shift.T
        return Poses(rotation, scale, position, self.score(self.splat(turned, scale, position)))

    def splat(self, turned: Tensor, scale: Tensor, position: Tensor) -> Tensor:
        """(K, N, S*S) int32 sort keys of the nearest point per pixel, EMPTY where there is none or no photo."""
        K, N, S = len(turned), len(self.sights), self.sights.size
        world = turned * scale[:, None, None] + position[:, None]
        m = self.sights.camera_from_scene
        p = torch.einsum("kpj,nij->knpi", world, m[:, :3, :3]) + m[:, None, :3, 3]
        z = (-p[..., 2]).clamp(min=1e-3)
        column = (self.fx[:, None] * p[..., 0] / z + self.cx[:, None]).floor()
        row = (-self.fy[:, None] * p[..., 1] / z + self.cy[:, None]).floor()
        inside = (column >= 0) & (column < S) & (row >= 0) & (row < S)
        level = ((z - self.near) / (self.far - self.near) * 2**Z_BITS).clamp(0, 2**Z_BITS - 1).int()
        number = torch.arange(turned.shape[1], device=turned.device, dtype=torch.int32)
        key = torch.where(inside, (level << POINT_BITS) | number, EMPTY)
        pixel = torch.where(inside, row * S + column, 0).long()
        empty = torch.full((K, N, S * S), EMPTY, dtype=torch.int32, device=turned.device)
        splats = empty.scatter_reduce(2, pixel, key, "amin")
        known = self.sights.known
        return splats if known is None else splats.masked_fill(~known.reshape(N, S * S), EMPTY)

    def score(self, key: Tensor) -> Tensor:
        """(K,) mean silhouette IoU, plus what colours say, minus what depths say."""
        N, S2 = key.shape[1:]
        covered, mask = key < EMPTY, self.mask.reshape(N, S2)
        both = covered & mask
        total = (both.sum(-1) / (covered | mask).sum(-1).clamp(min=1)).mean(1)
        if self.colored:
            seen = self.colors[(key & (2**POINT_BITS - 1)).long() * covered]
            total = total + COLOR_WEIGHT * correlation(seen, self.sights.color.reshape(N, S2, 3), both)
        if self.sights.depth is not None:
            known = self.sights.depth.reshape(N, S2)
            z = (key >> POINT_BITS).float() / 2**Z_BITS * (self.far - self.near) + self.near
            both = both & (known > 0)
            size = self.radius * self.scale  # about the object's, scene units
            error = ((z - known).abs() / size).clamp(max=1)
            total = total - DEPTH_WEIGHT * (error * both).sum((1, 2)) / both.sum((1, 2)).clamp(min=1)
        return total


def correlation(ours: Tensor, theirs: Tensor, where: Tensor) -> Tensor:
    """(K,) Pearson correlation over views, pixels and channels of colours (K, N, Q, 3) and (N, Q, 3), each channel's
    mean taken out first, so that neither gain nor tint of the light matters much. where: (K, N, Q) bool."""
    w = where[..., None].float()
    count = w.sum((1, 2), keepdim=True).clamp(min=1)
    a = (ours - (ours * w).sum((1, 2), keepdim=True) / count) * w
    b = (theirs - (theirs * w).sum((1, 2), keepdim=True) / count) * w
    spread = (a.square().sum((1, 2, 3)) * b.square().sum((1, 2, 3))).sqrt()
    return (a * b).sum((1, 2, 3)) / spread.clamp(min=1e-6)
