"""START HERE for registration: where a mesh of unknown rotation, scale and position lies among posed views.

    found = register(mesh, views, generator)
    mesh.transformed(found.scene_from_mesh)      # agrees with the views

A generative model makes the object in a frame of its own. Every rotation of a grid over SO(3) is tried coarsely
(`register_search`), the most promising ones are aligned by Levenberg-Marquardt on silhouettes, colours and depths
(`register_align`), and the best one again at a finer size. Coarse-to-fine multi-start search as in render-and-compare
pose estimation (e.g. Li et al. 2018, "DeepIM"), with masks' moments giving scale and position.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from viewmesh.errors import InputError
from viewmesh.geometry.camera import similarity_scale
from viewmesh.geometry.mesh import Mesh, TexturedMesh
from viewmesh.nvdiffrec.register_align import Agreement, Aligner
from viewmesh.nvdiffrec.register_proxy import proxy_of, sights_of
from viewmesh.nvdiffrec.register_search import Poses, distinct, search, super_fibonacci
from viewmesh.progress import Progress, check, never, silent
from viewmesh.render.rasterizer import get_rasterizer
from viewmesh.views.viewset import ViewSet

ENOUGH_IOU = 0.6  # below it the mesh shows something else than the views, or lies elsewhere


@dataclass(frozen=True)
class Plan:
    """How hard to search: rotations tried, candidates kept after each round, views and pixels looked at."""

    rotations: int = 1536
    search_views: int = 6
    search_size: int = 40
    candidates: int = 12
    apart_rad: float = 0.3
    coarse_views: int = 6
    coarse_size: int = 48
    coarse_steps: int = 6
    finalists: int = 4
    fine_views: int = 8
    fine_size: int = 96
    fine_steps: int = 8
    polish_views: int = 12
    polish_size: int = 144
    polish_steps: int = 6


@dataclass(frozen=True)
class Registration:
    """scene_from_mesh: (4, 4) float64 similarity; scale is its own. silhouette_iou: mean over views.

    color_correlation: of the mesh's base colours with the pixels, None where the mesh has a single colour.
    depth_error: median, scene units, None where the views have no depth.
    """

    scene_from_mesh: Tensor
    scale: float
    silhouette_iou: float
    color_correlation: float | None = None
    depth_error: float | None = None

    @property
    def good(self) -> bool:
        return self.silhouette_iou >= ENOUGH_IOU

    def json(self) -> dict[str, Any]:
        return {**asdict(self), "scene_from_mesh": self.scene_from_mesh.tolist()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Registration":
        known = {f.name: values[f.name] for f in fields(cls)}
        return cls(**{**known, "scene_from_mesh": torch.tensor(values["scene_from_mesh"], dtype=torch.float64)})


def register(
    mesh: Mesh | TexturedMesh,
    views: ViewSet,
    generator: torch.Generator,
    *,
    device: torch.device | str = "cpu",
    plan: Plan = Plan(),
    progress: Progress = silent,
    cancelled: Callable[[], bool] = never,
) -> Registration:
    """The similarity that brings a mesh into agreement with posed, masked views. Progress counts percent.

    mesh: in any frame, right-handed, roughly the object that the views show. Raises InputError for views without
    cameras or masks or with such as say nothing, InvalidMesh, Cancelled. A poor match is no error: look at `good`.
    """
    _require_sights(views)
    mesh.validate()
    device = torch.device(device)
    rasterizer = get_rasterizer(device)
    proxy = proxy_of(mesh, generator, device)

    def tell(share: float) -> None:
        progress("register", max(1, int(100 * share)), 100)

    def aligner(count: int, size: int, blur_px: float) -> Aligner:
        return Aligner(proxy, sights_of(views, count, size, device), rasterizer, blur_px)

    tell(0)
    sights = sights_of(views, plan.search_views, plan.search_size, device)
    tried = search(proxy, sights, super_fibonacci(plan.rotations), lambda share: tell(0.4 * share), cancelled)
    starts = distinct(tried, plan.candidates, plan.apart_rad).matrices(proxy)

    coarse = aligner(plan.coarse_views, plan.coarse_size, 1.5)
    aligned = _aligned(coarse, starts, plan.coarse_steps, lambda share: tell(0.4 + 0.25 * share), cancelled)
    finalists = _best(aligned, proxy_poses(aligned), plan.finalists)

    fine = aligner(plan.fine_views, plan.fine_size, 1.0)
    again = _aligned(fine, finalists, plan.fine_steps, lambda share: tell(0.65 + 0.2 * share), cancelled)
    best = max(again, key=lambda pair: pair[1].score)[0]

    check(cancelled)
    polish = aligner(plan.polish_views, plan.polish_size, 1.0)
    tell(0.86)
    best = polish.align(best, plan.polish_steps, lambda share: tell(0.86 + 0.13 * share), cancelled)
    final = polish.agreement(best)
    tell(1)
    matrix = best.cpu()
    scale = float(similarity_scale(matrix))
    if not (matrix.isfinite().all() and scale > 0):
        raise InputError("Under the views' cameras the object has no place.", hint="Give cameras, or leave out refine.")
    return Registration(matrix, scale, final.iou, final.color, final.depth)


def _require_sights(views: ViewSet) -> None:
    """Raises InputError where nothing in the views says where the object is."""
    inside = views.images[..., 3] > 127
    missing = ""
    if views.cameras is None:
        missing = "cameras"
    elif not all(t.isfinite().all() for t in (views.cameras.world_from_camera, views.cameras.fx, views.cameras.fy)):
        missing = "cameras of finite numbers"
    elif views.mask_source == "none":
        missing = "masks"
    elif bool(inside.all()) or not bool(inside.any()):
        missing = "masks with an inside and an outside"
    if missing:
        raise InputError(
            f"The views have no {missing} to register a mesh with.", hint="Give them, or leave out refine."
        )


def _aligned(
    aligner: Aligner, starts: Tensor, steps: int, step: Callable[[float], None], cancelled: Callable[[], bool]
) -> list[tuple[Tensor, Agreement]]:
    out = []
    for i, start in enumerate(starts):
        pose = aligner.align(start, steps, lambda share, i=i: step((i + share) / len(starts)), cancelled)
        out.append((pose, aligner.agreement(pose)))
        step((i + 1) / len(starts))
    return out


def proxy_poses(aligned: list[tuple[Tensor, Agreement]]) -> Poses:
    matrices = torch.stack([pose for pose, _ in aligned])
    scale = torch.linalg.det(matrices[:, :3, :3]).abs() ** (1 / 3)
    score = torch.tensor([agreement.score for _, agreement in aligned])
    return Poses(matrices[:, :3, :3] / scale[:, None, None], scale, matrices[:, :3, 3], score)


def _best(aligned: list[tuple[Tensor, Agreement]], poses: Poses, count: int) -> Tensor:
    """(K, 4, 4) the best few that did not end in the same place."""
    numbered = Poses(poses.rotation, torch.arange(len(aligned)).double(), poses.position, poses.score)
    return torch.stack([aligned[int(i)][0] for i in distinct(numbered, count, 0.1).scale])
