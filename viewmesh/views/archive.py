"""A view set in one file: the zip that users send, unpacked with suspicion; the safetensors that the service keeps."""

import json
import lzma
import stat
import struct
import zipfile
import zlib
from dataclasses import fields
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from viewmesh.errors import InputError
from viewmesh.geometry.camera import Cameras
from viewmesh.views.find import IGNORED_NAMES, OTHER_IMAGE_SUFFIXES, SUFFIXES, unreadable
from viewmesh.views.limits import MIB, Limits
from viewmesh.views.viewset import ViewSet

UNPACKED_SUFFIXES = (*SUFFIXES, ".json", *OTHER_IMAGE_SUFFIXES)
ARCHIVE_SUFFIXES = (".zip", ".7z", ".rar", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".jar")
CAMERA_FIELDS = ("fx", "fy", "cx", "cy")
FORMAT_VERSION = 1


def unpack(archive: Path, folder: Path, limits: Limits) -> None:
    """Extracts the images and JSON files of a zip into `folder`, which must be empty. Raises InputError.

    Refused as a whole: entries that are encrypted, links, absolute, outside the folder, duplicated, archives
    themselves, too many, too large or too well compressed. Other kinds of files are not unpacked; those that find_files
    refuses for their names are there and empty.
    """
    if archive.stat().st_size > limits.zip_bytes:
        raise InputError(
            f"the archive has {archive.stat().st_size / MIB:.0f} MiB, at most {limits.zip_bytes / MIB:.0f} are "
            "accepted; send fewer or smaller images.",
            file=archive.name,
        )
    if archive.suffix.lower() != ".zip" and not zipfile.is_zipfile(archive):
        raise InputError("this is no zip; give a folder of pictures or a zip.", file=archive.name)
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = _checked_entries(opened, archive.name, limits)
            total = 0
            for entry, path in entries:
                if not _is_unpacked(path):
                    _leave_empty(folder / path)
                    continue
                total += _extract(opened, entry, folder / path, limits, limits.total_bytes - total)
    except InputError:
        raise
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, NotImplementedError,
            RuntimeError, ValueError, OverflowError, OSError) as error:  # fmt: skip
        raise InputError(
            f"the zip archive is damaged or of an unknown kind ({' '.join(str(error).split())[:80]}); pack it again "
            "with an ordinary zip tool.",
            file=archive.name,
        ) from None


