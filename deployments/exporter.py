"""Exporter: a result → the files that the user gets, in the artifact store. CPU only, autoscaled."""

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any

from ray import serve

from deployments import scratch
from deployments.artifacts import ArtifactStore, fresh
from deployments.engines import ResultWriter, make
from deployments.logs import log_of
from deployments.messages import Message
from deployments.metrics import StageMetrics
from deployments.running import Worker


@serve.deployment(
    name="Exporter",
    max_ongoing_requests=2,
    max_queued_requests=256,
    graceful_shutdown_timeout_s=120,
    ray_actor_options={"num_cpus": 1},
)
class Exporter:
    def __init__(self, store_url: str, engine: str, engine_args: dict[str, Any]) -> None:
        self.store = ArtifactStore(store_url)
        self.worker = Worker(stall_s=600.0)  # one at a time: two share the same cores, and take longer together
        self.engine: ResultWriter = self.worker.made(partial(make, engine, **engine_args))
        self.metrics = StageMetrics("export")

    def reconfigure(self, config: dict[str, Any]) -> None:
        self.worker.stall_s = float(config.get("stall_s", self.worker.stall_s))

    def check_health(self) -> None:
        self.worker.check_health()

    async def export(self, call: dict[str, Any]) -> AsyncIterator[Message]:
        """call: job_id, options, result, views?, facts. Done: artifacts [{name, key, sha256, size}], report."""
        work = self.worker.run(lambda p, c: self._export(call, p, c), job_id=call["job_id"])
        async with aclosing(self.metrics.watch(work, log_of(call["job_id"]))) as messages:
            async for message in messages:
                yield message

    def _export(self, call: dict[str, Any], progress: Any, cancelled: Any) -> dict[str, Any]:
        started = time.monotonic()
        with scratch.workdir("export") as workdir:
            result = self.store.fetch(call["result"], workdir)
            views = self.store.fetch(call["views"], workdir) if call.get("views") else None
            folder = workdir / "out"
            folder.mkdir()
            report = self.engine.export(result, views, folder, call["options"], call["facts"], progress, cancelled)
            files = []
            target = fresh(f"jobs/{call['job_id']}/artifacts", "")
            for file in sorted(path for path in folder.iterdir() if path.is_file()):
                ref = self.store.put(file, f"{target}{file.name}", move=True)
                files.append({"name": file.name, **ref.json()})
            return {"artifacts": files, "report": report, "seconds": time.monotonic() - started}
