"""The fine half of registration: Levenberg-Marquardt on what a rendered proxy and the crops disagree about.

Residuals are blurred coverage, colour after the best gain and offset per channel, and depth where there is any. The
Jacobian over the seven parameters is taken by finite differences: with a few thousand triangles and crops of a hundred
pixels, fourteen more renders are cheaper than one backward pass, and interior colours count as much as silhouettes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from viewmesh.nvdiffrec.register_proxy import Proxy, Sights
from viewmesh.nvdiffrec.register_search import COLOR_WEIGHT, DEPTH_WEIGHT, correlation
from viewmesh.nvdiffrec.rendering import planes
from viewmesh.progress import check
from viewmesh.render.rasterizer import Rasterizer

COLOR_SCALE, COLOR_SHARE = 0.15, 0.3  # sRGB units at which a residual loses its say; weight beside coverage
DEPTH_SCALE, DEPTH_SHARE = 3.0, 0.2  # pixels' footprints; weight beside coverage
IMAGES = {"cpu": 64, "cuda": 512}  # drawn at once


@dataclass(frozen=True)
class Agreement:
    """iou: mean over the views of coverages cut at one half. color: correlation, or None. depth: median absolute
    difference in scene units where both are known, or None. score: of all three, larger is better."""

    iou: float
    color: float | None
    depth: float | None
    score: float


class Aligner:
    """A proxy and the crops it is compared with, ready to be drawn under any similarity."""

    def __init__(self, proxy: Proxy, sights: Sights, rasterizer: Rasterizer, blur_px: float) -> None:
        self.proxy, self.sights, self.rasterizer = proxy, sights, rasterizer
        device = proxy.vertices.device
        camera = sights.cameras.camera_from_world
        clip_from_camera = sights.cameras.clip_from_camera(*planes(sights.cameras))
        self.clip_from_scene = (clip_from_camera @ camera).to(device)  # (N, 4, 4)
        self.axis = -camera[:, 2].to(device)  # (N, 4): z-depth of a scene point
        self.kernel = _gaussian(sights.size, blur_px, device)  # (S/2, S)
        self.target = self.blurred(sights.alpha[..., None])[..., 0]
        self.target_color = self.blurred(sights.color * sights.alpha[..., None])
        self.footprint = self._footprint()

    def _footprint(self) -> float:
        """Scene units that one pixel spans where the object is, about."""
        z = self.sights.cameras.centers.norm(dim=-1)
        return float((z / self.sights.cameras.fx).mean())

    def blurred(self, images: Tensor) -> Tensor:
        """(..., S, S, C) to (..., S/2, S/2, C): a Gaussian, looked at in every second pixel."""
        x = torch.einsum("...xc,sx->...sc", images, self.kernel)
        return torch.einsum("...yxc,sy->...sxc", x, self.kernel)

    @torch.no_grad()
    def draw(self, scene_from_mesh: Tensor) -> tuple[Tensor, Tensor]:
        """(K, N, S, S, 4) premultiplied unlit sRGB and coverage, and z-depth (K, N, S, S), 0 = empty, under (K, 4, 4)
        similarities; empty outside the photos, too."""
        K, N, S = len(scene_from_mesh), len(self.sights), self.sights.size
        m = scene_from_mesh.to(self.clip_from_scene)
        clip_from_mesh = (self.clip_from_scene[None] @ m[:, None]).reshape(K * N, 4, 4).float()
        axes = torch.einsum("ni,kij->knj", self.axis, m).reshape(K * N, 4).float()
        vertices = torch.cat([self.proxy.vertices, torch.ones_like(self.proxy.vertices[:, :1])], -1)
        attributes = torch.cat([self.proxy.colors, self.proxy.vertices], -1)
        images, depths = [], []
        size = IMAGES.get(vertices.device.type, 64)
        for matrices, axis in zip(clip_from_mesh.split(size), axes.split(size), strict=True):
            clip = vertices @ matrices.mT
            rast = self.rasterizer.rasterize(clip, self.proxy.faces, S, S).rast
            covered = rast[..., 3:] > 0
            values, _ = self.rasterizer.interpolate(attributes, rast, self.proxy.faces)
            canvas = torch.cat([values[..., :3], torch.ones_like(values[..., :1])], -1) * covered
            images.append(self.rasterizer.antialias(canvas, rast, clip, self.proxy.faces, self.proxy.topology))
            z = torch.einsum("bhwi,bi->bhw", values[..., 3:], axis[:, :3]) + axis[:, 3, None, None]
            depths.append(torch.where(covered[..., 0], z, 0.0))
        image = torch.cat(images).reshape(K, N, S, S, 4).clamp(0, 1)
        depth = torch.cat(depths).reshape(K, N, S, S)
        known = self.sights.known
        return (image, depth) if known is None else (image * known[..., None], depth * known)

    def residuals(self, scene_from_mesh: Tensor) -> Tensor:
        """(K, D); the first of the K is where weights, gains and offsets are taken."""
        image, depth = self.draw(scene_from_mesh)
        soft = self.blurred(image)
        alpha = soft[..., 3]
        parts = [(alpha - self.target).flatten(1)]
        if self.proxy.colored:
            parts.append(self._color(soft[..., :3], alpha))
        if self.sights.depth is not None:
            parts.append(self._depth(depth))
        return torch.cat(parts, 1)

    def _color(self, color: Tensor, alpha: Tensor) -> Tensor:
        w = (alpha[0] * self.target).square()[..., None]  # (N, S, S, 1): deep inside both
        x, y, count = color[0], self.target_color, w.sum().clamp(min=1)
        mean_x, mean_y = (x * w).sum((0, 1, 2)) / count, (y * w).sum((0, 1, 2)) / count
        variance = ((x - mean_x).square() * w).sum((0, 1, 2)) / count
        gain = (((x - mean_x) * (y - mean_y) * w).sum((0, 1, 2)) / count / variance.clamp(min=1e-5)).clamp(0, 3)
        difference = (color - mean_x) * gain - (y - mean_y)
        say = w * (COLOR_SHARE / (1 + (difference[0] / COLOR_SCALE).square()))
        return (difference * say.sqrt()).flatten(1)

    def _depth(self, depth: Tensor) -> Tensor:
        known = self.sights.depth
        assert known is not None
        difference = (depth - known) / self.footprint
        both = (known > 0) & (depth[0] > 0)
        say = both * (DEPTH_SHARE / (1 + (difference[0] / DEPTH_SCALE).square()))
        return (difference.clamp(-DEPTH_SCALE * 2, DEPTH_SCALE * 2) * (depth > 0) * say.sqrt()).flatten(1)

    def align(
        self, scene_from_mesh: Tensor, steps: int, step: Callable[[float], None], cancelled: Callable[[], bool]
    ) -> Tensor:
        """The (4, 4) float64 similarity after at most `steps` accepted or refused steps. step hears the share done."""
        pose, damping = scene_from_mesh.double(), 1e-2
        center, reach = self.proxy.center.double(), self.proxy.radius
        for i in range(steps):
            check(cancelled)
            step(i / steps)
            scale = float(torch.linalg.det(pose[:3, :3]).abs() ** (1 / 3))
            size = reach * scale  # scene units: all seven parameters are measured in it
            if not size > 0:
                break  # cameras that are no cameras of the object
            h = 0.7 * self.footprint / size
            twists = torch.cat([torch.zeros(1, 7), h * torch.eye(7), -h * torch.eye(7)]).double().to(pose.device)
            r = self.residuals(moved(pose, twists, center, size))
            J = (r[1:8] - r[8:]) / (2 * h)  # (7, D)
            H, g, cost = (J @ J.T).double(), (J @ r[0]).double(), float(r[0].square().sum())
            trials = torch.tensor([damping * f for f in (0.1, 1.0, 30.0)], dtype=torch.float64, device=pose.device)
            A = H + trials[:, None, None] * torch.diag(H.diagonal().clamp(min=1e-9))
            delta = -torch.linalg.solve_ex(A, g.expand(3, 7))[0].nan_to_num(0).clamp(-0.3, 0.3)
            tried = moved(pose, torch.cat([torch.zeros_like(delta[:1]), delta]), center, size)
            costs = self.residuals(tried).square().sum(1)[1:]
            best = int(costs.argmin())
            if not float(costs[best]) < cost:
                damping *= 100
                if damping > 1e4:
                    break
                continue
            pose, damping = tried[best + 1], float(trials[best].clamp(1e-4, 1e3))
            if float(delta[best].abs().max()) < 0.02 * h:
                break
        return pose

    def agreement(self, scene_from_mesh: Tensor) -> Agreement:
        image, depth = self.draw(scene_from_mesh[None])
        ours, theirs = image[0, ..., 3] >= 0.5, self.sights.alpha >= 0.5
        iou = float(((ours & theirs).sum((1, 2)) / (ours | theirs).sum((1, 2)).clamp(min=1)).mean())
        score, color, off = iou, None, None
        if self.proxy.colored:
            straight = image[0, ..., :3] / image[0, ..., 3:].clamp(min=1e-3)
            N, S = len(theirs), self.sights.size
            pixels = [t.reshape(N, S * S, -1) for t in (straight, self.sights.color, ours & theirs)]
            color = float(correlation(pixels[0][None], pixels[1], pixels[2][None, ..., 0]))
            score += COLOR_WEIGHT * color
        if self.sights.depth is not None:
            both = (depth[0] > 0) & (self.sights.depth > 0)
            errors = (depth[0] - self.sights.depth).abs()[both]
            if len(errors):
                off = float(errors.median())
                scale = float(torch.linalg.det(scene_from_mesh[:3, :3]).abs() ** (1 / 3))
                score -= DEPTH_WEIGHT * float((errors / (self.proxy.radius * scale)).clamp(max=1).mean())
        return Agreement(iou, color, off, score)


def moved(pose: Tensor, twists: Tensor, center: Tensor, size: float) -> Tensor:
    """(K, 4, 4) similarities: the pose (4, 4), then about its own centre turned by twists[:, :3] (radians), moved by
    size * twists[:, 3:6] and scaled by exp(twists[:, 6])."""
    at = pose[:3, :3] @ center + pose[:3, 3]
    x, y, z = twists[:, :3].unbind(-1)
    o = torch.zeros_like(x)
    skew = torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).reshape(-1, 3, 3)
    linear = torch.matrix_exp(skew) * torch.exp(twists[:, 6])[:, None, None]
    m = torch.eye(4, dtype=pose.dtype, device=pose.device).repeat(len(twists), 1, 1)
    m[:, :3, :3] = linear
    m[:, :3, 3] = at - linear @ at + size * twists[:, 3:6]
    return m @ pose


def _gaussian(size: int, sigma: float, device: torch.device) -> Tensor:
    """(size / 2, size): each row a Gaussian about the middle of two pixels, of sum one (less at the border)."""
    x = torch.arange(size, device=device, dtype=torch.float32)
    middle = torch.arange(size // 2, device=device, dtype=torch.float32) * 2 + 0.5
    g = torch.exp(-((x - middle[:, None]) ** 2) / (2 * sigma**2))
    return g / g.sum(1).amax()
