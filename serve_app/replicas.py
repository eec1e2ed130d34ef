"""Whether a model that is served has a replica to answer for it: what Serve's controller sees of its deployment, and
what a replica that runs says of the models that it holds."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from serve_app.models import Model
from viewmesh.weights.ready import Readiness

Json = dict[str, Any]
T = TypeVar("T")
log = logging.getLogger("ray.serve")
FRESH_S = 5.0  # so long nobody is asked again: to read an answer of Serve takes 0.05 s of a core
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


class Watched(Generic[T]):
    """A value that is asked for at most every few seconds. What is a little older is good enough for this request, and
    asked for anew for the next one."""

    def __init__(self, ask: Callable[[], Awaitable[T]], value: T) -> None:
        self.ask, self.value, self.at = ask, value, -1e9
        self._asking: asyncio.Task[None] | None = None  # an event loop does not keep its tasks

    async def get(self) -> T:
        age = time.monotonic() - self.at
        if age > FRESH_S:
            self.at = time.monotonic()
            self._asking = asyncio.create_task(self._renew())
            if age > OLD_S:
                await self._asking
        return self.value

    async def _renew(self) -> None:
        self.value = await self.ask()


class Replicas:
    """The application's deployments; none where there is no controller to ask.

    ask: what the replicas that hold several models say of each, as `Conductor.held`.
    """

    def __init__(self, ask: Callable[[], Awaitable[dict[str, Json]]] | None = None) -> None:
        self._ask = ask
        self._looker = ThreadPoolExecutor(1, "look")  # a controller that is away holds one thread, however often asked
        self._seen: Watched[dict[str, Seen]] = Watched(self._see, {})
        self._held: Watched[dict[str, Json]] = Watched(self._hear, {})

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
        return await self._held.get()

    async def seen(self) -> dict[str, Seen]:
        return await self._seen.get()

    async def _hear(self) -> dict[str, Json]:
        if self._ask is None:
            return {}
        try:
            return await asyncio.wait_for(self._ask(), 2 * PATIENCE_S)
        except Exception as error:
            log.warning(f"The workers could not be asked for their models: {type(error).__name__}: {error}")
            return self._held.value

    async def _see(self) -> dict[str, Seen]:
        try:
            look = asyncio.get_running_loop().run_in_executor(self._looker, _look)
            return await asyncio.wait_for(look, PATIENCE_S)
        except Exception as error:  # the controller is away; what runs goes on without it
            log.warning(f"Serve's controller could not be asked for the replicas: {type(error).__name__}: {error}")
            return {}


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
