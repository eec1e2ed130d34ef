"""The only file of this package that imports numba: how the kernels are compiled.

Kernels are scalar code over numpy arrays that releases the GIL; threads are the caller's affair (see `tracer.py`), so
no numba threading layer is ever started.
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

# error_model: division as in numpy, without a branch and an exception per division
kernel: Callable[..., Any] = numba.njit(nogil=True, error_model="numpy")  # called by other kernels
entry: Callable[..., Any] = numba.njit(cache=True, nogil=True, error_model="numpy")  # called from Python, kept on disk


@functools.cache
def fingerprint() -> int:
    """A number that changes with the source of any file of this package.

    numba's on-disk cache looks only at the file of the cached kernel, not at the files of the kernels that it calls. So
    kernels called by others are not cached by themselves, and an entry holds this number as a closure variable, a
    part of the cache's key: it is compiled anew after a change to any of these files.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return int.from_bytes(digest.digest()[:6], "big")
