"""Masks of posed photos that have none: GrabCut in every photo, seeded by what all photos together know.

What they know: where the cameras look, the sparse points of structure from motion that stand above the floor there
(the object), the floor's own points, and, once there is a first set of masks, their visual hull: what no other view
allows is background here, however it is coloured.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree
from torch import Tensor

from viewmesh.geometry.camera import Cameras
from viewmesh.geometry.hull import agreeing_views, voxel_centers
from viewmesh.progress import Progress, check
from viewmesh.views.floor import fit_floor
from viewmesh.views.grabcut import SIDE, cut, enlarged
from viewmesh.views.normalise import center_of_view

GRID = 64
ROUNDS = 3
AGREE = 0.85  # share of the views seeing a voxel that must hold it inside, for the voxel to be the object's
ROOM = 0.25  # how far beyond the object's sparse points the object may reach, in diagonals of their box


@dataclass(frozen=True)
class Sparse:
    """Points of structure from motion: points (P, 3), and sightings: seen (S, 2) of view and point, pixels (S, 2)."""

    points: np.ndarray
    seen: np.ndarray
    pixels: np.ndarray


@dataclass(frozen=True)
class Object:
    """Where the object is thought to be. points: its sparse points (indices), bounds: (2, 3), floor: (4,) or None."""

    points: np.ndarray
    bounds: Tensor
    floor: np.ndarray | None


def multiview_masks(
    images: list[np.ndarray],
    known: Tensor | None,
    cameras: Cameras,
    sparse: Sparse | None,
    progress: Progress,
    cancelled: Callable[[], bool],
) -> list[np.ndarray]:
    """Coverage (H, W) uint8 of each (H, W, 3) image; all of one size. known: (N, H, W) bool, False where an image has
    no pixel; None: all are known."""
    small = [_small(image) for image in images]
    h, w = small[0].shape[:2]
    cameras_small = cameras.resized(h, w)
    seen = None if known is None else torch.nn.functional.interpolate(known[:, None].float(), (h, w))[:, 0] > 0
    found = find_object(cameras, sparse)
    room = _voxels(found, cameras)

    def first(n: int) -> np.ndarray:
        return cut(small[n], _first_labels(n, cameras_small, room, found, sparse, cameras.height / h), 5)

    masks = _of_each_view(first, 0, len(images), progress, cancelled)
    for turn in range(ROUNDS):
        inside, seeing = agreeing_views(
            cameras_small, torch.from_numpy(np.stack(masks)).float(), room.points, known=seen
        )

        def again(n: int, before=tuple(masks), inside=inside, seeing=seeing) -> np.ndarray:
            mine = None if seen is None else seen[n : n + 1]
            return cut(small[n], _hull_labels(n, before[n], mine, cameras_small, room, inside, seeing), 3)

        masks = _of_each_view(again, 1 + turn, len(images), progress, cancelled)
    return [enlarged(m, image.shape[:2]) for m, image in zip(masks, images, strict=True)]


def _of_each_view(
    mask_of: Callable[[int], np.ndarray], turn: int, views: int, progress: Progress, cancelled: Callable[[], bool]
) -> list[np.ndarray]:
    """mask_of(n) of every view, on all cores: GrabCut holds no lock."""
    masks = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for n, mask in enumerate(pool.map(mask_of, range(views))):
            if cancelled():
                pool.shutdown(cancel_futures=True)
                check(cancelled)
            progress("mask", views * turn + n + 1, views * (1 + ROUNDS))
            masks.append(mask)
    return masks


@dataclass(frozen=True)
class Voxels:
    points: Tensor  # (P, 3) float32
    side: float


def find_object(cameras: Cameras, sparse: Sparse | None) -> Object:
    """The largest cluster of sparse points above the floor near the centre of view; without points, a ball there."""
    axes = torch.stack([cameras.cx, cameras.cy], -1)
    center = center_of_view(cameras, axes).numpy()
    eyes = cameras.centers.numpy()
    distance = float(np.median(np.linalg.norm(eyes - center, axis=1)))
    shorter = float((torch.minimum(cameras.width / cameras.fx, cameras.height / cameras.fy) / 2).median())
    radius = 0.8 * distance * shorter
    ball = Object(np.zeros(0, np.int64), torch.tensor(np.stack([center - radius, center + radius])), None)
    if sparse is None or len(sparse.points) < 20:
        return ball
    up = cameras.world_from_camera[:, :3, 1].mean(0).numpy()
    tolerance = 0.006 * distance
    floor = fit_floor(sparse.points[_near(sparse.points, center, 2 * radius)], eyes, up, tolerance)
    candidates = np.flatnonzero(_near(sparse.points, center, 1.5 * radius))
    if floor is not None:
        heights = sparse.points[candidates] @ floor[:3] + floor[3]
        candidates = candidates[heights > 3 * tolerance]
    cluster = _main_cluster(sparse.points, candidates, center, link=0.03 * distance)
    if len(cluster) < 10:
        return replace(ball, floor=floor)
    low, high = np.percentile(sparse.points[cluster], [1, 99], axis=0)
    reach = ROOM * float(np.linalg.norm(high - low))
    return Object(cluster, torch.tensor(np.stack([low - reach, high + reach])), floor)


def _near(points: np.ndarray, center: np.ndarray, radius: float) -> np.ndarray:
    return np.linalg.norm(points - center, axis=1) < radius


def _main_cluster(points: np.ndarray, candidates: np.ndarray, center: np.ndarray, link: float) -> np.ndarray:
    """Of the points linked by steps of at most `link`, the cluster with the most points, near ones counting more."""
    if len(candidates) == 0:
        return candidates
    chosen = points[candidates]
    pairs = KDTree(chosen).query_pairs(link, output_type="ndarray")
    ones = np.ones(len(pairs))
    graph = coo_array((ones, (pairs[:, 0], pairs[:, 1])), shape=(len(chosen), len(chosen)))
    _, label = connected_components(graph, directed=False)
    away = np.linalg.norm(chosen - center, axis=1)
    weight = np.bincount(label, 1 / (away + away.mean() + 1e-12))
    return candidates[label == weight.argmax()]


def _voxels(found: Object, cameras: Cameras) -> Voxels:
    """Where the object may be: a grid over its bounds, above the floor."""
    side = float((found.bounds[1] - found.bounds[0]).max()) / GRID
    points = voxel_centers(GRID, found.bounds)
    if found.floor is not None:
        plane = torch.from_numpy(found.floor).float()
        points = points[points @ plane[:3] + plane[3] > 0]
    else:
        middle, radius = found.bounds.mean(0).float(), float((found.bounds[1] - found.bounds[0]).max()) / 2
        points = points[(points - middle).norm(dim=-1) < radius] if not len(found.points) else points
    return Voxels(points, side)


def _first_labels(
    n: int, cameras: Cameras, room: Voxels, found: Object, sparse: Sparse | None, scale: float
) -> np.ndarray:
    """GrabCut labels of view n from the sparse points: what stands around them, and the floor's own points."""
    h, w = cameras.height, cameras.width
    labels = np.where(_silhouette(cameras[n], room, np.ones(len(room.points), bool)), cv2.GC_PR_BGD, cv2.GC_BGD)
    labels = labels.astype(np.uint8)
    if sparse is None or not len(found.points):
        labels[labels == cv2.GC_PR_BGD] = cv2.GC_PR_FGD
        return labels
    mine = sparse.seen[:, 0] == n
    pixels, point = sparse.pixels[mine] / scale, sparse.seen[mine, 1]
    is_object = np.isin(point, found.points)
    around = np.zeros((h, w), np.uint8)
    projected = cameras[n].project(torch.from_numpy(sparse.points[found.points]))[0][0].numpy()
    _dots(around, projected, round(0.025 * max(h, w)))
    labels[(around > 0) & (labels == cv2.GC_PR_BGD)] = cv2.GC_PR_FGD
    if found.floor is not None:
        heights = np.abs(sparse.points[point] @ found.floor[:3] + found.floor[3])
        on_floor = np.zeros((h, w), np.uint8)
        _dots(on_floor, pixels[~is_object & (heights < room.side)], 2)
        labels[on_floor > 0] = cv2.GC_BGD
    sure = np.zeros((h, w), np.uint8)
    _dots(sure, pixels[is_object], 2)
    labels[sure > 0] = cv2.GC_FGD
    return labels


