"""How a replica runs blocking work: in a thread, with progress out, a stop signal in, and its health watched.

Serve cancels `async` methods when the caller goes away but cannot stop a thread. So the method is an async generator,
the work a function in a thread that asks `cancelled()` between steps, and leaving the generator for any reason sets the
flag and waits for the thread. Who waits may be cancelled, too: the device is free when the thread has ended, no sooner.
"""

import asyncio
import contextvars
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from deployments.artifacts import StoreError
from deployments.logs import Log, log_of
from deployments.messages import Done, Failed, Message, Progress
from viewmesh.errors import Cancelled, MissingModel, OutOfMemory, PoseError, ViewmeshError

T = TypeVar("T")
Work = Callable[[Any, Callable[[], bool]], dict[str, Any]]

TELLINGS = 8.0  # per second, of all calls of a replica together: each becomes a row of the job database
MANY = 64  # threads, made as they are needed: the event loop's own are four more than the replica has CPUs

POISON = ("CUDA error", "device-side assert", "CUBLAS_STATUS_EXECUTION_FAILED", "cudaErrorIllegalAddress")


class Unhealthy(RuntimeError):
    """Raised by check_health: Serve replaces the replica."""


@dataclass(eq=False)
class _Call:
    """A running call: when its thread was last heard of, which is when it told or asked something."""

    last_sign: float


class Worker:
    """One replica's work: calls in threads, at most `at_once` of them (None: as many as Serve lets in), throttled
    progress, and what check_health needs to know.

    With one at once it is always the same thread, and `made` makes the engine in it: OpenMP keeps threads for every
    thread that ever computed, and once a process has more of them than there are CPUs, all of them sleep between the
    parallel parts of a step; on two cores a fit then takes a quarter longer.
    """

    def __init__(self, *, at_once: int | None = 1, stall_s: float = 300.0, interval_s: float = 0.5) -> None:
        self.stall_s = stall_s
        self.interval_s = interval_s
        self.poisoned = ""
        self._turns = None if at_once is None else asyncio.Semaphore(at_once)
        self._threads = ThreadPoolExecutor(at_once or MANY, "work")
        self._running: set[_Call] = set()

    def made(self, make: Callable[[], T]) -> T:
        """What `make` returns, made where the calls run."""
        return self._threads.submit(make).result()

    def check_health(self) -> None:
        if self.poisoned:
            raise Unhealthy(f"the device context is unusable: {self.poisoned}")
        for call in list(self._running):
            silent = time.monotonic() - call.last_sign
            if silent > self.stall_s:
                raise Unhealthy(f"no progress for {silent:.0f} s")

    async def run(
        self, work: Work, *, job_id: str = "", on_memory: Callable[[], None] = lambda: None
    ) -> AsyncGenerator[Message, None]:
        """Runs work(progress, cancelled) in a thread; yields its Progress and last one Done or Failed. To be left
        through its aclose, or the thread works on.

        on_memory: called in the thread when the work has run out of memory. job_id: for the log.
        """
        if self._turns is not None:
            await self._turns.acquire()
        if self.poisoned:
            self._give_back()
            yield Failed("worker_unfit", "The worker is about to be replaced.", retry=True)
            return
        call = _Call(time.monotonic())
        loop = asyncio.get_running_loop()
        stop = threading.Event()
        inbox: asyncio.Queue[Message] = asyncio.Queue()
        sent, told = 0.0, None

        def progress(stage: str, step: int, steps: int, **metrics: float) -> None:
            """Sent now and then, and only what is new; no metric that is not finite, for which JSON has no word."""
            nonlocal sent, told
            now = call.last_sign = time.monotonic()
            if now - sent >= max(self.interval_s, len(self._running) / TELLINGS) or step >= steps:
                finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
                news = Progress(stage, int(step), int(steps), finite)
                if news != told:
                    sent, told = now, news
                    loop.call_soon_threadsafe(inbox.put_nowait, news)

        def cancelled() -> bool:
            call.last_sign = time.monotonic()  # a long step tells nothing, but asks
            return stop.is_set()

        def body() -> None:
            message = self._outcome(work, progress, cancelled, log_of(job_id), on_memory)
            loop.call_soon_threadsafe(inbox.put_nowait, message)

        def ended(thread: asyncio.Future[None]) -> None:
            self._running.discard(call)
            self._give_back()

        self._running.add(call)
        thread = loop.run_in_executor(self._threads, contextvars.copy_context().run, body)  # its request id
        thread.add_done_callback(ended)
        try:
            while True:
                message = await inbox.get()
                yield message
                if not isinstance(message, Progress):
                    return
        finally:
            stop.set()
            await asyncio.wait({thread})  # however long: until then Serve gives the next call to another replica

    def _give_back(self) -> None:
        if self._turns is not None:
            self._turns.release()

    def _outcome(
        self, work: Work, progress: Any, cancelled: Callable[[], bool], log: Log, on_memory: Callable
    ) -> Message:
        try:
            return Done(work(progress, cancelled))
        except Exception as error:
            failed = failure(error)
            if failed.code == "device_lost":
                self.poisoned = str(error).splitlines()[0][:200]
            if failed.code == "internal_error":
                log.exception("A stage failed for no reason that it knows.")
        if failed.code == "out_of_memory":  # only here: until its except block ends, the error keeps all frames alive
            on_memory()
        return failed


def failure(error: BaseException) -> Failed:
    """The Failed of an exception: our own errors as they are, a device's by what it says, others without their text."""
    if isinstance(error, ViewmeshError):
        return Failed(error.code, str(error), error.hint, isinstance(error, StoreError), _details(error))
    if out_of_device_memory(error):
        return Failed("out_of_memory", str(error).splitlines()[0], "Use a smaller preset, fewer views or a larger GPU.")
    if any(sign in str(error) for sign in POISON):
        return Failed("device_lost", "The GPU stopped working during this job.", "The service replaces it.", retry=True)
    if isinstance(error, MemoryError):
        return Failed("out_of_memory", "The worker ran out of host memory.", "Use fewer or smaller views.")
    return Failed(
        "internal_error", f"The stage failed unexpectedly ({type(error).__name__}).", "See the service's log."
    )


def out_of_device_memory(error: BaseException) -> bool:
    return isinstance(error, OutOfMemory) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)


def _details(error: ViewmeshError) -> dict[str, Any]:
    if isinstance(error, OutOfMemory):
        return {"needed_bytes": error.needed, "free_bytes": error.free, "device": error.device}
    if isinstance(error, PoseError):
        return {"unposed": list(error.unposed)}
    if isinstance(error, MissingModel | Cancelled):
        return {}
    file = getattr(error, "file", "")
    return {"file": file} if file else {}
