"""What replicas count, through ray.serve.metrics (prometheus_client objects made in a replica are never exported).

Names follow Prometheus' rules; Ray adds `ray_` and the tags application, deployment and replica. No job ids in labels.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from ray.serve import metrics

from deployments.logs import Log
from deployments.messages import Done, Failed, Message

BUCKETS = [0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800]


class StageMetrics:
    def __init__(self, stage: str) -> None:
        self.tags = {"stage": stage}
        self.seconds = metrics.Histogram(
            "viewmesh_stage_seconds",
            description="Seconds of one call of a stage.",
            boundaries=BUCKETS,
            tag_keys=("stage", "outcome"),  # pyright: ignore[reportArgumentType]  (Ray says Tuple[str], takes any)
        )
        self.failures = metrics.Counter(
            "viewmesh_stage_failures_total",
            description="Failed calls of a stage.",
            tag_keys=("stage", "code"),  # pyright: ignore[reportArgumentType]
        )
        self.resumes = metrics.Counter(
            "viewmesh_stage_resumes_total", description="Calls that loaded a checkpoint.", tag_keys=("stage",)
        )

    async def watch(self, messages: AsyncGenerator[Message, None], log: Log) -> AsyncGenerator[Message, None]:
        """Passes the messages on, counts the call by its last one and logs how it ended."""
        stage, started, outcome = self.tags["stage"], time.monotonic(), "stopped"
        try:
            async with aclosing(messages):
                async for message in messages:
                    if isinstance(message, Failed):
                        outcome = "failed"
                        log.warning(f"{stage}: {message.code}: {message.message}")
                        self.failures.inc(tags={**self.tags, "code": message.code})
                    elif isinstance(message, Done):
                        outcome = "done"
                        if message.value.get("resumed"):
                            self.resumes.inc(tags=self.tags)
                    yield message
        finally:
            seconds = time.monotonic() - started
            self.seconds.observe(seconds, tags={**self.tags, "outcome": outcome})
            log.info(f"a call of {stage}: {outcome} after {seconds:.2f} s")


class DeviceMetrics:
    def __init__(self) -> None:
        self.memory = metrics.Gauge(
            "viewmesh_gpu_memory_bytes", description="Device memory as the worker sees it.", tag_keys=("kind",)
        )

    def record(self, memory: dict[str, int]) -> None:
        for kind, value in memory.items():
            self.memory.set(value, tags={"kind": kind})
