"""Preprocessor: uploads → one checked view set in the artifact store. CPU only, autoscaled.

The only place where bytes from outside are decoded.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from ray import serve

from deployments import scratch
from deployments.artifacts import ArtifactStore, fresh
from deployments.engines import Preparer, make
from deployments.logs import log_of
from deployments.messages import Message
from deployments.metrics import StageMetrics
from deployments.running import Worker

Reader = Callable[..., dict[str, Any]]  # engines.Preparer's methods


@serve.deployment(
    name="Preprocessor",
    max_ongoing_requests=2,
    max_queued_requests=256,
    graceful_shutdown_timeout_s=60,
    ray_actor_options={"num_cpus": 1},
)
class Preprocessor:
    def __init__(self, store_url: str, engine: str, engine_args: dict[str, Any]) -> None:
        self.store = ArtifactStore(store_url)
        self.engine: Preparer = make(engine, **engine_args)
        self.metrics = StageMetrics("prepare")
        self.worker = Worker(at_once=None, stall_s=300.0)

    def reconfigure(self, config: dict[str, Any]) -> None:
        self.worker.stall_s = float(config.get("stall_s", self.worker.stall_s))

    def check_health(self) -> None:
        self.worker.check_health()

    async def prepare(self, call: dict[str, Any]) -> AsyncIterator[Message]:
        """call: job_id, options, inputs {name: Ref}. Done: views (Ref), facts."""
        async with aclosing(self._messages(call, self.engine.prepare)) as messages:
            async for message in messages:
                yield message

    async def pose(self, call: dict[str, Any]) -> AsyncIterator[Message]:
        """The same with cameras from structure from motion. Done without views: facts tells why it found none."""
        async with aclosing(self._messages(call, self.engine.pose)) as messages:
            async for message in messages:
                yield message

    async def _messages(self, call: dict[str, Any], read: Reader) -> AsyncGenerator[Message, None]:
        work = self.worker.run(lambda p, c: self._read(call, read, p, c), job_id=call["job_id"])
        async with aclosing(self.metrics.watch(work, log_of(call["job_id"]))) as messages:
            async for message in messages:
                yield message

    def _read(self, call: dict[str, Any], read: Reader, progress: Any, cancelled: Any) -> dict[str, Any]:
        started = time.monotonic()
        with scratch.workdir("prepare") as workdir:
            folder = workdir / "input"
            folder.mkdir()
            for name, ref in call["inputs"].items():
                self.store.fetch(ref, folder, name)
            archive = folder / "archive.zip"
            out = workdir / "views.safetensors"
            source = archive if archive.exists() else folder
            done: dict[str, Any] = {"facts": read(source, call["options"], out, progress, cancelled)}
            if out.exists():
                views = self.store.put(out, fresh(f"jobs/{call['job_id']}", "views.safetensors"), move=True)
                done["views"] = views.json()
            return {**done, "seconds": time.monotonic() - started}
