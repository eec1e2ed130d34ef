"""A torch device as engines use it: its memory, how threads wait for it, and what they queue on it. Nothing of that on
a CPU."""

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

log = logging.getLogger("ray.serve")

BLOCKING_SYNC = 4  # CU_CTX_SCHED_BLOCKING_SYNC of CUDA's driver API


def wait_asleep(device: torch.device) -> None:
    """From now on threads that wait for the device sleep. To be called before the process first uses it.

    CUDA's default is that they spin: right for one thread, but a dozen of them take the cores from those that work.
    torch has no call for it.
    """
    if device.type != "cuda":
        return
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        failed = driver.cuInit(0) or driver.cuDevicePrimaryCtxSetFlags_v2(device.index or 0, BLOCKING_SYNC)
    except (OSError, AttributeError) as error:
        failed = error
    if failed:
        log.warning(f"Threads that wait for the GPU will spin: {failed}")


class Side:
    """A queue of its own on the device, for work that shall not wait for what other threads have queued there; several
    threads may share it. On a CPU there is none."""

    def __init__(self, device: torch.device, *, urgent: bool = False) -> None:
        """urgent: its kernels go before those of others that wait."""
        self.stream = torch.cuda.Stream(device, priority=-int(urgent)) if device.type == "cuda" else None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """What is computed within is there at its end, for every thread. What it reads must be there from its start to
        its end."""
        if self.stream is None:
            yield
            return
        with torch.cuda.stream(self.stream):
            try:
                yield
            finally:
                self.stream.synchronize()


def release(device: torch.device) -> None:
    """Gives cached memory back."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


class OnDevice:
    """The half of an engine that is the same for all that compute on a torch device."""

    device: torch.device

    def release(self) -> None:
        release(self.device)

    def memory(self) -> dict[str, int]:
        if self.device.type != "cuda":
            return {}
        free, total = torch.cuda.mem_get_info(self.device)
        return {"used": torch.cuda.memory_allocated(self.device), "free": free, "total": total}
