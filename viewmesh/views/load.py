"""START HERE: a folder or zip of views, untrusted, to a ViewSet: find, check, decode, pose, mask, normalise."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from viewmesh.errors import InputError
from viewmesh.geometry.camera import Cameras, canonical6, similarity_scale
from viewmesh.options import ViewRules
from viewmesh.progress import Progress, check, never, silent
from viewmesh.views import masks as masking
from viewmesh.views.archive import unpack
from viewmesh.views.cameras_file import CameraFile, Frame, named_files, read_cameras
from viewmesh.views.depth import check_depths, read_depth
from viewmesh.views.find import Files, find_files, is_canonical6, matched, natural
from viewmesh.views.grabcut import from_border
from viewmesh.views.images import read_mask, read_photo
from viewmesh.views.lens import Lens
from viewmesh.views.limits import Limits
from viewmesh.views.multiview_masks import Sparse, find_object, multiview_masks
from viewmesh.views.normalise import LONGEST_SIDE, normalise
from viewmesh.views.photo import Photo, padded, shrunk, undistorted
from viewmesh.views.pose import SFM_SIZE, Posed, pose
from viewmesh.views.viewset import CameraSource, MaskSource, ViewSet

MAX_SIZE = 1024
# Object sizes from the world's origin. Files hold float32, which rounds a coordinate by up to 2^-24 of it: from here on
# vertices are more than 0.12 % of the object's size astray, a pixel of the largest views, and small faces fold.
FARTHEST_SIZES = 2e4


@dataclass(frozen=True)
class Plan:
    """Which files make up each view, before any image is opened."""

    root: Path
    views: tuple[str, ...]
    masks: tuple[str, ...] | None
    depths: tuple[str, ...] | None
    frames: tuple[Frame, ...] | None  # of the camera file; their poses are used if they are the camera_source
    camera_file: CameraFile | None
    camera_source: CameraSource | None
    warnings: tuple[str, ...] = ()


def load_views(
    source: Path,
    rules: ViewRules,
    *,
    limits: Limits = Limits(),
    workdir: Path | None = None,
    max_size: int = MAX_SIZE,
    progress: Progress = silent,
    cancelled: Callable[[], bool] = never,
) -> ViewSet:
    """Reads a view set and brings it to one size and one frame.

    source: a folder or a .zip. workdir: where archives are unpacked and structure from motion works (a temporary
    folder if None). max_size: the long side of the images that come out, pixels; larger ones are scaled down.
    Views of other sizes are padded at the right and bottom, of which they then say nothing (ViewSet.known).

    Raises InputError (the data), PoseError (views that could not be posed), OptionError (a rule that does not fit),
    MissingModel (rembg asked for and not there), Cancelled.
    """
    with _work_folder(workdir) as work, _opened(Path(source), limits, work) as folder:
        plan = plan_views(folder, rules, limits)
        by_sfm = plan.camera_source == "sfm"
        side = max(max_size, SFM_SIZE) if by_sfm else max_size
        photos, mask_source = read_photos(plan, rules, limits, side, progress, cancelled)
        posed = pose(photos, work, limits, progress, cancelled) if by_sfm else None
    if posed is not None:
        photos = posed.photos
    width, height = (max(p.size[i] for p in photos) for i in (0, 1))
    photos = [padded(p, width, height) for p in photos]
    hints = _hints(plan, posed)
    photos = _masked(photos, mask_source, hints, progress, cancelled)
    if mask_source in ("rembg", "grabcut"):
        masking.check_found(photos)
    photos = [shrunk(p, max_size) for p in photos]
    views = ViewSet(
        names=tuple(p.name for p in photos),
        images=_images(photos),
        cameras=None if plan.camera_source is None else _cameras(photos),
        depths=_depths(photos),
        known=_known(photos),
        camera_source=plan.camera_source,
        mask_source=mask_source,
        warnings=plan.warnings + (() if posed is None else _unposed_warning(posed)),
    )
    camera_file = "" if plan.camera_file is None else plan.camera_file.name
    return views if views.cameras is None else _normalised(views, rules, hints, camera_file)


def survey(source: Path, rules: ViewRules, *, limits: Limits = Limits()) -> tuple[int, CameraSource | None]:
    """How many views there are and where their cameras would come from; no image is opened. Raises like load_views."""
    with _work_folder(None) as work, _opened(Path(source), limits, work) as folder:
        plan = plan_views(folder, rules, limits)
        return len(plan.views), plan.camera_source


@dataclass(frozen=True)
class Hints:
    """What is known of the scene besides its views, in world units. aabb: (2, 3), declared. up: (3,).
    floor: (4,) plane. sparse: the points of structure from motion."""

    aabb: Tensor | None = None
    up: Tensor | None = None
    floor: Tensor | None = None
    sparse: Sparse | None = None


def _hints(plan: Plan, posed: Posed | None) -> Hints:
    if posed is not None:
        cameras = _cameras(posed.photos)
        sparse = Sparse(posed.points, posed.seen, posed.pixels)
        floor = find_object(cameras, sparse).floor
        if floor is not None:
            return Hints(None, torch.from_numpy(floor[:3]), torch.from_numpy(floor), sparse)
        return Hints(None, cameras.world_from_camera[:, :3, 1].mean(0), None, sparse)
    if plan.camera_source == "canonical6":
        return Hints(up=torch.tensor([0.0, 1.0, 0.0]))
    aabb = None if plan.camera_file is None or plan.camera_file.aabb is None else plan.camera_file.aabb
    return Hints(aabb=None if aabb is None else torch.from_numpy(aabb))


def _unposed_warning(posed: Posed) -> tuple[str, ...]:
    return tuple(f"{name}: structure from motion could not pose this view; it is left out." for name in posed.unposed)


def plan_views(folder: Path, rules: ViewRules, limits: Limits) -> Plan:
    """Decides where poses come from and which files belong to which view. Raises InputError or OptionError."""
    files = find_files(folder)
    source = _camera_source(files, rules)
    camera_file, frames = None, None
    names, masks, depths = files.views, (), ()
    if files.camera_file is not None:
        path = files.root / files.camera_file
        camera_file = read_cameras(path, files.camera_file, limits, poses=source == "file")
        if source != "file":  # the rig goes by the order of the names
            order = sorted(camera_file.frames, key=lambda frame: natural(frame.file_path))
            camera_file = replace(camera_file, frames=tuple(order))
        frames = camera_file.frames
        names, masks, depths = named_files(files.root, camera_file)
    if source == "canonical6" and not is_canonical6(names):
        raise InputError(
            f"the canonical rig needs exactly six views named view_00 to view_05, there are {len(names)}; rename "
            "them or give a cameras.json.",
            file="views/",
        )
    if len(names) > limits.listed_views:
        raise InputError(
            f"there are {len(names)} views, at most {limits.listed_views} are read; give fewer.", file="views/"
        )
    if not masks and files.masks:
        masks = matched(names, files.masks, "mask", selected=frames is not None)
    if not depths and files.depths:
        depths = matched(names, files.depths, "depth map", selected=frames is not None)
    plan = _thinned(Plan(files.root, names, masks or None, depths or None, frames, camera_file, source), limits)
    _check_total(plan, limits)
    return plan


def read_photos(
    plan: Plan, rules: ViewRules, limits: Limits, max_size: int, progress: Progress, cancelled: Callable[[], bool]
) -> tuple[list[Photo], MaskSource]:
    """Decodes every view with its mask, depth and lens, undistorted and no larger than max_size."""
    photos: list[Photo] = []
    alphas: dict[str, bool] = {}
    for i in range(len(plan.views)):
        check(cancelled)
        progress("read", i + 1, len(plan.views))
        photo, has_alpha = _read_photo(plan, i, rules, limits)
        photo = undistorted(shrunk(photo, max_size))  # in this order: at full size a lens costs seconds and gigabytes
        photos.append(photo)
        alphas[photo.name] = has_alpha
    return photos, masking.choose(rules, plan.masks is not None, alphas)


def _read_photo(plan: Plan, i: int, rules: ViewRules, limits: Limits) -> tuple[Photo, bool]:
    """View i at full size, its coverage from the mask file or alpha if the rules allow; and whether it has an alpha
    that says anything."""
    name = plan.views[i]
    frame = None if plan.frames is None else plan.frames[i]
    posed = plan.camera_source == "file"
    declared = None if frame is None else frame.declared_size
    pixels = read_photo(plan.root / name, name, limits, posed=posed, declared=declared)
    alpha = pixels.alpha if pixels.alpha is not None and pixels.alpha.min() < 255 else None
    photo = Photo(name, pixels.rgb, focal_px=pixels.focal_px)
    if posed and frame is not None and plan.camera_file is not None:
        photo = replace(
            photo, lens=frame.lens(*photo.size, plan.camera_file.name), world_from_camera=frame.world_from_camera
        )
    elif plan.camera_source == "canonical6":
        photo = _on_rig(photo, i)
    mask_name = name
    if plan.masks is not None and rules.mask in ("auto", "masks"):
        mask_name = plan.masks[i]
        mask = read_mask(plan.root / mask_name, mask_name, limits)
        if mask.shape != photo.rgb.shape[:2]:
            raise InputError(
                f"the mask is {mask.shape[1]} x {mask.shape[0]} pixels, its view {name} is {photo.size[0]} x "
                f"{photo.size[1]}; give it the view's size.",
                file=mask_name,
            )
        photo = replace(photo, coverage=mask)
    elif alpha is not None and rules.mask in ("auto", "alpha"):
        photo = replace(photo, coverage=alpha)
    masking.check_not_empty(photo, mask_name)
    if plan.depths is not None:
        photo = read_depth(photo, plan.root / plan.depths[i], plan.depths[i], plan.camera_file, rules, limits)
    return photo, alpha is not None


def _on_rig(photo: Photo, i: int) -> Photo:
    width, height = photo.size
    rig = canonical6(height, width)
    lens = Lens(float(rig.fx[i]), float(rig.fy[i]), width / 2, height / 2, width, height)
    return replace(photo, lens=lens, world_from_camera=rig.world_from_camera[i].numpy())


def _camera_source(files: Files, rules: ViewRules) -> CameraSource | None:
    if rules.cameras == "none":
        return None
    if rules.cameras == "file" and files.camera_file is None:
        raise InputError("cameras: file needs a camera file; add it or use cameras: auto.", file="cameras.json")
    if rules.cameras != "auto":
        return rules.cameras
    if files.camera_file is not None:
        return "file"
    return "canonical6" if rules.rig == "canonical6" else "sfm"


def _masked(
    photos: list[Photo], source: MaskSource, hints: Hints, progress: Progress, cancelled: Callable[[], bool]
) -> list[Photo]:
    """The photos with the masks that had to be found."""
    if source == "rembg":
        return masking.by_matting(photos)
    if source != "grabcut":
        return photos
    if photos[0].world_from_camera is None:
        masks = []
        for i, photo in enumerate(photos):
            check(cancelled)
            progress("mask", i + 1, len(photos))
            masks.append(from_border(photo.rgb))
    else:
        images = [p.rgb for p in photos]
        masks = multiview_masks(images, _known(photos), _cameras(photos), hints.sparse, progress, cancelled)
    return masking.within_photos(photos, masks)


def _normalised(views: ViewSet, rules: ViewRules, hints: Hints, camera_file: str) -> ViewSet:
    """The views moved from the input's world to the scene frame. Raises InputError, also for a world too far away."""
    assert views.cameras is not None
    masks = None if views.mask_source == "none" else views.images[..., 3].float() / 255
    found = normalise(
        views.cameras,
        masks,
        known=views.known,
        up=rules.up,
        depths=views.depths,
        aabb=hints.aabb,
        up_direction=hints.up,
        floor=hints.floor,
        points=None if hints.sparse is None else torch.from_numpy(hints.sparse.points),
    )
    _check_not_far(found.world_from_scene, camera_file)
    moved = views.moved(torch.linalg.inv(found.world_from_scene))
    moved = replace(moved, world_from_scene=found.world_from_scene)
    moved = _without_contradictions(moved, found.disagreeing)
    check_depths(moved)
    return moved


