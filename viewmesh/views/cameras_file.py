"""transforms.json and its relatives, untrusted, to lenses and poses: NeRF-synthetic, instant-ngp and nerfstudio.

Knows the fields and what makes a camera unusable; opens no image, converts no world: `transform_matrix` is camera to
world with OpenGL camera axes in all three, which is ours. nerfstudio's `applied_transform` says what was done to the
capture's first world before the matrices were written; the world here is that of the matrices, so that a mesh lines
up with them.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from viewmesh.errors import InputError
from viewmesh.views.find import resolve, shown
from viewmesh.views.lens import Lens, LensModel
from viewmesh.views.limits import Limits

MODELS: dict[str, LensModel] = {
    "PINHOLE": "pinhole", "SIMPLE_PINHOLE": "pinhole", "OPENCV": "opencv", "SIMPLE_RADIAL": "opencv",
    "RADIAL": "opencv", "OPENCV_FISHEYE": "fisheye", "FISHEYE": "fisheye",
}  # fmt: skip
LENS_FIELDS = (
    "w", "h", "fl_x", "fl_y", "cx", "cy", "camera_angle_x", "camera_angle_y", "camera_model", "is_fisheye",
    "k1", "k2", "k3", "k4", "p1", "p2",
)  # fmt: skip
FARTHEST = 1e6  # world units; beyond it float32 has nothing left of an object
RIGID_TOLERANCE = 1e-2
Z_DEPTH = ("z", "z-depth", "z_depth", "depth", "planar")
RAY_DEPTH = ("ray", "along ray", "distance", "euclidean", "euclidean_distance")


@dataclass(frozen=True)
class Frame:
    """One view of a camera file. `lens` needs the image's size when the file does not give it."""

    file_path: str
    mask_path: str | None
    depth_path: str | None
    world_from_camera: np.ndarray | None  # (4, 4); None if poses were not asked for
    declared_size: tuple[int, int] | None  # width, height
    fields: dict[str, Any]

    def lens(self, width: int, height: int, camera_file: str) -> Lens:
        """The lens over an image of the given size. Raises InputError if the intrinsics are missing or absurd."""
        return _lens(self, width, height, f"{camera_file}, frame {shown(self.file_path)}")


@dataclass(frozen=True)
class CameraFile:
    name: str
    frames: tuple[Frame, ...]
    aabb: np.ndarray | None  # (2, 3) world units, as declared: not to be trusted
    depth_unit: float | None
    depth_along_ray: bool


def read_cameras(path: Path, name: str, limits: Limits, *, poses: bool = True) -> CameraFile:
    """Reads and checks a camera file; its poses only if they are asked for. Raises InputError."""
    top = _json(path, name, limits)
    frames = top.get("frames")
    if not isinstance(frames, list) or not frames:
        raise InputError(
            'there is no list "frames"; give one frame with file_path and transform_matrix per view.', file=name
        )
    if len(frames) > limits.listed_views:
        raise InputError(
            f"{len(frames)} frames are listed, at most {limits.listed_views} are read; list fewer.", file=name
        )
    _check_applied_transform(top, name)
    train = top.get("train_filenames")
    if isinstance(train, list) and train:
        chosen = {t for t in train if isinstance(t, str)}
        frames = [f for f in frames if isinstance(f, dict) and f.get("file_path") in chosen] or frames
    read = tuple(_frame(f, i, top, name, poses) for i, f in enumerate(frames))
    if len({f.file_path for f in read}) < len(read):
        raise InputError("two frames have the same file_path; list every view once.", file=name)
    for key in ("mask_path", "depth_path"):
        given = sum(getattr(f, key) is not None for f in read)
        if 0 < given < len(read):
            raise InputError(f"{given} of {len(read)} frames have a {key}; give it for all or for none.", file=name)
    unit = _optional_number(top, ("depth_unit_scale", "integer_depth_scale", "depth_unit_scale_factor"), name)
    if unit is not None and not 0 < unit <= 1e3:
        raise InputError(
            f"depth_unit_scale {unit} is not a length; give world units per integer step, such as 0.001.", file=name
        )
    return CameraFile(name, read, _aabb(top), unit, _along_ray(top, name))


