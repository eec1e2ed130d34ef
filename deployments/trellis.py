"""Trellis: a generative model, warm. One GPU each, autoscaled; ReconViaGen is the same deployment with other weights.

The constructor loads the weights once, after a look at the free device memory; its error has both figures. The networks
are then compiled in a thread: until that is done, calls are answered by the same networks, slower. Calls that wait for
the device run on it together, see the engine; while some are being textured on the CPU, others have the device.
"""

import logging
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from ray import serve

from deployments.artifacts import ArtifactStore, fresh
from deployments.engines import POSED, Generator, make
from deployments.logs import log_of
from deployments.messages import Message
from deployments.metrics import DeviceMetrics, StageMetrics
from deployments.running import Worker, out_of_device_memory

log = logging.getLogger("ray.serve")


@serve.deployment(
    name="Trellis",
    max_ongoing_requests=4,  # some on the device, some being textured
    max_queued_requests=-1,
    graceful_shutdown_timeout_s=60,
    health_check_period_s=3,
    health_check_timeout_s=30,
    ray_actor_options={"num_gpus": 1},
)
class Trellis:
    def __init__(self, store_url: str, engine: str, engine_args: dict[str, Any]) -> None:
        self.store = ArtifactStore(store_url)
        self.engine: Generator = make(engine, **engine_args)
        self.metrics = StageMetrics("generate")
        self.device = DeviceMetrics()
        self.worker = Worker(at_once=None)
        self.warming: threading.Thread | None = None

    def reconfigure(self, config: dict[str, Any]) -> None:
        self.worker.stall_s = float(config.get("stall_s", self.worker.stall_s))
        self.engine.together = max(1, int(config.get("together", self.engine.together)))
        if config.get("compile", True) and self.warming is None:
            self.warming = threading.Thread(target=self._warm, daemon=True)
            self.warming.start()

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
        workdir = Path(tempfile.mkdtemp(prefix="viewmesh-generate-"))
        try:
            views, out = self.store.fetch(call["views"], workdir), workdir / "result.safetensors"
            facts = self._facts(views, call, out, progress, cancelled)
            ref = self.store.put(out, fresh(f"jobs/{call['job_id']}", "result.safetensors"), move=True)
            self.device.record(self.engine.memory())
            done = {"result": ref.json(), "facts": facts, "seconds": time.monotonic() - started}
            if (posed := workdir / POSED).exists():
                again = self.store.put(posed, fresh(f"jobs/{call['job_id']}", "views.safetensors"), move=True)
                done["views"] = again.json()
            return done
        finally:
            shutil.rmtree(workdir, ignore_errors=True)

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

    def _warm(self) -> None:
        try:
            seconds = self.engine.warm()
            if seconds:
                log.info(f"compiled: {', '.join(f'{part} {s:.1f} s' for part, s in seconds.items())}")
        except Exception:  # slower is better than not at all
            log.exception("The networks could not be compiled; they run as they are.")
