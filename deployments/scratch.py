"""Temporary files: one folder for each process, so that what a killed one leaves behind can be told from work.

A replica may be killed at any moment. It holds its folder locked as long as it lives, however it ends, and who makes
such a folder first removes those that nobody holds. A lock tells the living apart where process ids do not: in
containers, after a restart.
"""

import fcntl
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from viewmesh.errors import ViewmeshError

_ours: dict[tuple[str, int], Path] = {}  # by where temporary files go, and process: a fork is one of its own
_making = threading.Lock()


def folder() -> Path:
    """This process's folder for temporary files, made when it is first asked for."""
    here = (tempfile.gettempdir(), os.getpid())
    with _making:
        if here not in _ours or not _ours[here].is_dir():  # or somebody has cleaned up /tmp
            _ours[here] = _made_in(Path(here[0]) / f"viewmesh-{os.getuid()}-{socket.gethostname()}")
        return _ours[here]


@contextmanager
def workdir(purpose: str) -> Iterator[Path]:
    """A new folder for one piece of work, removed at its end."""
    with tempfile.TemporaryDirectory(prefix=f"{purpose}-", dir=folder(), ignore_cleanup_errors=True) as name:
        yield Path(name)


def _made_in(parent: Path) -> Path:
    parent.mkdir(mode=0o700, exist_ok=True)
    if parent.is_symlink() or parent.stat().st_uid != os.getuid():  # others may write in /tmp, too
        raise ViewmeshError(f"{parent} is somebody else's.", hint="Remove it, or set TMPDIR to a folder of your own.")
    try:
        everybody = _locked(parent, fcntl.LOCK_EX)  # nobody removes a folder between its making and its lock
    except OSError:  # a file system without locks: nobody can be told dead
        return Path(tempfile.mkdtemp(dir=parent))
    try:
        for left in parent.iterdir():
            _remove_unless_held(left)
        made = Path(tempfile.mkdtemp(dir=parent))
        _locked(made, fcntl.LOCK_EX)  # never given back: it ends with the process
        return made
    finally:
        os.close(everybody)


def _remove_unless_held(left: Path) -> None:
    try:
        held = _locked(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return  # its process lives
    try:
        shutil.rmtree(left, ignore_errors=True)
    finally:
        os.close(held)


def _locked(path: Path, how: int) -> int:
    """An open descriptor that holds the lock; closing it gives it back. Raises OSError."""
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(opened, how)
    except OSError:
        os.close(opened)
        raise
    return opened
