"""Calls that share a device: they take turns, and those that wait and may run together do so.

There is no timer: a batch is who waits when the device gets free, so a call that is alone never waits for company.
Whoever finds the device free serves the head of the queue, and all behind it that may join. Knows nothing of models.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Call = TypeVar("Call")
Result = TypeVar("Result")

LOOK_S = 0.5  # how often a call that waits looks whether it is still wanted


@dataclass(eq=False)
class Place(Generic[Call, Result]):
    """A call in the queue. joins: those whose value is equal may run together; None runs alone."""

    call: Call
    joins: Hashable
    result: "Result | Exception | None" = None


class Turns(Generic[Call, Result]):
    """run: calls → a result or an exception for each; what it raises itself goes to all of them. most: how many calls
    may run together now, asked before each run."""

    def __init__(self, run: Callable[[Sequence[Call]], Sequence[Result | Exception]], most: Callable[[], int]) -> None:
        self.run, self.most = run, most
        self.waiting: list[Place[Call, Result]] = []
        self.running: list[Place[Call, Result]] = []
        self.changed = threading.Condition()

    def take(self, call: Call, joins: Hashable, while_waiting: Callable[[], None]) -> Result:
        """The call's result; raises its exception. `while_waiting` is called now and then, and may raise to leave."""
        place: Place[Call, Result] = Place(call, joins)
        with self.changed:
            self.waiting.append(place)
        try:
            while place.result is None:
                if (together := self._next(place)) is not None:
                    self._serve(together)
                elif place in self.waiting:
                    while_waiting()
        finally:
            with self.changed:
                if place in self.waiting:
                    self.waiting.remove(place)
        if isinstance(place.result, Exception):
            raise place.result
        return place.result

    def _next(self, place: Place[Call, Result]) -> "list[Place[Call, Result]] | None":
        """Who runs now, if the device is free; None after a while in which it was not, or once `place` has a result."""
        with self.changed:
            self.changed.wait_for(lambda: place.result is not None or not self.running, timeout=LOOK_S)
            if place.result is not None or self.running or not self.waiting:
                return None
            head = self.waiting[0]
            joining = [p for p in self.waiting if p is head or (head.joins is not None and p.joins == head.joins)]
            self.running = joining[: max(1, self.most())]
            self.waiting = [p for p in self.waiting if p not in self.running]
            return self.running

    def _serve(self, together: "list[Place[Call, Result]]") -> None:
        results: Sequence[Result | Exception]
        try:
            results = self.run([place.call for place in together])
        except Exception as error:
            results = [error] * len(together)
        with self.changed:
            for place, result in zip(together, results, strict=True):
                place.result = result
            self.running = []
            self.changed.notify_all()
