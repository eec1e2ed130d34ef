"""Calls in processes of their own: for work of thousands of short operations. In threads of the process that launches
the networks they would keep its interpreter's lock on the move, and the device waiting.

A process serves one call at a time and stays for the next one; where all are taken, calls wait. Where there is none, or
one dies, they are served here: slower for everybody, and the same.
"""

import logging
import multiprocessing
import os
import queue
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from viewmesh.progress import check

log = logging.getLogger("ray.serve")

LOOK_S = 0.1  # how often a call that waits asks whether it is still wanted
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

    def __init__(self, work: Work, before: Callable[[], None] = nothing, after: Callable[[], None] = nothing) -> None:
        self.work, self.before, self.after = work, before, after
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
            helper = _Helper(process, ours)
            self.helpers.append(helper)
            self.idle.put(helper)

    def stop(self) -> None:
        for helper in self.helpers:
            helper.process.kill()
            helper.process.join()
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
            log.warning(f"A process that texturing was left to has ended with {helper.process.exitcode}; here, then.")
            self.helpers.remove(helper)
            self.start(1)
            return self.work(given, progress, cancelled)
        self.idle.put(helper)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _free(self, cancelled: Callable[[], bool]) -> "_Helper":
        while True:
            with suppress(queue.Empty):
                return self.idle.get(timeout=LOOK_S)
            check(cancelled)


@dataclass(frozen=True, eq=False)
class _Helper:
    process: BaseProcess
    connection: Connection

    def call(self, given: Given, progress: Any, cancelled: Callable[[], bool]) -> Given | Exception:
        """Raises EOFError or OSError when the process is gone."""
        self.connection.send(given)
        asked = False
        while True:
            if self.connection.poll(LOOK_S):
                told, value = self.connection.recv()
                if not told:
                    return value
                progress(*value[0], **value[1])
            elif not asked and cancelled():
                self.connection.send(STOP)
                asked = True


def _serve(connection: Connection, work: Work, before: Callable[[], None], after: Callable[[], None]) -> None:
    """A process's life. It is sent calls, and STOP to end the one that it is at."""
    os.nice(LESS_URGENT)
    stopped = False

    def cancelled() -> bool:
        nonlocal stopped
        stopped = stopped or (connection.poll() and connection.recv() is STOP)
        return stopped

    def progress(*args: Any, **metrics: float) -> None:
        connection.send((True, (args, metrics)))

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
            connection.send((False, outcome))
