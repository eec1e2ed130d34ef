"""Work in a process of its own, for libraries that may crash or that keep all other threads waiting."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from viewmesh.progress import check, never

ASK_EVERY_S = 0.1  # whether to go on
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}  # numpy would start one per core, which takes longer than the work


def python(module: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module)


def run(command: Sequence[str], deadline: float, cancelled: Callable[[], bool] = never) -> None:
    """Until the command has ended, or the deadline (of time.monotonic) has come; it and its children are dead when this
    returns or raises Cancelled. How it ended does not matter: what counts is what it wrote."""
    if time.monotonic() >= deadline:
        return
    env, nowhere = {**os.environ, **ONE_THREAD}, subprocess.DEVNULL
    try:
        child = subprocess.Popen(command, env=env, stdout=nowhere, stderr=nowhere, start_new_session=True)
    except OSError:
        return
    with child:
        try:
            while time.monotonic() < deadline:
                check(cancelled)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(ASK_EVERY_S)
                    return
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # with the processes that it forked
