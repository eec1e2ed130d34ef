"""Calls in processes of their own: for work of thousands of short operations. In threads of the process that launches
the networks they would keep its interpreter's lock on the move, and the device waiting.

A process serves one call at a time and stays for the next one; where all are taken, calls wait. Where there is none, or
one dies, they are served here: slower for everybody, and the same.
"""

import logging
import multiprocessing
import os
import queue
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from viewmesh.progress import check

log = logging.getLogger("ray.serve")

LOOK_S = 0.1  # how often a call that waits asks whether it is still wanted
SAY_S = 1.0  # how often who works says that it is alive, when it asks whether it is still wanted
QUIET_S = 300.0  # after which it is taken for dead, and killed
LEAVE_S = 5.0  # that a process which hung up may take to end
LESS_URGENT = 5  # in nice's units, and whatever they start: where cores are short, who launches the networks is first
STOP = None
Given = dict[str, Any]
Work = Callable[[Given, Any, Callable[[], bool]], Given]


def nothing() -> None:
    pass


class Apart:
    """work: (given, progress, cancelled) → a dictionary; importable, and what goes in and out can be pickled.
    before, after: called in each process, once and after every call. One that dies is replaced."""

    def __init__(
        self,
        work: Work,
        before: Callable[[], None] = nothing,
        after: Callable[[], None] = nothing,
        quiet_s: float = QUIET_S,
    ) -> None:
        self.work, self.before, self.after, self.quiet_s = work, before, after, quiet_s
        self.helpers: list[_Helper] = []
        self.idle: queue.SimpleQueue[_Helper] = queue.SimpleQueue()

    def start(self, count: int) -> None:
        """So many processes; returns at once, and who calls before they are ready waits for them."""
        context = multiprocessing.get_context("spawn")  # a forked one could not use CUDA
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self.work, self.before, self.after), daemon=True)
            process.start()
            theirs.close()
            helper = _Helper(process, ours, self.quiet_s)
            self.helpers.append(helper)
            self.idle.put(helper)

    def stop(self) -> None:
        for helper in self.helpers:
            helper.end()
        self.helpers, self.idle = [], queue.SimpleQueue()

    def __call__(self, given: Given, progress: Any, cancelled: Callable[[], bool]) -> Given:
        """Raises what work raises, and Cancelled where it is no longer wanted before it began."""
        if not self.helpers:
            return self.work(given, progress, cancelled)
        helper = self._free(cancelled)
        try:
            outcome = helper.call(given, progress, cancelled)
        except (EOFError, OSError):
            helper.process.join(LEAVE_S)
            self._replace(helper)
            log.warning(f"A process that texturing was left to has ended with {helper.process.exitcode}; here, then.")
            return self.work(given, progress, cancelled)
        except Exception:
            self._replace(helper)  # it may still be at it
            raise
        self.idle.put(helper)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _replace(self, helper: "_Helper") -> None:
        helper.end()
        self.helpers.remove(helper)
        self.start(1)

    def _free(self, cancelled: Callable[[], bool]) -> "_Helper":
        while True:
            with suppress(queue.Empty):
                return self.idle.get(timeout=LOOK_S)
            check(cancelled)


@dataclass(frozen=True, eq=False)
class _Helper:
    process: BaseProcess
    connection: Connection
    quiet_s: float

    def call(self, given: Given, progress: Any, cancelled: Callable[[], bool]) -> Given | Exception:
        """Raises EOFError or OSError when the process is gone, RuntimeError when it says nothing for too long."""
        self.connection.send(given)
        asked, heard = False, time.monotonic()
        while True:
            if self.connection.poll(LOOK_S):
                kind, value = self.connection.recv()
                heard = time.monotonic()
                if kind == "outcome":
                    return value
                if kind == "progress":
                    progress(*value[0], **value[1])
            elif time.monotonic() - heard > self.quiet_s:
                raise RuntimeError(f"The process that textures said nothing for {self.quiet_s:.0f} s.")
            elif not asked and cancelled():
                self.connection.send(STOP)
                asked = True

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


def _serve(connection: Connection, work: Work, before: Callable[[], None], after: Callable[[], None]) -> None:
    """A process's life. It is sent calls, and STOP to end the one that it is at."""
    os.nice(LESS_URGENT)
    stopped, said = False, 0.0

    def say(kind: str, value: Any) -> None:
        nonlocal said
        said = time.monotonic()
        connection.send((kind, value))

    def cancelled() -> bool:
        nonlocal stopped
        if time.monotonic() - said > SAY_S:
            say("alive", None)
        stopped = stopped or (connection.poll() and connection.recv() is STOP)
        return stopped

    def progress(*args: Any, **metrics: float) -> None:
        say("progress", (args, metrics))

    with suppress(EOFError, OSError):  # whoever called is gone
        before()
        while True:
            given = connection.recv()
            if given is STOP:  # it came when the call had ended
                continue
            stopped = False
            try:
                outcome = work(given, progress, cancelled)
            except Exception as error:
                outcome = error.with_traceback(None)
            after()
            say("outcome", outcome)