def named_files(root: Path, cameras: CameraFile) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The files of the frames, below root: views, masks, depth maps (none where the frames name none).

    Raises InputError.
    """
    views = _files(root, cameras, "view", [f.file_path for f in cameras.frames], frozenset())
    masks = _files(root, cameras, "mask", [f.mask_path for f in cameras.frames], frozenset(views))
    depths = _files(root, cameras, "depth map", [f.depth_path for f in cameras.frames], frozenset(views))
    return views, masks, depths


def _files(
    root: Path, cameras: CameraFile, what: str, paths: list[str | None], views: frozenset[str]
) -> tuple[str, ...]:
    of_path = {p: resolve(root, p, cameras.name, what, views) for p in paths if p is not None}
    path_of: dict[str, str] = {}
    for path, file in of_path.items():
        if path_of.setdefault(file, path) != path:
            raise InputError(
                f"{shown(path_of[file])} and {shown(path)} would both be {shown(file)}; add the {what} that is "
                "missing, or list it once.",
                file=cameras.name,
            )
    return tuple(of_path[p] for p in paths if p is not None)


def _json(path: Path, name: str, limits: Limits) -> dict:
    if path.stat().st_size > limits.json_bytes:
        raise InputError(
            f"the file has more than {limits.json_bytes / 2**20:.0f} MiB; keep only the cameras in it.", file=name
        )
    try:
        top = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"this is not JSON ({' '.join(str(error).split())[:80]}); write it again.", file=name
        ) from None
    if not isinstance(top, dict):
        raise InputError(
            'the top level must be an object with "frames"; see transforms.json of instant-ngp.', file=name
        )
    return top


def _frame(frame: Any, index: int, top: dict, name: str, posed: bool) -> Frame:
    if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str) or not frame["file_path"].strip():
        raise InputError(f"frame {index} has no file_path; name its image, such as views/view_00.png.", file=name)
    where = f"{name}, frame {shown(frame['file_path'])}"
    fields = {k: v for part in (top, frame) for k in LENS_FIELDS if (v := part.get(k)) is not None}
    w, h = (_optional_number(fields, (k,), where) for k in ("w", "h"))
    if (w is None) != (h is None) or (w is not None and h is not None and not (1 <= w <= 1e5 and 1 <= h <= 1e5)):
        raise InputError("w and h are not an image's size; give both in pixels, or neither.", file=where)
    return Frame(
        frame["file_path"],
        _optional_path(frame, ("mask_path",), where),
        _optional_path(frame, ("depth_path", "depth_file_path"), where),
        _pose(frame.get("transform_matrix"), where) if posed else None,
        None if w is None or h is None else (round(w), round(h)),
        fields,
    )


def _pose(matrix: Any, where: str) -> np.ndarray:
    """A checked (4, 4) rigid matrix, its rotation made exactly orthonormal."""
    m = _matrix(matrix)
    if m is None:
        raise InputError("transform_matrix is not 4x4 numbers; give the camera-to-world matrix.", file=where)
    if not np.isfinite(m).all():
        raise InputError(
            "transform_matrix holds NaN or infinity; give the camera-to-world matrix in numbers.", file=where
        )
    if np.abs(m[:3, 3]).max() > FARTHEST:
        raise InputError(
            f"the camera is more than {FARTHEST:.0e} units from the origin; subtract a common offset from the "
            "translations of all transform_matrix, such as the first camera's position.",
            file=where,
        )
    if np.abs(m).max() > FARTHEST or np.abs(np.linalg.svd(m[:3, :3])[1] - 1).max() > RIGID_TOLERANCE:
        raise InputError(
            "transform_matrix is not rigid (its rotation is scaled, sheared or singular); give a rotation and a "
            "position.",
            file=where,
        )
    if np.linalg.det(m[:3, :3]) < 0:
        raise InputError(
            "transform_matrix mirrors the world; give a right-handed rotation with OpenGL camera axes.", file=where
        )
    if np.abs(m[3] - [0, 0, 0, 1]).max() > 1e-6:
        raise InputError("the last row of transform_matrix must be 0 0 0 1; is it transposed?", file=where)
    u, _, vt = np.linalg.svd(m[:3, :3])
    m[:3, :3] = u @ vt
    return m


def _matrix(matrix: Any) -> np.ndarray | None:
    """4x4 from nested lists of 4x4 or 3x4 numbers, None if it is anything else."""
    if not isinstance(matrix, list) or len(matrix) not in (3, 4):
        return None
    if not all(isinstance(row, list) and len(row) == 4 for row in matrix):
        return None
    values = [[_number(v) for v in row] for row in matrix]
    if any(v is None for row in values for v in row):
        return None
    rows = values if len(values) == 4 else [*values, [0.0, 0.0, 0.0, 1.0]]
    return np.array(rows, dtype=np.float64)


def _lens(frame: Frame, width: int, height: int, where: str) -> Lens:
    fields = frame.fields
    declared = frame.declared_size
    if declared is not None and declared != (width, height):
        raise InputError(
            f"the image is {width} x {height} pixels but the camera is of {declared[0]} x {declared[1]} (w, h); give "
            "the image that the camera was estimated from.",
            file=where,
        )
    fx, fy = (_focal(fields, axis, size, where) for axis, size in (("x", width), ("y", height)))
    fx, fy = fx or fy, fy or fx
    if fx is None or fy is None:
        raise InputError("there is neither fl_x nor camera_angle_x; give the focal length in pixels.", file=where)
    if not all(0.05 * max(width, height) <= f <= 200 * max(width, height) for f in (fx, fy)):
        raise InputError(
            f"the focal length of {fx:.4g} x {fy:.4g} pixels is absurd for {width} x {height}; give it in pixels.",
            file=where,
        )
    cx = _optional_number(fields, ("cx",), where)
    cy = _optional_number(fields, ("cy",), where)
    cx, cy = (width / 2 if cx is None else cx), (height / 2 if cy is None else cy)
    if not (-width <= cx <= 2 * width and -height <= cy <= 2 * height):
        raise InputError(
            f"the principal point {cx:.4g}, {cy:.4g} is far outside the image; give cx, cy in pixels.", file=where
        )
    k = [_optional_number(fields, (f"k{i}",), where) or 0.0 for i in (1, 2, 3, 4)]
    p = [_optional_number(fields, (f"p{i}",), where) or 0.0 for i in (1, 2)]
    if max(map(abs, k + p)) > 100:
        raise InputError("a distortion coefficient exceeds 100; give OpenCV's k1 k2 p1 p2 (k3 k4).", file=where)
    return Lens(fx, fy, cx, cy, width, height, _model(fields, where), (k[0], k[1], k[2], k[3]), (p[0], p[1]))


def _model(fields: dict, where: str) -> LensModel:
    name = fields.get("camera_model")
    if name is None:
        return "fisheye" if fields.get("is_fisheye") is True else "opencv"
    model = MODELS.get(name.upper()) if isinstance(name, str) else None
    if model is None:
        raise InputError(
            f"the camera_model {shown(str(name))} is not read; use PINHOLE, OPENCV or OPENCV_FISHEYE.", file=where
        )
    return model


def _focal(fields: dict, axis: str, size: int, where: str) -> float | None:
    focal = _optional_number(fields, (f"fl_{axis}",), where)
    if focal is not None:
        return focal
    angle = _optional_number(fields, (f"camera_angle_{axis}",), where)
    if angle is None:
        return None
    if not 1e-3 < angle < math.pi - 1e-3:
        raise InputError(f"camera_angle_{axis} {angle:.4g} is not a field of view; give radians.", file=where)
    return 0.5 * size / math.tan(0.5 * angle)


def _check_applied_transform(top: dict, name: str) -> None:
    if top.get("applied_transform") is None:
        return
    m = _matrix(top["applied_transform"])
    if m is None or not np.isfinite(m).all() or not 1e-9 < abs(np.linalg.det(m[:3, :3])) < 1e9:
        raise InputError("applied_transform is not an invertible 3x4 matrix; correct or remove it.", file=name)


def _aabb(top: dict) -> np.ndarray | None:
    """The declared bounds if they are a box at all: a hint, so a senseless one is no error."""
    rows = top.get("aabb")
    if not isinstance(rows, list) or len(rows) != 2 or not all(isinstance(r, list) and len(r) == 3 for r in rows):
        return None
    values = [[_number(v) for v in row] for row in rows]
    if any(v is None or not abs(v) < FARTHEST for row in values for v in row):
        return None
    box = np.array(values, dtype=np.float64)
    return box if (box[1] > box[0]).all() else None


def _along_ray(top: dict, name: str) -> bool:
    kind = top.get("depth_kind")
    if kind is None:
        return False
    word = kind.lower().split("(")[0].split(",")[0].strip() if isinstance(kind, str) else ""
    if word in RAY_DEPTH:
        return True
    if word in Z_DEPTH or word.startswith("z-depth"):
        return False
    raise InputError(f"depth_kind {shown(str(kind))} is not known; write z (along the optical axis) or ray.", file=name)


def _optional_path(frame: dict, keys: tuple[str, ...], where: str) -> str | None:
    for key in keys:
        value = frame.get(key)
        if isinstance(value, str) and value.strip():
            return value
        if value is not None and value != "":
            raise InputError(f"{key} is not a file name; name an image or leave it out.", file=where)
    return None


def _optional_number(fields: dict, keys: tuple[str, ...], where: str) -> float | None:
    for key in keys:
        if fields.get(key) is not None:
            value = _number(fields[key])
            if value is None or not math.isfinite(value):
                raise InputError(f"{key} is not a finite number; correct it.", file=where)
            return value
    return None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
