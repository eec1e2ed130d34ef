"""Whether a model that is served has a replica to answer for it, as Serve's controller sees it."""

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any

from viewmesh.weights.ready import Readiness

log = logging.getLogger("ray.serve")
FRESH_S = 2.0
PATIENCE_S = 1.0


@dataclass(frozen=True)
class Seen:
    """A deployment: its status in Serve's words, its running replicas, what Serve says about it."""

    status: str
    running: int
    message: str = ""

    def readiness(self) -> Readiness:
        if self.running:
            return Readiness(True)
        if self.status in ("HEALTHY", "UPSCALING"):  # min_replicas: 0
            return Readiness(True, "No replica is running; one starts on demand.")
        if self.status in ("UNHEALTHY", "DEPLOY_FAILED"):
            said = [line.strip() for line in self.message.splitlines() if line.strip()]
            reason = f"Its replica does not start: {said[-1] if said else self.status}"
            return Readiness(
                False, reason, "Look at its deployment in the Ray dashboard, or at viewmesh doctor --address."
            )
        return Readiness(False, "Its replica is starting.", "Jobs wait for it.")


class Replicas:
    """The application's deployments, asked at most every two seconds; none where there is no controller to ask."""

    def __init__(self) -> None:
        self._seen: dict[str, Seen] = {}
        self._at = 0.0

    async def seen(self) -> dict[str, Seen]:
        if time.monotonic() - self._at > FRESH_S:
            self._at = time.monotonic()
            try:
                self._seen = await asyncio.wait_for(asyncio.to_thread(_look), PATIENCE_S)
            except Exception as error:  # the controller is away; what runs goes on without it
                log.warning(f"Serve's controller could not be asked for the replicas: {type(error).__name__}: {error}")
                self._seen = {}
        return self._seen


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
