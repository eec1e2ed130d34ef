"""What a deployment needs of the library, as three small protocols; and how it gets them by name.

`deployments.adapters.*` fulfil them with the library, `deployments.fakes` with files of a few bytes and a clock. An
engine is named by its import path, because the graph is built on a head node where torch need not even import.
"""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from viewmesh.errors import ViewmeshError
from viewmesh.progress import Progress

Cancelled = Callable[[], bool]
POSED = "posed.safetensors"


class Preparer(Protocol):
    """A view set as it was uploaded → one checked file that every model reads."""

    def prepare(
        self, source: Path, options: dict[str, Any], out: Path, progress: Progress, cancelled: Cancelled
    ) -> dict[str, Any]:
        """Writes the view set to `out`; returns facts about it (views, camera_source, mask_source, warnings)."""
        ...

    def pose(
        self, source: Path, options: dict[str, Any], out: Path, progress: Progress, cancelled: Cancelled
    ) -> dict[str, Any]:
        """The same with cameras from structure from motion. Without an `out` it found none, for the fact `reason`."""
        ...


class Session(Protocol):
    """The state of one job inside an optimiser: in memory, possibly on a device."""

    step: int
    steps: int
    done: bool
    look_again: bool  # it is done because its views' cameras do not suit it, and structure from motion may find others

    def advance(self, seconds: float, progress: Progress, cancelled: Cancelled) -> dict[str, float]:
        """Works for about so long; returns the last metrics. Progress counts steps of the whole job."""
        ...

    def checkpoint(self) -> Callable[[Path], str | None]:
        """What writes the state as it is now to a file and returns its sha256, if it is known; called in another
        thread, while this session may go on."""
        ...

    def go_on(self, enough: Callable[[], bool], progress: Progress, cancelled: Cancelled) -> None:
        """Works on until `enough()`, which is soon; not at all where the next step is a long one."""
        ...

    def preview(self, out: Path) -> bool:
        """Writes a small PNG of the state, if it can do so cheaply; says whether it did."""
        ...

    def finish(
        self, out: Path, progress: Progress, cancelled: Cancelled, initial: Path | None = None
    ) -> dict[str, Any]:
        """Writes the result to `out`; returns facts about it. initial: as it was given to `start`."""
        ...


class Optimiser(Protocol):
    def start(self, views: Path, options: dict[str, Any], initial: Path | None, *, smaller: bool) -> Session:
        """`smaller`: the last attempt ran out of device memory. Raises OutOfMemory if there is nothing to save on."""
        ...

    def load(self, views: Path, options: dict[str, Any], checkpoint: Path, *, smaller: bool) -> Session: ...

    def release(self) -> None:
        """Gives cached device memory back."""
        ...

    def memory(self) -> dict[str, int]:
        """Device memory in bytes: used, free, total; empty on a CPU."""
        ...


class Generator(Protocol):
    """Generative models with their weights in memory. Calls may come at once; those that find the device busy run next,
    at most `together` of them at once, all of one model."""

    together: int

    def hold(self, models: Sequence[str]) -> None:
        """Loads these and drops others. A model that cannot be loaded, for lack of memory or of files, leaves the
        others as they are; `held` tells why."""
        ...

    def held(self) -> dict[str, ViewmeshError | None]:
        """By model that it shall hold: None, or why it does not."""
        ...

    def warm(self) -> dict[str, float]:
        """Makes later calls faster; seconds by part. Calls meanwhile work, slower."""
        ...

    def generate(
        self, views: Path, options: dict[str, Any], out: Path, progress: Progress, cancelled: Cancelled
    ) -> dict[str, Any]:
        """Writes the textured mesh to `out`; returns facts about it. Where it is to be refined and the views had no
        cameras, what is known of them now is written beside it, as POSED."""
        ...

    def release(self) -> None:
        """Gives cached device memory back."""
        ...

    def memory(self) -> dict[str, int]:
        """Device memory in bytes: used, free, total; empty on a CPU."""
        ...


class ResultWriter(Protocol):
    """A result → the files that the user gets."""

    def export(
        self,
        result: Path,
        views: Path | None,
        folder: Path,
        options: dict[str, Any],
        facts: dict[str, Any],
        progress: Progress,
        cancelled: Cancelled,
    ) -> dict[str, Any]:
        """Writes mesh.glb and the other files into `folder`; returns the report."""
        ...


def make(path: str, **kwargs: Any) -> Any:
    """An engine from `package.module:Class`."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)(**kwargs)
