"""Which files of a folder are the views, masks, depth maps and cameras. Knows names and folders; opens nothing."""

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from viewmesh.errors import InputError
from viewmesh.views.archive import IGNORED_NAMES
from viewmesh.views.images import OTHER_IMAGE_SUFFIXES, SUFFIXES

CAMERA_FILES = ("cameras.json", "transforms_train.json", "transforms.json")
VIEW_FOLDERS = ("views", "images")
CANONICAL6_NAMES = tuple(f"view_{i:02d}" for i in range(6))


@dataclass(frozen=True)
class Files:
    """Names relative to `root`, with forward slashes, as the user knows them. masks and depths: of the folders
    masks/ and depth/, one per file there, not yet matched to views."""

    root: Path
    views: tuple[str, ...]
    masks: tuple[str, ...]
    depths: tuple[str, ...]
    camera_file: str | None


def find_files(folder: Path) -> Files:
    """Looks at the folder, or at the one folder in it if there is nothing else. Raises InputError."""
    root = _innermost(folder)
    camera_file = next((name for name in CAMERA_FILES if (root / name).is_file()), None)
    views = _views(root, camera_file is not None)
    if not views and camera_file is None:
        raise InputError(
            "no photos are in the folder; put PNG, JPEG or WebP files into views/, or add a cameras.json that "
            "names them.",
            file=folder.name,
        )
    return Files(root, views, _images_in(root, "masks"), _images_in(root, "depth"), camera_file)


def resolve(root: Path, file_path: str, camera_file: str) -> str:
    """The file that a camera file's `file_path` means: with or without extension, below the root or views/.

    Raises InputError if it leaves the folder or is not there.
    """
    name = file_path.replace("\\", "/")
    path = PurePosixPath(name)
    if name.startswith("/") or ".." in path.parts or ":" in name or "\0" in name:
        raise InputError(
            f"{shown(file_path)} points outside the view set's folder; write paths relative to it, such as "
            "views/view_00.png.",
            file=camera_file,
        )
    if (
        not path.parts
        or len(name.encode(errors="replace")) > 1000
        or any(len(p.encode(errors="replace")) > 250 for p in path.parts)
    ):
        raise InputError(f"{shown(file_path)!r} is not a file name; name an image.", file=camera_file)
    bases = [path, *(PurePosixPath(f) / path for f in VIEW_FOLDERS)]
    bases += [PurePosixPath(f) / path.name for f in VIEW_FOLDERS]
    for base in bases:
        for candidate in (base, *(base.with_name(base.name + s) for s in SUFFIXES)):
            if (root / candidate).is_file():
                return str(candidate)
    raise InputError(f"{shown(file_path)} is not in the view set; add the file or remove its frame.", file=camera_file)


def matched(views: tuple[str, ...], files: tuple[str, ...], what: str) -> tuple[str, ...]:
    """`files` (masks or depth maps) in the order of the views: by the number in the name, else by order.

    Raises InputError if the counts differ or the numbers do.
    """
    if len(files) != len(views):
        raise InputError(
            f"there are {len(files)} files for {len(views)} views; give every view one {what}, with the same number "
            "in its name, or none at all.",
            file=str(PurePosixPath(files[0]).parent) if files else what,
        )
    of_view, of_file = [number(v) for v in views], {number(f): f for f in files}
    if None in of_view or None in of_file or len(set(of_view)) < len(views) or len(of_file) < len(files):
        return files
    for view, n in zip(views, of_view, strict=True):
        if n not in of_file:
            raise InputError(
                f"no {what} has the number {n} of this view; rename the files of "
                f"{PurePosixPath(files[0]).parent}/ so that their numbers are the views'.",
                file=view,
            )
    return tuple(of_file[n] for n in of_view)


def number(name: str) -> int | None:
    """The last number in a file's name."""
    digits = re.findall(r"\d+", PurePosixPath(name).stem, re.ASCII)
    return int(digits[-1][-18:]) if digits else None


def is_canonical6(views: tuple[str, ...]) -> bool:
    return tuple(PurePosixPath(v).stem for v in views) == CANONICAL6_NAMES


def shown(text: str) -> str:
    """Text of an untrusted file, printable and short."""
    printable = "".join(c if c.isprintable() else "?" for c in text)
    return printable if len(printable) <= 100 else printable[:97] + "..."


def _views(root: Path, listed: bool) -> tuple[str, ...]:
    """The photos in views/ or images/; else in the root, unless a camera file lists the photos among other images."""
    for name in VIEW_FOLDERS:
        if (root / name).is_dir():
            return _images_in(root, name)
    return () if listed else _images_in(root, ".")


def _images_in(root: Path, name: str) -> tuple[str, ...]:
    folder = root / name
    if not folder.is_dir():
        return ()
    files = [p for p in folder.iterdir() if p.is_file() and _counts(p)]
    for path in files:
        if path.suffix.lower() in OTHER_IMAGE_SUFFIXES:
            raise InputError(
                "this kind of image is not read; convert it to PNG, JPEG or WebP.",
                file=str(PurePosixPath(name) / path.name),
            )
    names = [str(PurePosixPath(name) / p.name) for p in files if p.suffix.lower() in SUFFIXES]
    return tuple(sorted(names, key=_natural))


def _innermost(folder: Path) -> Path:
    for _ in range(4):
        inside = [p for p in folder.iterdir() if _counts(p)]
        alone = len(inside) == 1 and inside[0].is_dir() and inside[0].name not in VIEW_FOLDERS
        if not alone:
            break
        folder = inside[0]
    return folder


def _counts(path: Path) -> bool:
    return not path.name.startswith(".") and path.name.casefold() not in IGNORED_NAMES


def _natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", name, flags=re.ASCII)
    return [(0, int(p[-18:]), "") if p.isdigit() and p.isascii() else (1, 0, p.casefold()) for p in parts]
