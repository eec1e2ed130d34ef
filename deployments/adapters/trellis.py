"""engines.Generator on viewmesh.generate. Importing it imports torch: only replicas do."""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from deployments.adapters.apart import Apart
from deployments.adapters.device import OnDevice, Side, release, wait_asleep
from deployments.engines import POSED
from deployments.running import out_of_device_memory
from deployments.turns import Turns
from viewmesh.errors import MissingModel, OutOfMemory, ViewmeshError
from viewmesh.export.preview import early_previews
from viewmesh.generate import (
    Begun,
    Draft,
    Looked,
    Model,
    begin_together,
    draft_together,
    finish,
    fit_together,
    load_draft,
    load_model,
    look,
    save_draft,
    total_steps,
)
from viewmesh.geometry.meshfile import save_mesh
from viewmesh.geometry.unwrap import build_loops
from viewmesh.options import Options
from viewmesh.progress import Progress, check
from viewmesh.refine import with_cameras
from viewmesh.render.rasterizer import get_rasterizer
from viewmesh.trellis.batch import MEMBER_BYTES
from viewmesh.trellis.checkpoint import free_bytes
from viewmesh.trellis.loading import Loaded
from viewmesh.trellis.pipeline import RECORDED, WORKSPACE_BYTES, Trellis
from viewmesh.views.archive import load_viewset, save_viewset
from viewmesh.weights.ready import licence_notes, revision, vram_bytes

log = logging.getLogger("ray.serve")
TOGETHER = RECORDED  # calls on the device at once
FINISHERS = 12  # processes beside a GPU that texture: a mesh takes three seconds there, and more than one comes each
FINISHER_BYTES = 3 << 29  # what one has of a GPU's memory while it works: 0.5 GiB are CUDA's, the rest the mesh's
WARM_BYTES = 10 << 30  # that warming takes, most of it for a while
BATCHES_BYTES = 2 * (WORKSPACE_BYTES + TOGETHER * MEMBER_BYTES)  # two, in either half
S = TypeVar("S")
T = TypeVar("T")
Run = Callable[[Sequence[S]], Sequence[T | Exception]]


