"""Nvdiffrec: the optimiser, in slices. One GPU each (or CPU), one job at a time, autoscaled.

A slice continues a job for a few seconds and ends with a checkpoint in the artifact store. While that is written the
session goes on, so the next slice begins further on; a replica that is lost takes no more with it than without.

Three steps of a fit take as long as they take, many seconds on a CPU (see `viewmesh.nvdiffrec.surface`): each is
a slice of its own, asks every second or two whether it is still wanted, and shows that it lives. The replica keeps the
sessions of its last jobs warm; a session is used only if it went on from the very checkpoint that the caller names, so
what is durable decides, never what happens to be in memory.
"""

import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

from ray import serve

from deployments import scratch
from deployments.artifacts import ArtifactStore, fresh
from deployments.engines import Optimiser, Session, make
from deployments.logs import Log, log_of
from deployments.messages import Message
from deployments.metrics import DeviceMetrics, StageMetrics
from deployments.running import Worker, out_of_device_memory

AFFINITY = {"request_router_class": "deployments.affinity.WarmFirst"}


@serve.deployment(
    name="Nvdiffrec",
    max_ongoing_requests=1,
    max_queued_requests=-1,
    graceful_shutdown_timeout_s=60,
    health_check_period_s=3,
    ray_actor_options={"num_gpus": 1},
    request_router_config=AFFINITY,
)
class Nvdiffrec:
    def __init__(self, store_url: str, engine: str, engine_args: dict[str, Any]) -> None:
        self.store = ArtifactStore(store_url)
        self.worker = Worker()
        self.engine: Optimiser = self.worker.made(partial(make, engine, **engine_args))
        self.metrics = StageMetrics("optimise")
        self.device = DeviceMetrics()
        self.slice_s = 8.0
        self.warm_jobs = 1
        self.warm: OrderedDict[str, tuple[str, Session]] = OrderedDict()  # job → (sha256 of its checkpoint, session)

    def reconfigure(self, config: dict[str, Any]) -> None:
        self.slice_s = min(10.0, float(config.get("slice_s", self.slice_s)))
        self.warm_jobs = int(config.get("warm_jobs", self.warm_jobs))
        self.worker.stall_s = float(config.get("stall_s", self.worker.stall_s))

    def check_health(self) -> None:
        self.worker.check_health()

    async def slice(self, call: dict[str, Any]) -> AsyncIterator[Message]:
        """call: job_id, options, views, checkpoint?, initial?. Done: checkpoint, step, done, metrics, …"""
        async with aclosing(self.metrics.watch(self._run(self._slice, call), log_of(call["job_id"]))) as messages:
            async for message in messages:
                yield message

    async def finish(self, call: dict[str, Any]) -> AsyncIterator[Message]:
        """call as for slice, with the last checkpoint. Done: result (Ref), facts."""
        async with aclosing(self._run(self._finish, call)) as messages:
            async for message in messages:
                yield message

    def _run(self, work: Any, call: dict[str, Any]) -> AsyncGenerator[Message, None]:
        return self.worker.run(
            lambda progress, cancelled: work(call, progress, cancelled),
            job_id=call["job_id"],
            on_memory=self._forget,
        )

    def _slice(self, call: dict[str, Any], progress: Any, cancelled: Any) -> dict[str, Any]:
        job_id, started = call["job_id"], time.monotonic()
        with scratch.workdir("slice") as workdir:
            session, metrics, resumed = self._advance(call, workdir, progress, cancelled)
            step, done = session.step, session.done
            with ThreadPoolExecutor(1) as beside:
                key = fresh(f"jobs/{job_id}/checkpoints", f"{step:08d}")
                saving = beside.submit(self.store.create, session.checkpoint(), key)
                shown = self._show(job_id, session, workdir / "preview.png")
                intact = done or self._go_on(session, saving, progress, cancelled, log_of(job_id))
                ref = saving.result()
            if intact:
                self._keep(job_id, ref.sha256, session)
            else:
                self._forget()
            self.device.record(self.engine.memory())
            return {
                "checkpoint": ref.json(),
                "step": step,
                "steps": session.steps,
                "done": done,
                "look_again": session.look_again,
                "metrics": metrics,
                "preview": shown,
                "smaller": bool(call.get("smaller")),
                "resumed": resumed,
                "seconds": time.monotonic() - started,
            }

    def _go_on(self, session: Session, saving: Future[Any], progress: Any, cancelled: Any, log: Log) -> bool:
        """While its checkpoint is written; False if the device's memory ran out, which is the next slice's to mend."""
        try:
            session.go_on(saving.done, progress, cancelled)
        except Exception as error:
            if not out_of_device_memory(error):
                raise
            log.warning(f"out of memory beside the writing of a checkpoint: {error}")
            return False
        return True

    def _show(self, job_id: str, session: Session, file: Path) -> dict[str, Any] | None:
        if not session.preview(file):
            return None
        return self.store.put(file, fresh(f"jobs/{job_id}/previews", f"{session.step:08d}.png"), move=True).json()

    def _advance(self, call: dict[str, Any], workdir: Path, *given: Any) -> tuple[Session, dict[str, float], bool]:
        """One slice; when the device's memory runs out, once more with less, from the checkpoint."""
        try:
            session, resumed = self._session(call, workdir)
            return session, session.advance(self.slice_s, *given), resumed
        except Exception as error:
            if not out_of_device_memory(error) or call.get("smaller"):
                raise
            log_of(call["job_id"]).warning(f"out of memory; once more with less: {error}")
        # Only here: until its except block ends, the error keeps what filled the device.
        session = None
        self._forget()
        call["smaller"] = True
        session, resumed = self._session(call, workdir)
        return session, session.advance(self.slice_s, *given), resumed

    def _finish(self, call: dict[str, Any], progress: Any, cancelled: Any) -> dict[str, Any]:
        started = time.monotonic()
        with scratch.workdir("finish") as workdir:
            session, resumed = self._session(call, workdir)
            out = workdir / "result.safetensors"
            given = {"initial": self._initial(call, workdir)} if call.get("initial") else {}
            facts = session.finish(out, progress, cancelled, **given)
            ref = self.store.put(out, fresh(f"jobs/{call['job_id']}", "result.safetensors"), move=True)
            self.warm.pop(call["job_id"], None)
            return {"result": ref.json(), "facts": facts, "resumed": resumed, "seconds": time.monotonic() - started}

    def _session(self, call: dict[str, Any], workdir: Path) -> tuple[Session, bool]:
        """The warm session if it is at the call's checkpoint, else a new one; and whether a checkpoint was loaded."""
        checkpoint, smaller = call.get("checkpoint"), bool(call.get("smaller"))
        at, session = self.warm.pop(call["job_id"], ("", None))
        if session is not None and checkpoint is not None and at == checkpoint["sha256"]:
            return session, False
        del session
        self._make_room()
        views = self.store.fetch(call["views"], workdir)
        if checkpoint is not None:
            saved = self.store.fetch(checkpoint, workdir, "saved")
            return self.engine.load(views, call["options"], saved, smaller=smaller), True
        return self.engine.start(views, call["options"], self._initial(call, workdir), smaller=smaller), False

    def _initial(self, call: dict[str, Any], workdir: Path) -> Path | None:
        return self.store.fetch(call["initial"], workdir, "initial") if call.get("initial") else None

    def _keep(self, job_id: str, sha256: str, session: Session) -> None:
        self.warm[job_id] = (sha256, session)
        while len(self.warm) > max(0, self.warm_jobs):
            self.warm.popitem(last=False)

    def _make_room(self) -> None:
        while self.warm and len(self.warm) >= max(1, self.warm_jobs):
            self.warm.popitem(last=False)
            self.engine.release()

    def _forget(self) -> None:
        self.warm.clear()
        self.engine.release()