def _is_unpacked(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in UNPACKED_SUFFIXES


def _leave_empty(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(exist_ok=False)


def _checked_entries(opened: zipfile.ZipFile, archive: str, limits: Limits) -> list[tuple[zipfile.ZipInfo, str]]:
    infos = opened.infolist()
    if len(infos) > limits.zip_entries:
        raise InputError(
            f"the archive has {len(infos)} entries, at most {limits.zip_entries} are accepted; pack only the view set.",
            file=archive,
        )
    chosen: list[tuple[zipfile.ZipInfo, str]] = []
    taken: set[str] = set()
    parents: set[str] = set()
    total = 0
    for info in infos:
        path = _safe_path(info, limits)
        if path is None or info.is_dir():
            continue
        _check_kind(info, path)
        key = path.casefold()
        ancestors = {str(p).casefold() for p in PurePosixPath(path).parents}
        if key in taken or key in parents or ancestors & taken:
            raise InputError("this name is in the archive twice; keep one of the two.", file=_shown(path))
        taken.add(key)
        parents |= ancestors
        if PurePosixPath(path).suffix.lower() in ARCHIVE_SUFFIXES:
            raise InputError("an archive inside the archive is not opened; unpack it first.", file=_shown(path))
        if _is_unpacked(path):
            _check_size(info, path, limits)
            total += info.file_size
        elif not unreadable(path):
            continue
        chosen.append((info, path))
    if total > limits.total_bytes:
        raise InputError(
            f"the archive unpacks to {total / MIB:.0f} MiB, at most {limits.total_bytes / MIB:.0f} are accepted; "
            "send fewer or smaller images.",
            file=archive,
        )
    return chosen


def _safe_path(info: zipfile.ZipInfo, limits: Limits) -> str | None:
    """The entry's path below the folder, None for what operating systems leave behind."""
    name = info.filename.replace("\\", "/")
    parts = PurePosixPath(name).parts
    leaves = name.startswith("/") or ".." in parts or ":" in name
    if leaves or not parts or any(ord(c) < 32 for c in name):
        raise InputError(
            "this name points outside the archive; name entries relative to the view set's folder, such as "
            "views/view_00.png.",
            file=_shown(name),
        )
    if any(p.casefold() in IGNORED_NAMES for p in parts) or parts[-1].startswith("._"):
        return None
    if len(parts) > limits.path_depth or any(len(p.encode(errors="replace")) > 200 for p in parts):
        raise InputError("this name is too long or too deeply nested; shorten it.", file=_shown(name))
    return str(PurePosixPath(*parts))


def _check_kind(info: zipfile.ZipInfo, path: str) -> None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        raise InputError("links and devices are not unpacked; put the file itself there.", file=_shown(path))
    if info.flag_bits & 0x1:
        raise InputError("the entry is encrypted; pack the archive without a password.", file=_shown(path))


def _check_size(info: zipfile.ZipInfo, path: str, limits: Limits) -> None:
    if info.file_size > limits.file_bytes:
        raise InputError(
            f"the file has {info.file_size / MIB:.0f} MiB, at most {limits.file_bytes / MIB:.0f} are accepted; "
            "save it smaller.",
            file=_shown(path),
        )
    if info.file_size > MIB and info.file_size > limits.zip_ratio * max(info.compress_size, 1):
        raise InputError(
            f"the entry is compressed more than {limits.zip_ratio:.0f} to 1, as no photo is; save it as an ordinary "
            "PNG, JPEG or WebP.",
            file=_shown(path),
        )


def _extract(opened: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, limits: Limits, budget: int) -> int:
    """Bytes written; counts what comes out, whatever the header declared."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with opened.open(info) as source, path.open("xb") as target:
        while chunk := source.read(MIB):
            written += len(chunk)
            if written > min(limits.file_bytes, budget):
                raise InputError(
                    "the entry is larger than the archive declares; pack it again.", file=_shown(info.filename)
                )
            target.write(chunk)
    return written


def _shown(name: str) -> str:
    """A hostile name, printable and short."""
    printable = "".join(c if c.isprintable() else "?" for c in name)
    return printable if len(printable) <= 120 else printable[:117] + "..."


def save_viewset(viewset: ViewSet, path: Path) -> None:
    """Writes a ViewSet to one safetensors file; `load_viewset` gives back an equal value, bit for bit."""
    tensors = {"images": viewset.images, "world_from_scene": viewset.world_from_scene}
    if viewset.cameras is not None:
        tensors["cameras.world_from_camera"] = viewset.cameras.world_from_camera
        tensors |= {f"cameras.{k}": getattr(viewset.cameras, k) for k in CAMERA_FIELDS}
    if viewset.depths is not None:
        tensors["depths"] = viewset.depths
    if viewset.known is not None:
        tensors["known"] = viewset.known
    kept = {f.name: getattr(viewset, f.name) for f in fields(viewset)}
    words = {k: kept[k] for k in ("names", "camera_source", "mask_source", "warnings")}
    save_file(
        {k: v.contiguous().clone() for k, v in tensors.items()},
        str(path),
        metadata={"viewmesh_viewset": str(FORMAT_VERSION), "words": json.dumps(words)},
    )


def load_viewset(path: Path) -> ViewSet:
    """Reads what `save_viewset` wrote. Raises InputError if the file is not one."""
    try:
        with safe_open(str(path), framework="pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {k: stored.get_tensor(k) for k in stored.keys()}  # noqa: SIM118
        if metadata.get("viewmesh_viewset") != str(FORMAT_VERSION):
            raise KeyError("viewmesh_viewset")
        words = json.loads(metadata["words"])
        images, pose = tensors["images"], tensors.get("cameras.world_from_camera")
        cameras = None
        if pose is not None:
            fx, fy, cx, cy = (tensors[f"cameras.{k}"] for k in CAMERA_FIELDS)
            cameras = Cameras(pose, fx, fy, cx, cy, images.shape[1], images.shape[2])
        return ViewSet(
            names=tuple(words["names"]),
            images=images,
            cameras=cameras,
            depths=tensors.get("depths"),
            known=tensors.get("known"),
            world_from_scene=tensors["world_from_scene"],
            camera_source=words["camera_source"],
            mask_source=words["mask_source"],
            warnings=tuple(words["warnings"]),
        )
    except (SafetensorError, KeyError, ValueError, OSError, TypeError, IndexError) as error:
        raise InputError(
            f"this is not a stored view set of version {FORMAT_VERSION} ({error}); prepare the views again.",
            file=Path(path).name,
        ) from None
