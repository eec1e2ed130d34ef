"""What /readyz asks others: each of them one question at a time, whoever and how many want to know."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from viewmesh.errors import ViewmeshError

FRESH_S = 2.0  # so long an answer is good for other probes, too
PATIENCE_S = 5.0


class Probes:
    """checks: by name, each blocks and raises where something is wrong. They have threads of their own: a store that
    hangs holds one of them, however often it is asked for, and none of those that everything else needs."""

    def __init__(self, checks: dict[str, Callable[[], None]]) -> None:
        self.checks = checks
        self._threads = ThreadPoolExecutor(len(checks), "probe")
        self._asked: dict[str, tuple[float, asyncio.Future[None]]] = {}

    async def answers(self) -> dict[str, str]:
        """By name: "ok", or in a few words what is wrong."""
        found = await asyncio.gather(*(self._answer(name) for name in self.checks))
        return dict(zip(self.checks, found, strict=True))

    async def _answer(self, name: str) -> str:
        try:
            await asyncio.wait_for(asyncio.shield(self._question(name)), PATIENCE_S)
            return "ok"
        except Exception as error:
            return str(error) if isinstance(error, ViewmeshError) else type(error).__name__

    def _question(self, name: str) -> "asyncio.Future[None]":
        at, asked = self._asked.get(name, (0.0, None))
        if asked is None or (asked.done() and time.monotonic() - at > FRESH_S):
            asked = asyncio.get_running_loop().run_in_executor(self._threads, self.checks[name])
            self._asked[name] = time.monotonic(), asked
        return asked

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
