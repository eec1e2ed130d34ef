"""Trellis: the generative models, warm: TRELLIS, ReconViaGen or both in one replica. One GPU each, autoscaled.

`user_config.models` says which; an edit of it loads and drops models without a restart. Each is loaded after a look at
the free device memory: one that does not fit leaves the others serving, and `held` tells why, with both figures. The
networks are then compiled in a thread: until that is done, calls are answered by the same networks, slower. Calls that
wait for the device run on it together, see the engine; while some are textured on the CPU, others have the device.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from ray import serve

from deployments import scratch
from deployments.artifacts import ArtifactStore, fresh
from deployments.engines import POSED, Generator, make
from deployments.logs import log_of
from deployments.messages import Message
from deployments.metrics import DeviceMetrics, StageMetrics
from deployments.running import Worker, out_of_device_memory
from viewmesh.errors import OptionError, ViewmeshError

log = logging.getLogger("ray.serve")


@serve.deployment(
    name="Trellis",
    max_ongoing_requests=18,  # some on the device, some being textured
    max_queued_requests=-1,
    graceful_shutdown_timeout_s=60,
    health_check_period_s=3,
    health_check_timeout_s=30,
    ray_actor_options={"num_gpus": 1},
    user_config={},  # without one Serve would not call reconfigure, which loads the models
)
class Trellis:
    def __init__(self, store_url: str, engine: str, engine_args: dict[str, Any], models: Sequence[str]) -> None:
        """models: those that the service runs. What is held of them is `user_config`'s to say, all of them if it does
        not."""
        self.store = ArtifactStore(store_url)
        self.engine: Generator = make(engine, **engine_args)
        self.models, self.holding = tuple(models), ()
        self.metrics = StageMetrics("generate")
        self.device = DeviceMetrics()
        self.worker = Worker(at_once=None)
        self.warming: threading.Thread | None = None

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Raises why, where not one of the models can be held."""
        self.worker.stall_s = float(config.get("stall_s", self.worker.stall_s))
        self.engine.together = max(1, int(config.get("together", self.engine.together)))
        named = config.get("models") or self.models
        holding = tuple(name for name in self.models if name in named)
        if holding == self.holding and holding:
            return
        await asyncio.to_thread(self.engine.hold, holding)
        reasons = list(self.engine.held().values())
        if not reasons:
            raise OptionError(f"user_config.models names none of {', '.join(self.models)}, which args.models names.")
        if all(reasons):
            raise next(reason for reason in reasons if reason)
        self.holding = holding
        if config.get("compile", True):
            self.warming = threading.Thread(target=self._warm, args=(self.warming,), daemon=True)
            self.warming.start()

    async def held(self) -> dict[str, dict[str, str]]:
        """By model that the service runs: {}, or reason and hint where this replica does not hold it."""
        found = self.engine.held()
        return {name: _why(name, found) for name in self.models}

    def check_health(self) -> None:
        self.worker.check_health()

    async def generate(self, call: dict[str, Any]) -> AsyncIterator[Message]:
        """call: job_id, options, views. Done: result (Ref), facts, seconds."""
        work = self.worker.run(
            lambda p, c: self._generate(call, p, c), job_id=call["job_id"], on_memory=self.engine.release
        )
        async with aclosing(self.metrics.watch(work, log_of(call["job_id"]))) as messages:
            async for message in messages:
                yield message

    def _generate(self, call: dict[str, Any], progress: Any, cancelled: Any) -> dict[str, Any]:
        started = time.monotonic()
        with scratch.workdir("generate") as workdir:
            views, out = self.store.fetch(call["views"], workdir), workdir / "result.safetensors"
            facts = self._facts(views, call, out, progress, cancelled)
            ref = self.store.put(out, fresh(f"jobs/{call['job_id']}", "result.safetensors"), move=True)
            self.device.record(self.engine.memory())
            done = {"result": ref.json(), "facts": facts, "seconds": time.monotonic() - started}
            if (posed := workdir / POSED).exists():
                again = self.store.put(posed, fresh(f"jobs/{call['job_id']}", "views.safetensors"), move=True)
                done["views"] = again.json()
            return done

    def _facts(self, views: Path, call: dict[str, Any], out: Path, *given: Any) -> dict[str, Any]:
        """The engine's; when the device's memory runs out, once more: what other calls had in use may be free now."""
        try:
            return self.engine.generate(views, call["options"], out, *given)
        except Exception as error:
            if not out_of_device_memory(error):
                raise
            log_of(call["job_id"]).warning(f"out of memory; once more: {error}")
        # Only here: until its except block ends, the error keeps what filled the device.
        self.engine.release()
        return self.engine.generate(views, call["options"], out, *given)

    def _warm(self, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        try:
            seconds = self.engine.warm()
            if seconds:
                log.info(f"compiled: {', '.join(f'{part} {s:.1f} s' for part, s in seconds.items())}")
        except Exception:  # slower is better than not at all
            log.exception("The networks could not be compiled; they run as they are.")


def _why(name: str, found: dict[str, ViewmeshError | None]) -> dict[str, str]:
    if name not in found:
        return {"reason": f"Its worker does not hold {name}.", "hint": "Name it in user_config.models of Trellis."}
    error = found[name]
    return {} if error is None else {"reason": str(error), "hint": error.hint}
