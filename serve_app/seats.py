"""How many jobs of a model its replicas have at once: a job takes a seat before its first stage, and leaves it when all
that is left is to write its files, so that the next one has the GPU meanwhile.

Without seats, jobs beyond the number of replicas would take turns on one, each turn loading a checkpoint. It is memory
of one process: after its death, jobs take their seats anew as they go on.
"""

import asyncio
from bisect import insort
from collections import defaultdict
from collections.abc import Callable


class Seats:
    """There are none until `set` says how many."""

    def __init__(self) -> None:
        self.slots: Callable[[str], int] = lambda model: 0
        self.held: dict[str, str] = {}  # job → model
        self.waiting: dict[str, list[tuple[float, str, asyncio.Event]]] = defaultdict(list)  # by model, by age
        self.loop: asyncio.AbstractEventLoop | None = None  # that of those who take seats

    def set(self, slots: Callable[[str], int]) -> None:
        """slots: of a model, how many. Where there are fewer than before, nobody has to get up. From any thread."""
        self.slots = slots
        if self.loop is not None and self.loop is _running_loop():
            self._fill_all()
        elif self.loop is not None:
            self.loop.call_soon_threadsafe(self._fill_all)

    async def take(self, job_id: str, model: str, created: float) -> None:
        """Returns once the job has a seat of the model: of those that wait the oldest is next, by when they were
        accepted (`created`, seconds since 1970). A seat of another model is left."""
        if self.held.get(job_id) == model:
            return
        self.loop = asyncio.get_running_loop()
        self.leave(job_id)
        given = asyncio.Event()
        place = (created, job_id, given)
        insort(self.waiting[model], place, key=lambda other: other[:2])
        self._fill(model)
        try:
            await given.wait()
        except asyncio.CancelledError:
            if place in self.waiting[model]:
                self.waiting[model].remove(place)
            self.leave(job_id)
            raise

    def leave(self, job_id: str) -> None:
        if (model := self.held.pop(job_id, None)) is not None:
            self._fill(model)

    def _fill_all(self) -> None:
        for model in list(self.waiting):
            self._fill(model)

    def _fill(self, model: str) -> None:
        waiting = self.waiting[model]
        while waiting and sum(held == model for held in self.held.values()) < self.slots(model):
            _, job_id, given = waiting.pop(0)
            self.held[job_id] = model
            given.set()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
