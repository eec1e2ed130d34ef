"""The same sums in the same order: what makes a fit on a CPU repeatable bit for bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """On a CPU, with torch's deterministic operations while inside; on a GPU nothing, there they cost too much.

    Without it torch's threads add the gradients of rows that were looked up more than once in the order they come.
    The setting is the process's: of two fits in two threads, the first to leave takes it from the other.
    """
    if device.type != "cpu":
        yield
        return
    deterministic: Any = torch.utils.deterministic
    mode, fill = torch.get_deterministic_debug_mode(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = False  # new tensors need no NaNs
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        deterministic.fill_uninitialized_memory = fill
