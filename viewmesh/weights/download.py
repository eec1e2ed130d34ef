"""Fetches weights: resumable, each file checked by sha256 before it counts as there.

Of a repository the Hub tells each large file's sha256 (its LFS metadata) at the pinned revision; small files and plain
https downloads are hashed when they arrive. Both go into the lock file and are demanded ever after.
"""

import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from viewmesh.errors import InputError, MissingModel
from viewmesh.progress import Progress, silent
from viewmesh.weights.manifest import WeightSet
from viewmesh.weights.store import Lock, folder_of, presence, read_lock, sha256_of, write_lock


@dataclass(frozen=True)
class RemoteFile:
    size: int
    sha256: str | None


class Hub(Protocol):
    """What is needed of a model hub; tests give their own."""

    def files(self, repository: str, revision: str | None) -> tuple[str, dict[str, RemoteFile]]:
        """The commit that `revision` (None: the newest) names, and its files."""
        ...

    def fetch(self, repository: str, path: str, commit: str, folder: Path) -> None:
        """Brings one file to folder/path, going on where an earlier try stopped."""
        ...


class HuggingFace:
    """The Hugging Face Hub through its client, which shows its own progress bars and keeps partial files."""

    def files(self, repository: str, revision: str | None) -> tuple[str, dict[str, RemoteFile]]:
        from huggingface_hub import HfApi

        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
        siblings = info.siblings or []
        files = {s.rfilename: RemoteFile(s.size or 0, s.lfs.sha256 if s.lfs else None) for s in siblings}
        return str(info.sha), files

    def fetch(self, repository: str, path: str, commit: str, folder: Path) -> None:
        from huggingface_hub import hf_hub_download

        hf_hub_download(repository, path, revision=commit, local_dir=folder)


def download(weights: WeightSet, hub: Hub | None = None, progress: Progress = silent) -> Path:
    """Brings a weight set here and locks it; does nothing when it is whole. Returns its folder.

    Raises MissingModel when it cannot be reached (offline, no access, no space), InputError when what arrived is not
    what was announced.
    """
    here = presence(weights)
    lock = read_lock(here.folder)
    if here.complete and lock is not None and set(lock.files) >= {file.path for file in weights.files}:
        return here.folder
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise MissingModel(
            f"HF_HUB_OFFLINE is set, and {len(here.missing)} files of {weights.source} are not in {here.folder}.",
            hint=f"HF_HUB_OFFLINE=0 viewmesh weights download {weights.name}",
        )
    here.folder.mkdir(parents=True, exist_ok=True)
    try:
        if weights.is_repository:
            return _download_repository(weights, lock, hub or HuggingFace(), progress)
        return _download_address(weights, lock, progress)
    except (MissingModel, InputError):
        raise
    except Exception as error:
        first = str(error).partition("\n")[0]
        raise MissingModel(
            f"Downloading {weights.source} failed: {type(error).__name__}: {first}",
            hint=f"Nothing is lost; go on with: viewmesh weights download {weights.name}",
        ) from error


def _download_repository(weights: WeightSet, lock: Lock | None, hub: Hub, progress: Progress) -> Path:
    folder = folder_of(weights)
    commit, remote = hub.files(weights.source, lock.revision if lock else weights.revision)
    absent = [file.path for file in weights.files if file.path not in remote]
    if absent:
        raise InputError(f"has no file {absent[0]} at revision {commit}.", file=weights.source)
    entries: dict[str, tuple[int, str]] = {}
    for i, file in enumerate(weights.files):
        announced = remote[file.path]
        locked = lock.files.get(file.path) if lock else None
        expected = file.sha256 or (locked[1] if locked else announced.sha256)
        path = folder / file.path
        if not (path.is_file() and path.stat().st_size == announced.size):
            hub.fetch(weights.source, file.path, commit, folder)
        entries[file.path] = _checked(path, file.size, expected)
        progress("download", i + 1, len(weights.files))
    write_lock(folder, Lock(weights.source, commit, entries))
    return folder


def _checked(path: Path, size: int | None, sha256: str | None) -> tuple[int, str]:
    """Size and digest of a file that arrived; it is removed when they are not the expected ones."""
    found_size, found = path.stat().st_size, sha256_of(path)
    if (size is not None and found_size != size) or (sha256 is not None and found != sha256):
        path.unlink()
        raise InputError(
            f"arrived with {found_size} bytes and sha256 {found}, expected {size or 'any size'} and {sha256 or 'any'};"
            " it was removed.",
            file=str(path),
            hint="Download again; if it repeats, the publisher changed the file.",
        )
    return found_size, found


def _download_address(weights: WeightSet, lock: Lock | None, progress: Progress) -> Path:
    folder, entries = folder_of(weights), {}
    for file in weights.files:
        path = folder / file.path
        if not path.is_file():
            fetch_address(f"{weights.source}/{file.path}", path, progress)
        expected = file.sha256 or (lock.files[file.path][1] if lock and file.path in lock.files else None)
        entries[file.path] = _checked(path, file.size, expected)
    write_lock(folder, Lock(weights.source, "", entries))
    return folder


def fetch_address(address: str, path: Path, progress: Progress = silent) -> None:
    """An https file to `path` by way of `path`.incomplete, from where that one ends."""
    partial = path.with_name(path.name + ".incomplete")
    done = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: nothing after what we have
            raise
        partial.replace(path)
        return
    with response:
        if response.status != 206:
            done = 0  # the server sends the whole file
        total = done + int(response.headers.get("Content-Length") or 0)
        with partial.open("ab" if done else "wb") as file:
            while block := response.read(1 << 20):
                file.write(block)
                done += len(block)
                progress(path.name, done >> 20, max(1, total >> 20))
    if total and done < total:
        raise OSError(f"the connection ended after {done} of {total} bytes")
    partial.replace(path)