def _check_not_far(world_from_scene: Tensor, camera_file: str) -> None:
    size = LONGEST_SIDE * float(similarity_scale(world_from_scene))
    sizes = float(world_from_scene[:3, 3].norm()) / size
    if sizes > FARTHEST_SIZES:
        raise InputError(
            f"the object is {sizes:,.0f} times its size away from the world's origin, where float32 loses its shape "
            f"(at most {FARTHEST_SIZES:,.0f}); subtract a common offset from the translations of all transform_matrix, "
            "such as the first camera's position.",
            file=camera_file,
        )


def _without_contradictions(views: ViewSet, disagreeing: tuple[int, ...]) -> ViewSet:
    """Views whose masks contradict the others' are named; with estimated poses, likely the culprits, they also go."""
    if not disagreeing:
        return views
    estimated = views.camera_source == "sfm"
    end = "it is left out, its pose is probably wrong." if estimated else "check its mask and its camera."
    named = tuple(f"{views.names[i]}: its mask contradicts the other views'; {end}" for i in disagreeing)
    if estimated:
        views = views.select([i for i in range(len(views)) if i not in disagreeing])
    return replace(views, warnings=views.warnings + named)


def _cameras(photos: list[Photo]) -> Cameras:
    lenses = [p.lens for p in photos if p.lens is not None]
    poses = [p.world_from_camera for p in photos if p.world_from_camera is not None]
    fx, fy, cx, cy = (
        torch.tensor([getattr(lens, k) for lens in lenses], dtype=torch.float64) for k in ("fx", "fy", "cx", "cy")
    )
    width, height = photos[0].size
    return Cameras(torch.from_numpy(np.stack(poses)).double(), fx, fy, cx, cy, height, width)


