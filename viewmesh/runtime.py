"""What torch and its OpenMP read from the environment of a process, once, before they compute on a CPU.

A fit allocates and frees the same large tensors in every step, and the C library returns each to the kernel: in pages
of 4 KiB a fifth of its time on two cores went into getting them back. So torch shall ask for huge pages.

Threads that have done their part of an operation wait awake for the next one, by default for milliseconds. Where other
processes want the cores, that is time taken from them: a waiting thread sleeps after some tens of microseconds here.
"""

import os

ENVIRONMENT = {"THP_MEM_ALLOC_ENABLE": "1", "GOMP_SPINCOUNT": "2000"}


def missing() -> dict[str, str]:
    """What of it this process has not; a user's own setting stays."""
    lacked = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    if "OMP_WAIT_POLICY" in os.environ:  # the count of spins would go before it
        lacked.pop("GOMP_SPINCOUNT", None)
    return lacked


def prepare() -> None:
    """For this process, if it has not imported torch yet, and for those that it starts."""
    os.environ.update(missing())
