"""Whether a model that is served has a replica to answer for it: what Serve's controller sees of its deployment, and
what a replica that runs says of the models that it holds."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

from serve_app.models import Model
from viewmesh.weights.ready import Readiness

Json = dict[str, Any]
log = logging.getLogger("ray.serve")
FRESH_S = 2.0  # so long nobody is asked again
OLD_S = 10.0  # so long a request does not wait for the answer
PATIENCE_S = 1.0


@dataclass(frozen=True)
class Seen:
    """A deployment: its status in Serve's words, its running replicas, what Serve says about it."""

    status: str
    running: int
    message: str = ""

    @property
    def starting(self) -> bool:
        """No replica runs yet; a job that waits will get one."""
        return not self.running and self.status not in ("UNHEALTHY", "DEPLOY_FAILED")

    def readiness(self) -> Readiness:
        if self.running:
            return Readiness(True)
        if self.status in ("HEALTHY", "UPSCALING"):  # min_replicas: 0
            return Readiness(True, "No replica is running; one starts on demand.")
        if not self.starting:
            said = [line.strip() for line in self.message.splitlines() if line.strip()]
            reason = f"Its replica does not start: {said[-1] if said else self.status}"
            return Readiness(
                False, reason, "Look at its deployment in the Ray dashboard, or at viewmesh doctor --address."
            )
        return Readiness(False, "Its replica is starting.", "Jobs wait for it.")


class Replicas:
    """The application's deployments, asked at most every two seconds; none where there is no controller to ask.

    ask: what the replicas that hold several models say of each, as `Conductor.held`.
    """

    def __init__(self, ask: Callable[[], Awaitable[dict[str, Json]]] | None = None) -> None:
        self._ask = ask
        self._seen: dict[str, Seen] = {}
        self._held: dict[str, Json] = {}
        self._at = self._asked = -1e9
        self._looking: set[asyncio.Task[None]] = set()  # an event loop does not keep its tasks

    async def readiness(self, model: Model) -> Readiness:
        """Of a model that is served."""
        seen = (await self.seen()).get(model.deployment)
        if seen is not None and not seen.running:
            return seen.readiness()
        said = (await self.held()).get(model.name)
        return Readiness(False, said["reason"], said["hint"]) if said else Readiness(True)

    async def broken(self, models: Iterable[Model]) -> dict[str, Readiness]:
        """Of these, those for which nothing answers and nothing is about to, and why."""
        found = {}
        for model in models:
            seen = (await self.seen()).get(model.deployment)
            state = await self.readiness(model)
            if not state.ready and not (seen is not None and seen.starting):
                found[model.name] = state
        return found

    async def held(self) -> dict[str, Json]:
        """By model of a worker that holds several: {}, or reason and hint. As last heard, while nobody answers."""
        age = time.monotonic() - self._asked
        if self._ask is not None and age > FRESH_S:
            self._asked = time.monotonic()
            await self._now_or_soon(self._hear(self._ask), age)
        return self._held

    async def seen(self) -> dict[str, Seen]:
        age = time.monotonic() - self._at
        if age > FRESH_S:
            self._at = time.monotonic()
            await self._now_or_soon(self._see(), age)
        return self._seen

    async def _now_or_soon(self, look: Coroutine[Any, Any, None], age: float) -> None:
        """What is a little old is good enough for this request, and new for the next one."""
        task = asyncio.create_task(look)
        self._looking.add(task)
        task.add_done_callback(self._looking.discard)
        if age > OLD_S:
            await task

    async def _hear(self, ask: Callable[[], Awaitable[dict[str, Json]]]) -> None:
        try:
            self._held = await asyncio.wait_for(ask(), 2 * PATIENCE_S)
        except Exception as error:
            log.warning(f"The workers could not be asked for their models: {type(error).__name__}: {error}")

    async def _see(self) -> None:
        try:
            self._seen = await asyncio.wait_for(asyncio.to_thread(_look), PATIENCE_S)
        except Exception as error:  # the controller is away; what runs goes on without it
            log.warning(f"Serve's controller could not be asked for the replicas: {type(error).__name__}: {error}")
            self._seen = {}


def _look() -> dict[str, Seen]:
    import ray
    from ray import serve

    if not ray.is_initialized():  # the graph is in somebody else's process
        return {}
    return seen_in(serve.status().applications)


def seen_in(applications: dict[str, Any]) -> dict[str, Seen]:
    """By deployment, of the application that has a Conductor."""
    for application in applications.values():
        if "Conductor" in application.deployments:
            return {
                name: Seen(str(getattr(found.status, "value", found.status)), _running(found), found.message)
                for name, found in application.deployments.items()
            }
    return {}


def _running(found: Any) -> int:
    return sum(n for state, n in found.replica_states.items() if getattr(state, "value", state) == "RUNNING")