def _hull_labels(
    n: int, mask: np.ndarray, known: Tensor | None, cameras: Cameras, room: Voxels, inside: Tensor, seeing: Tensor
) -> np.ndarray:
    """GrabCut labels of view n from its mask and the other views' hull: nothing outside it, undecided at its rim."""
    mine, sees = agreeing_views(cameras[n], torch.from_numpy(mask)[None].float(), room.points, known=known)
    others = (inside - mine) >= AGREE * (seeing - sees).clamp(min=1)
    hull = _silhouette(cameras[n], room, others.numpy())
    if not hull.any():
        return np.where(mask, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    allowed = cv2.dilate(hull.astype(np.uint8), np.ones((7, 7), np.uint8)) > 0
    labels = np.full(mask.shape, cv2.GC_BGD, np.uint8)
    labels[allowed] = cv2.GC_PR_BGD
    labels[hull] = cv2.GC_PR_FGD
    core = cv2.erode((hull & mask).astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
    labels[core] = cv2.GC_FGD
    return labels


def _silhouette(camera: Cameras, room: Voxels, chosen: np.ndarray) -> np.ndarray:
    """(H, W) bool: where the chosen voxels project to, without gaps between them."""
    h, w = camera.height, camera.width
    image = np.zeros((h, w), np.uint8)
    points = room.points[torch.from_numpy(chosen)]
    pixels, depth = camera.project(points)
    pixels, depth = pixels[0].numpy(), depth[0].numpy()
    seen = (depth > 0) & (pixels >= 0).all(-1) & (pixels < [w, h]).all(-1)
    if not seen.any():
        return image.astype(bool)
    x, y = pixels[seen].astype(int).T
    image[y, x] = 1
    across = int(np.ceil(float(camera.fx[0]) * room.side / float(np.median(depth[seen])) * 1.3)) | 1
    return cv2.morphologyEx(image, cv2.MORPH_CLOSE, _disc(across + 2)) > 0


def _disc(side: int) -> np.ndarray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side | 1, side | 1))


def _dots(image: np.ndarray, pixels: np.ndarray, radius: int) -> None:
    for x, y in np.clip(pixels, -1e4, 1e5).astype(int):
        cv2.circle(image, (int(x), int(y)), radius, 1, -1)


def _small(rgb: np.ndarray) -> np.ndarray:
    h, w = rgb.shape[:2]
    factor = min(1.0, SIDE / max(h, w))
    return cv2.resize(rgb, (max(1, round(w * factor)), max(1, round(h * factor))), interpolation=cv2.INTER_AREA)