class LibraryGenerator(OnDevice):
    """device: auto, cpu or cuda. weights: folders by weight set, see weights.ready.

    Holds trellis, reconviagen or both; what their checkpoints share is in memory once. Calls that wait for the device
    run on it together where they are TRELLIS', at most `together` of them; ReconViaGen's run one at a time. Encoding
    images and texturing do not wait for them; beside a GPU that has memory left for it, processes of their own texture.

    A draft has two halves. On a GPU with memory for both each has turns of its own: while one batch is in its second,
    whose thousands of kernels are launched one by one, another one is in its first, which is replayed.
    """

    def __init__(self, device: str = "auto", weights: dict[str, str] | None = None) -> None:
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.device, self.weights = torch.device(chosen), weights or {}
        wait_asleep(self.device)
        self.looking, self.beginning = Side(self.device), Side(self.device)
        self.finishing = Side(self.device, urgent=True)
        self.plenty = False  # of memory, for both halves at once
        self.finish = Apart(
            partial(finished, self.device), partial(ready_to_finish, self.device), partial(release, self.device)
        )
        self.wanted: tuple[str, ...] = ()
        self.models: dict[str, Model] = {}
        self.lacking: dict[str, ViewmeshError] = {}  # models that are wanted and could not be loaded, and why
        self.loaded, self.loading = Loaded(), threading.Lock()
        self.together = TOGETHER
        self.firsts: Turns[tuple[Model, Looked], Begun] = Turns(self._begin, self._most)
        self.seconds: Turns[tuple[Model, Begun], tuple[Draft, int]] = Turns(self._draft, self._most)

    def hold(self, models: Sequence[str]) -> None:
        with self.loading:
            for name in set(self.models) - set(models):
                del self.models[name]  # a call that runs on it keeps it until its end
            self.wanted, self.lacking = tuple(models), {}
            self.release()
            for name in models:
                try:
                    self._load(name)
                except ViewmeshError as error:
                    log.warning(f"{name} is not held: {error}")
            if not self.finish.helpers:
                self.finish.start(_finishers(self.device))
            self.plenty = _beside_the_networks(self.device) > 0

    def held(self) -> dict[str, ViewmeshError | None]:
        return {**dict.fromkeys(self.models), **self.lacking}

    def warm(self) -> dict[str, float]:
        build_loops()
        seconds = {}
        for name, model in list(self.models.items()):
            more = {"batches": self.together > 1} if isinstance(model, Trellis) else {}
            seconds |= {f"{name} {part}": s for part, s in model.warm(**more).items()}
        self.release()  # what only compiling and recording needed
        return seconds

    def generate(
        self, views: Path, options: dict[str, Any], out: Path, progress: Any, cancelled: Any
    ) -> dict[str, Any]:
        chosen, viewset = Options.model_validate(options), load_viewset(views)
        model = self._model(chosen.model)
        total = total_steps(model, chosen)

        def while_waiting() -> None:
            check(cancelled)
            progress("generate", 0, total)  # a sign of life

        with self.looking():
            looked = look(model, viewset, chosen, progress=progress, cancelled=cancelled)
        joins = None if looked.company is None else (chosen.model, looked.company)
        begun = Begun(looked)
        if self.plenty:
            begun = self.firsts.take((model, looked), joins, while_waiting)
        drafted, together = self.seconds.take((model, begun), joins, while_waiting)
        del begun
        draft = out.with_name("draft.safetensors")
        with self.finishing():
            save_draft(drafted, draft)
            del drafted
            given = {"draft": draft, "options": options, "total": total, "out": out}
            made = self.finish(given, progress, cancelled)
        if chosen.refine and viewset.cameras is None:
            save_viewset(with_cameras(model, viewset), out.with_name(POSED))
        return {
            "device": str(self.device),
            "weights_revision": revision(chosen.model, self.weights),
            "licence_notes": list(licence_notes(chosen.model)),
            "model_warnings": made["warnings"],
            "generate_seconds": {part: round(seconds, 3) for part, seconds in made["seconds"].items()},
            "generated_together": together,
        }

    def _model(self, name: str) -> Model:
        """The model; one that did not fit is tried once more. Raises why it is not there."""
        with self.loading:
            if name not in self.wanted:
                raise MissingModel(f"This worker does not hold {name}.", hint="Name it in its user_config.models.")
            self._load(name)
            return self.models[name]

    def _load(self, name: str) -> None:
        """Raises ViewmeshError, and keeps it in `lacking`."""
        if name in self.models:
            return
        try:
            self.models[name] = self._loaded(name)
            self.lacking.pop(name, None)
        except ViewmeshError as error:
            self.lacking[name] = error
            raise
        finally:
            self.release()  # what a load that failed half-way had allocated

    def _loaded(self, name: str) -> Model:
        try:
            return load_model(name, self.device, self.weights, self.loaded)
        except Exception as error:
            if isinstance(error, ViewmeshError) or not out_of_device_memory(error):
                raise
            said = str(error).splitlines()[0]
        log.warning(f"{name} did not fit: {said}")
        needed = vram_bytes(name, self.weights)
        raise OutOfMemory(name, needed=needed, free=self.memory().get("free", 0), device=str(self.device))

    def _most(self) -> int:
        return 1 if self.together == 1 else min(self.together, fit_together(self.device))

    def _begin(self, calls: Sequence[tuple[Model, Looked]]) -> list[Begun | Exception]:
        """Of calls of one model."""

        def begin(calls: Sequence[tuple[Model, Looked]]) -> list[Begun | ViewmeshError]:
            return begin_together(calls[0][0], [looked for _, looked in calls])

        with self.beginning():
            return self._fitting(begin, calls)

    def _draft(self, calls: Sequence[tuple[Model, Begun]]) -> list[tuple[Draft, int] | Exception]:
        def draft(calls: Sequence[tuple[Model, Begun]]) -> list[tuple[Draft, int] | Exception]:
            made = draft_together(calls[0][0], [begun for _, begun in calls])
            return [one if isinstance(one, Exception) else (one, len(calls)) for one in made]

        return self._fitting(draft, calls)

    def _fitting(self, run: "Run[S, T]", calls: Sequence[S]) -> list[T | Exception]:
        """All of them together, or one by one where that does not fit."""
        try:
            return list(run(calls))
        except Exception as error:
            if len(calls) == 1 or not out_of_device_memory(error):
                raise
            log.warning(f"{len(calls)} calls did not fit on the device together: {str(error).splitlines()[0]}")
        self.release()  # outside the handler: the exception held what the batch had allocated
        return [self._by_itself(run, call) for call in calls]

    def _by_itself(self, run: "Run[S, T]", call: S) -> T | Exception:
        try:
            return run([call])[0]
        except Exception as error:
            return error


def finished(
    device: torch.device, given: dict[str, Any], progress: Progress, cancelled: Callable[[], bool]
) -> dict[str, Any]:
    """The file `draft` → the textured mesh in the file `out`; its warnings and seconds."""
    chosen = Options.model_validate(given["options"])
    draft = load_draft(given["draft"], device)
    made = finish(draft, chosen, progress=progress, cancelled=cancelled, total=given["total"])
    drawn = {} if chosen.refine else early_previews(made.mesh, device)  # refined, it will look otherwise
    save_mesh(made.mesh, given["out"], made.gaussians, previews=drawn)
    return {"warnings": list(made.warnings), "seconds": made.seconds}


def ready_to_finish(device: torch.device) -> None:
    """What a process of `finished` does first, so that no call waits for it."""
    wait_asleep(device)
    get_rasterizer(device)
    build_loops()


def _beside_the_networks(device: torch.device) -> int:
    """Bytes of a GPU that are free beside what warming and two batches take, negative where they do not all fit."""
    return (free_bytes(device) or 0) - WARM_BYTES - BATCHES_BYTES


def _finishers(device: torch.device) -> int:
    """How many processes there is room for; none beside a CPU, which they would share."""
    return max(0, min(FINISHERS, os.cpu_count() or 1, _beside_the_networks(device) // FINISHER_BYTES))
