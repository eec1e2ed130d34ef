"""The artifact store: files under one fsspec URL (`file:///…`, `s3://bucket/prefix`), committed whole or not at all.

A reader, also one that comes back after a crash, finds either a complete file or none: in an object store an upload
appears when it is complete; elsewhere every write goes to a key below `tmp/` first and is then moved to its own
key. It knows keys and sha256; it does not know jobs.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from deployments import scratch
from viewmesh.errors import OptionError, ViewmeshError

T = TypeVar("T")
CHUNK = 1 << 20
REMOTE_CHUNK = 4 << 20  # one request each
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs"}
AT_ONCE = 24  # requests of one question about many files
# botocore waits a minute for a connection, tries five times, and s3fs does that five times: a store that is away would
# hold a thread for long. (A minute for an answer stays: it has begun when a large file is still being sent.)
S3_PATIENCE = {"connect_timeout": 5, "retries": {"mode": "standard", "max_attempts": 2}}


class StoreError(ViewmeshError):
    """The artifact store could not be read or written; the same call may succeed later."""

    code = "store_unavailable"


class Missing(StoreError):
    """There is no such file in the artifact store."""


class StoreFull(StoreError):
    """The artifact store, or the disk for temporary files, has no room."""

    code = "storage_full"


class Corrupt(StoreError):
    """A file in the store is not the one that was committed."""

    code = "artifact_corrupt"


@dataclass(frozen=True)
class Ref:
    """A committed file: its key in the store, the sha256 of its bytes, their number."""

    key: str
    sha256: str
    size: int

    def json(self) -> dict[str, Any]:
        return asdict(self)


class ArtifactStore:
    """Files by key. All methods block; an event loop calls them in a thread. Raises OptionError for a URL that no
    installed package reads."""

    def __init__(self, url: str, **storage_options: Any) -> None:
        self.url = url
        self.object_store = url.partition("://")[0] in OBJECT_STORES
        if self.object_store:  # others write to it, too
            storage_options = {"use_listings_cache": False, **storage_options}
        if url.startswith(("s3://", "s3a://")):
            storage_options = {"config_kwargs": S3_PATIENCE, **storage_options}
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url, **storage_options)
        except (ImportError, ValueError) as error:  # a package, or a protocol, that is not there
            raise _unreadable(url, error) from error
        self.local = isinstance(self.fs, LocalFileSystem)
        if self.local:
            with _explained("create the artifact store"):
                os.makedirs(os.path.join(self.root, "tmp"), exist_ok=True)

    def path(self, key: str) -> str:
        if not key or key.startswith("/") or ".." in key.split("/"):
            raise ValueError(f"not a key of the artifact store: {key!r}")
        return f"{self.root.rstrip('/')}/{key}"

    def spool(self) -> Path:
        """A new temporary file on this machine, from which `put` is a rename where the store is a local folder."""
        folder = Path(self.root, "tmp") if self.local else scratch.folder()
        return folder / f"{uuid.uuid4().hex}.part"

    def put(self, file: Path, key: str, *, sha256: str | None = None, move: bool = False) -> Ref:
        """Commits a local file under a key. `sha256` spares reading it again; `move` may take the file itself."""
        with _explained(f"write {key}"):
            digest = sha256 or hash_file(file)
            size = file.stat().st_size
            target = self.path(key)
            if self.local:
                os.makedirs(os.path.dirname(target), exist_ok=True)
                staged = file if move and _same_disk(file, self.root) else self.spool()
                if staged is not file:
                    shutil.copyfile(file, staged)
                _sync(staged)
                os.replace(staged, target)
            else:
                staged = target if self.object_store else self.path(f"tmp/{uuid.uuid4().hex}")
                self.fs.put_file(str(file), staged)
                if staged != target:
                    self.fs.mv(staged, target)
                if move:
                    file.unlink(missing_ok=True)
            return Ref(key, digest, size)

    def create(self, write: Callable[[Path], str | None], key: str) -> Ref:
        """Commits under a key what `write` leaves at the path that it is given; it may return the sha256."""
        file = self.spool()
        try:
            try:
                sha256 = write(file)
            except OSError:  # others are the writer's own
                with _explained(f"write {key}"):
                    raise
            return self.put(file, key, sha256=sha256, move=True)
        finally:
            file.unlink(missing_ok=True)

    def put_bytes(self, data: bytes, key: str) -> Ref:
        def write(file: Path) -> str:
            file.write_bytes(data)
            return hashlib.sha256(data).hexdigest()

        return self.create(write, key)

    def fetch(self, ref: Ref | dict[str, Any], folder: Path, name: str | None = None) -> Path:
        """The committed file in a local folder, its sha256 checked. Raises Corrupt, StoreError."""
        ref = ref if isinstance(ref, Ref) else Ref(**ref)
        target = folder / (name or ref.key.rsplit("/", 1)[-1])
        target.parent.mkdir(parents=True, exist_ok=True)
        with _explained(f"read {ref.key}"):
            if self.local:
                target.unlink(missing_ok=True)
                try:
                    os.link(self.path(ref.key), target)
                except OSError as error:
                    if error.errno == errno.ENOENT:
                        raise
                    shutil.copyfile(self.path(ref.key), target)
            else:
                self.fs.get_file(self.path(ref.key), str(target))
        if hash_file(target) != ref.sha256:
            raise Corrupt(f"The stored file {ref.key} is damaged: its sha256 is not the one it was committed with.")
        return target

    def exists(self, key: str) -> bool:
        with _explained(f"look for {key}"):
            return self.fs.exists(self.path(key))

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Those that are not there. An object store is asked for many at once."""
        return [key for key, there in zip(keys, self._each(self.exists, keys), strict=True) if not there]

    def read(self, key: str, start: int = 0, end: int | None = None, chunk: int = CHUNK) -> Iterator[bytes]:
        """The bytes [start, end) of a file, in chunks."""
        cache: dict[str, Any] = {}
        if self.object_store:  # reads what is asked for, not 50 MiB ahead
            cache, chunk = {"cache_type": "none"}, max(chunk, REMOTE_CHUNK)
        with _explained(f"read {key}"), self.fs.open(self.path(key), "rb", **cache) as file:
            file.seek(start)
            left = None if end is None else end - start
            while left is None or left > 0:
                block = file.read(chunk if left is None else min(chunk, left))
                if not block:
                    return
                left = None if left is None else left - len(block)
                yield block

    def remove(self, key: str) -> None:
        """Removes a file or a whole folder of keys; that it is not there is no error."""
        path = self.path(key)
        with _explained(f"delete {key}"):
            if self.local:
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
                return
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm(path, recursive=True)

    def remove_files(self, keys: Sequence[str]) -> None:
        """Removes single files; that one is not there is no error. An object store is asked for many at once. Raises
        StoreError where some could not be removed, after the others."""

        def refusal(key: str) -> StoreError | None:
            try:
                return self._remove_file(key)
            except StoreError as error:
                return error

        for error in filter(None, self._each(refusal, keys)):
            raise error

    def _remove_file(self, key: str) -> None:
        if self.object_store:  # one request instead of two: it is no folder
            with _explained(f"delete {key}"), contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(self.path(key))
        else:
            self.remove(key)

    def _each(self, work: Callable[[str], T], keys: Sequence[str]) -> list[T]:
        """work(key) of each, in their order; of an object store, whose answers take their time, many at once."""
        if not self.object_store:
            return [work(key) for key in keys]
        with ThreadPoolExecutor(AT_ONCE, "store") as threads:
            return list(threads.map(work, keys))

    def older_than(self, folder: str, seconds: float) -> list[str]:
        """The keys directly below a folder that have not changed for so long."""
        before = time.time() - seconds
        self.fs.invalidate_cache()
        with _explained(f"list {folder}"):
            try:
                entries = self.fs.ls(self.path(folder), detail=True)
            except FileNotFoundError:
                return []
        return [f"{folder}/{Path(entry['name']).name}" for entry in entries if _modified(entry) < before]

    def check(self) -> None:
        """Raises StoreError unless a file can be written and removed."""
        key = f"tmp/{uuid.uuid4().hex}"
        self.put_bytes(b"viewmesh", key)
        self.remove(key)


