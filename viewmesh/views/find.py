"""Which files of a folder are the views, masks, depth maps and cameras. Knows names and folders; opens nothing."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from viewmesh.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp")
OTHER_IMAGE_SUFFIXES = (
    ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".exr", ".hdr", ".dng", ".nef", ".cr2", ".arw",
    ".jxl",
)  # fmt: skip
# Of files that may lie beside views, masks and depth maps and are none: words, tables, what cameras and editors add.
SIDE_SUFFIXES = (
    "", ".txt", ".md", ".rst", ".log", ".pdf", ".html", ".htm", ".ini", ".toml", ".yaml", ".yml", ".json", ".jsonl",
    ".csv", ".tsv", ".xml", ".xmp", ".aae", ".thm", ".pp3", ".dop", ".gpx", ".mov", ".mp4", ".db", ".py", ".sh",
    ".jpg_original",
)  # fmt: skip
IGNORED_NAMES = ("__macosx", ".ds_store", "thumbs.db", "desktop.ini")
CAMERA_FILES = ("cameras.json", "transforms_train.json", "transforms.json")
VIEW_FOLDERS = ("views", "images")
FOLDERS = {"view": VIEW_FOLDERS, "mask": ("masks",), "depth map": ("depth",)}
DATA_FOLDERS = tuple(name for names in FOLDERS.values() for name in names)
CANONICAL6_NAMES = tuple(f"view_{i:02d}" for i in range(6))
KIND = re.compile(r"^(view|image|mask|depth)[_-]|[_-](view|image|mask|depth)$")


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


def resolve(root: Path, file_path: str, camera_file: str, what: str, views: Collection[str]) -> str:
    """The file that a camera file's path of a view, mask or depth map means: with or without extension, below the
    root or the folder of its kind, and there also by its name alone. views: files that no mask or depth map can be.

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
    folders = [PurePosixPath(f) for f in FOLDERS[what]]
    for base in (path, *(f / path for f in folders), *(f / path.name for f in folders)):
        for candidate in (base, *(base.with_name(base.name + s) for s in SUFFIXES)):
            if str(candidate) not in views and (root / candidate).is_file():
                return str(candidate)
    remedy = "remove its frame" if what == "view" else "take its name out of the frames"
    raise InputError(
        f"{shown(file_path)} is not in the view set as a {what}; add the file or {remedy}.", file=camera_file
    )


def matched(views: tuple[str, ...], files: tuple[str, ...], what: str, *, selected: bool = False) -> tuple[str, ...]:
    """`files` (masks or depth maps) in the order of the views: by name, else by the number in it, else by the order
    of the names. selected: the views may be some of more, then there may be more files than views.

    Raises InputError if the counts differ, or if names or numbers tell some views' files but not all.
    """
    folder = str(PurePosixPath(files[0]).parent) if files else what
    enough = len(files) == len(views) or (selected and len(files) > len(views))
    found, missing = paired(views, files) if enough else ((), None)
    if found:
        return found
    if missing:
        raise InputError(
            f"no {what} has the name or number of this view; rename the files of {folder}/ so that theirs are the "
            "views'.",
            file=missing,
        )
    if len(files) != len(views):
        raise InputError(
            f"there are {len(files)} files for {len(views)} views; give every view one {what}, with the same name or "
            "number, or none at all.",
            file=folder,
        )
    of_view = dict(zip(sorted(views, key=natural), files, strict=True))
    return tuple(of_view[v] for v in views)


def paired(views: Sequence[str], files: Sequence[str]) -> tuple[tuple[str, ...], str | None]:
    """The views' files where all names tell, else where all numbers do. Where neither does: none, and the first view
    without a file where some names are the views', or all files have numbers."""
    missing = None
    for key in (_bare, number):
        of_view, of_file = [key(v) for v in views], {key(f): f for f in files}
        if None in of_view or None in of_file or len(set(of_view)) < len(views) or len(of_file) < len(files):
            continue
        lost = [view for view, k in zip(views, of_view, strict=True) if k not in of_file]
        if not lost:
            return tuple(of_file[k] for k in of_view), None
        if key is number or len(lost) < len(views):
            missing = lost[0]
    return (), missing


def _bare(name: str) -> str:
    """A file's name without folder, endings and the word for what it is: front of masks/mask_front.jpg.png."""
    path = PurePosixPath(name)
    while path.suffix.lower() in SUFFIXES:
        path = path.with_suffix("")
    return KIND.sub("", path.name.casefold())


def unreadable(name: str) -> bool:
    """Whether a file lies where views, masks and depth maps do, and is of a kind that is not read and may be one."""
    path = PurePosixPath(name)
    return path.parent.name in DATA_FOLDERS and path.suffix.lower() not in (*SUFFIXES, *SIDE_SUFFIXES)


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
        file = str(PurePosixPath(name) / path.name)
        if path.suffix.lower() in OTHER_IMAGE_SUFFIXES or unreadable(file):
            kinds = "a 16-bit PNG" if name == "depth" else "PNG, JPEG or WebP"
            raise InputError(
                f"this kind of file is not read; convert it to {kinds}, or take it out of the folder.", file=file
            )
    names = [str(PurePosixPath(name) / p.name) for p in files if p.suffix.lower() in SUFFIXES]
    return tuple(sorted(names, key=natural))


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


def natural(name: str) -> list[tuple[int, int, str]]:
    """The key by which names with numbers sort as people count."""
    parts = re.split(r"(\d+)", name, flags=re.ASCII)
    return [(0, int(p[-18:]), "") if p.isdigit() and p.isascii() else (1, 0, p.casefold()) for p in parts]
