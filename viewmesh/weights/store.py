"""Where weights lie on this machine and whether they are whole. No network.

Layout: $VIEWMESH_WEIGHTS (default ~/.cache/viewmesh/weights) / NAME / the repository's own paths, and beside them
`weights.lock.json` with the revision and each file's size and sha256 as they were downloaded. A folder copied there by
hand works without a lock; `verify` can then only compare sizes.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from viewmesh.progress import Progress, silent
from viewmesh.weights.manifest import WEIGHT_SETS, WeightSet

LOCK_NAME = "weights.lock.json"


@dataclass(frozen=True)
class Lock:
    """What was downloaded. files: path → (bytes, sha256)."""

    source: str
    revision: str
    files: dict[str, tuple[int, str]]


@dataclass(frozen=True)
class Presence:
    """One weight set on this machine."""

    weights: WeightSet
    folder: Path
    missing: tuple[str, ...]
    bytes_present: int
    revision: str | None

    @property
    def complete(self) -> bool:
        return not self.missing


@dataclass(frozen=True)
class Check:
    """The outcome for one file: "ok" (sha256), "size only" (no lock to compare with), or what is wrong."""

    path: Path
    verdict: str

    @property
    def passed(self) -> bool:
        return self.verdict in ("ok", "size only")


def weights_root() -> Path:
    return Path(os.environ.get("VIEWMESH_WEIGHTS") or Path.home() / ".cache" / "viewmesh" / "weights")


def folder_of(weights: WeightSet) -> Path:
    return weights_root() / weights.name


def presence(weights: WeightSet) -> Presence:
    """Which files are there, of the right size where it is known."""
    folder, lock = folder_of(weights), read_lock(folder_of(weights))
    missing, total = [], 0
    for file in weights.files:
        path = folder / file.path
        wanted = lock.files[file.path][0] if lock and file.path in lock.files else file.size
        size = path.stat().st_size if path.is_file() else -1
        if size < 0 or (wanted is not None and size != wanted):
            missing.append(file.path)
        else:
            total += size
    return Presence(weights, folder, tuple(missing), total, lock.revision if lock else None)


def list_weights() -> list[Presence]:
    """Every known set: what is there, where, and what is missing."""
    return [presence(weights) for weights in WEIGHT_SETS.values()]


def local_folder(name: str) -> Path | None:
    """The folder of a set's name or of a repository id, if it is whole; else the repository's snapshot in the
    Hugging Face cache, if there is one."""
    for weights in WEIGHT_SETS.values():
        if name in (weights.name, weights.source):
            here = presence(weights)
            if here.complete:
                return here.folder
            name = weights.source
            revision = weights.revision
            break
    else:
        revision = None
    return _hub_snapshot(name, revision) if name.count("/") == 1 else None


def _hub_snapshot(repository: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, FileNotFoundError):
        return None


def read_lock(folder: Path) -> Lock | None:
    """None without a readable lock."""
    try:
        value = json.loads((folder / LOCK_NAME).read_text())
        files = {path: (int(f["size"]), str(f["sha256"])) for path, f in value["files"].items()}
        return Lock(value["source"], value["revision"], files)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_lock(folder: Path, lock: Lock) -> None:
    """Atomic: a reader sees the old lock or the new one."""
    value = {
        "source": lock.source,
        "revision": lock.revision,
        "files": {path: {"size": size, "sha256": sha} for path, (size, sha) in sorted(lock.files.items())},
    }
    temporary = folder / (LOCK_NAME + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(folder / LOCK_NAME)


def sha256_of(path: Path, progress: Progress = silent) -> str:
    """Hex digest; reports MiB read."""
    digest, total = hashlib.sha256(), max(1, path.stat().st_size >> 20)
    with path.open("rb") as file:
        for i, block in enumerate(iter(lambda: file.read(16 << 20), b"")):
            digest.update(block)
            progress(path.name, min(total, 16 * (i + 1)), total)
    return digest.hexdigest()


def verify(weights: WeightSet, progress: Progress = silent) -> Iterator[Check]:
    """Every file against the lock and the manifest. Reads all of it: gigabytes."""
    folder = folder_of(weights)
    lock = read_lock(folder)
    for file in weights.files:
        path = folder / file.path
        size, sha = (lock.files.get(file.path) if lock else None) or (file.size, None)
        sha = file.sha256 or sha
        if not path.is_file():
            yield Check(path, "missing")
        elif size is not None and path.stat().st_size != size:
            yield Check(path, f"{path.stat().st_size} bytes, expected {size}")
        elif sha is None:
            yield Check(path, "size only")
        else:
            found = sha256_of(path, progress)
            yield Check(path, "ok" if found == sha else f"sha256 {found}, expected {sha}")