def fresh(folder: str, name: str) -> str:
    """A key that no other call writes: a call whose caller died may still be running beside its repetition."""
    return f"{folder}/{uuid.uuid4().hex[:12]}/{name}"


def _unreadable(url: str, error: Exception) -> OptionError:
    protocol = url.partition("://")[0]  # the rest may hold a password
    if protocol in ("s3", "s3a"):
        return OptionError("An artifact store on s3:// needs a package more: pip install 'viewmesh[s3]'")
    return OptionError(f"An artifact store on {protocol}:// cannot be used: {error}")


def hash_file(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _same_disk(file: Path, root: str) -> bool:
    return os.stat(file).st_dev == os.stat(root).st_dev


def _modified(entry: dict[str, Any]) -> float:
    stamp = entry.get("mtime") or entry.get("LastModified")
    if stamp is None:
        return time.time() if entry.get("type") != "directory" else 0.0  # an S3 "folder" has no age of its own
    return stamp if isinstance(stamp, int | float) else stamp.timestamp()


def _sync(file: Path) -> None:
    # Without it a power cut can leave a committed name with no bytes behind it.
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except ViewmeshError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFull(
                f"Could not {what}: no space left.", hint="Free disk space or shorten retention."
            ) from error
        kind = Missing if isinstance(error, FileNotFoundError) else StoreError
        raise kind(f"Could not {what}: {error.strerror or error}.") from error
    except Exception as error:  # botocore and others have trees of their own
        raise StoreError(f"Could not {what}: {type(error).__name__}: {error}") from error
