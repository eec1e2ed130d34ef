"""The CPUs that this process may use. Imports nothing heavy: the smallest processes count them, too."""

import contextlib
import os
from collections.abc import Iterator


def usable() -> int:
    """How many; all of the machine's where the system does not say, as macOS does not."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def on_one() -> Iterator[None]:
    """On one of them while inside, another one for the next process; on all where the system pins none."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(cpus)[os.getpid() % len(cpus)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cpus)
