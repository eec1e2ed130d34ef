"""How long-running library calls report and how they are stopped.

A call takes `progress: Progress` and `cancelled: Callable[[], bool]`; both are plain callables, so the caller decides
whether that is a terminal bar, a job's event stream, or nothing.
"""

from collections.abc import Callable
from typing import Protocol

from viewmesh.errors import Cancelled


class Progress(Protocol):
    """Receives `stage` (one word), `step` of `steps` (step counts from 1), and metrics such as loss and psnr."""

    def __call__(self, stage: str, step: int, steps: int, **metrics: float) -> None: ...


def silent(stage: str, step: int, steps: int, **metrics: float) -> None:
    """The Progress that says nothing."""


def never() -> bool:
    """The `cancelled` of a call that nobody stops."""
    return False


def check(cancelled: Callable[[], bool]) -> None:
    """Raises Cancelled if somebody asked for it. Called between steps, never inside one."""
    if cancelled():
        raise Cancelled("The work was cancelled.")
