"""Files that are either there and whole, or not there."""

import errno
import os
import secrets
from pathlib import Path

from viewmesh.errors import ViewmeshError


class WriteError(ViewmeshError):
    """A result could not be written."""

    code = "write_failed"


def write_whole(path: Path, data: bytes) -> Path:
    """Writes data under a temporary name beside path, then renames. Raises WriteError, and leaves nothing behind."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = f"the disk is full, {len(data) / 2**20:.1f} MiB are needed" if full else str(error.strerror or error)
        raise WriteError(
            f"{path} could not be written: {what}.", hint="Free some space or give another folder."
        ) from error
    return path