def _images(photos: list[Photo]) -> Tensor:
    """(N, H, W, 4) uint8."""
    width, height = photos[0].size
    images = np.full((len(photos), height, width, 4), 255, np.uint8)
    for image, photo in zip(images, photos, strict=True):
        image[..., :3] = photo.rgb
        if photo.coverage is not None:
            image[..., 3] = photo.coverage
    return torch.from_numpy(images)


def _known(photos: list[Photo]) -> Tensor | None:
    """(N, H, W) bool."""
    if all(p.known is None or p.known.all() for p in photos):
        return None
    return torch.from_numpy(np.stack([np.ones(p.rgb.shape[:2], bool) if p.known is None else p.known for p in photos]))


def _depths(photos: list[Photo]) -> Tensor | None:
    depths = [p.depth for p in photos if p.depth is not None]
    return torch.from_numpy(np.stack(depths)) if depths else None


def _thinned(plan: Plan, limits: Limits) -> Plan:
    n = len(plan.views)
    if n <= limits.views:
        return plan
    index = np.linspace(0, n - 1, limits.views).round().astype(int).tolist()

    def pick(items):
        return None if items is None else tuple(items[i] for i in index)

    warning = f"{limits.views} of the {n} views are used, evenly spaced: no more than that are read."
    return replace(
        plan,
        views=pick(plan.views) or (),
        masks=pick(plan.masks),
        depths=pick(plan.depths),
        frames=pick(plan.frames),
        warnings=(*plan.warnings, warning),
    )


def _check_total(plan: Plan, limits: Limits) -> None:
    names = [*plan.views, *(plan.masks or ()), *(plan.depths or ())]
    total = sum((plan.root / name).stat().st_size for name in names)
    if total > limits.total_bytes:
        raise InputError(
            f"the images of the {len(plan.views)} views that are used have {total / 2**20:.0f} MiB, at most "
            f"{limits.total_bytes / 2**20:.0f} are read; give fewer or smaller ones.",
            file=plan.root.name,
        )


@contextmanager
def _work_folder(workdir: Path | None) -> Iterator[Path]:
    if workdir is not None:
        workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="views-", dir=workdir) as folder:
        yield Path(folder)


@contextmanager
def _opened(source: Path, limits: Limits, work: Path) -> Iterator[Path]:
    if source.is_dir():
        yield source
    elif source.is_file():
        folder = work / "unpacked" / source.stem
        folder.mkdir(parents=True)
        unpack(source, folder, limits)
        yield folder
    else:
        raise InputError("there is no such folder or archive; check the path.", file=source.name)
