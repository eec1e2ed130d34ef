"""Conductor: the one replica that runs the workflows. It only awaits, so thousands of jobs fit.

When it dies, Serve starts it again and DBOS goes on with every workflow at its last finished step. Where there are two
(two clusters on one database, or one that was paused and replaced), one has the lease and runs the jobs; the other one
stands by, and takes over when the first has ended.
"""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray import serve

from deployments.artifacts import ArtifactStore, StoreError
from serve_app import workflow
from serve_app.auth import KeyRing
from serve_app.durable import DELIVERIES, EXPORTS, STOPPED, Runner, Workflows, queue_of, sleep, step
from serve_app.jobs import JobStore
from serve_app.lease import Lease
from serve_app.models import MODELS
from serve_app.replicas import Replicas
from serve_app.schemas import ACTIVE
from serve_app.seats import Seats
from serve_app.settings import AppArgs, ConductorConfig
from serve_app.stages import Calls
from serve_app.webhooks import PAUSES_S, deliver
from viewmesh.weights.ready import Readiness

log = logging.getLogger("ray.serve")
SWEEP_S = 30.0
ORPHAN_SWEEPS = 10  # among so many sweeps one lists the whole artifact store
ORPHAN_S = 3600.0
STANDBY_S = 0.5
DELIVERIES_AT_ONCE = 16
WAITING_DELIVERIES = 100_000  # asleep between attempts: a receiver that is away must keep nobody else's waiting
FAREWELL_S = 1.0  # for the cancelling of calls to leave the process


@serve.deployment(
    name="Conductor",
    num_replicas=1,
    max_ongoing_requests=1000,
    graceful_shutdown_timeout_s=5,
    health_check_period_s=3,
    health_check_timeout_s=10,
    ray_actor_options={"num_cpus": 0.1},
    user_config={},  # without one Serve would not call reconfigure, which gives the seats out
)
class Conductor:
    async def __init__(self, args: dict[str, Any], preprocessor: Any, exporter: Any, models: dict[str, Any]) -> None:
        self.args = AppArgs(**args)
        self.store = JobStore(self.args.database_url(), pool_size=20)
        await asyncio.to_thread(self.store.create)
        self.artifacts = await asyncio.to_thread(ArtifactStore, self.args.artifacts_url())
        self.keys = KeyRing(self.args.auth.keys_file)
        self.config = ConductorConfig()
        self.models, self.replicas, self.seats = models, Replicas(self.held), Seats()
        self.delivering = asyncio.Semaphore(DELIVERIES_AT_ONCE)
        self.calls = Calls(
            self.store,
            self.artifacts,
            preprocessor,
            exporter,
            models,
            self.seats,
            self.args.retention_s,
            self._broken,
        )
        self.runner = Runner(self.args.database_url(), self.store.engine)
        self.runner.register("reconstruction", self._reconstruct)
        self.runner.register("export", self._export)
        self.runner.register("deliver", self._deliver)
        self.workflows = Workflows(self.store.engine)
        self.store.on_end = self.workflows.deliver
        self.loop = asyncio.get_running_loop()
        self.lease = Lease(self.args.database_url(), on_lost=self._abandon)
        self.lease.fence(self.store.engine)
        if await self._acquired():
            await self._lead()
        self.work = asyncio.create_task(self._work())

    async def _work(self) -> None:
        """Runs the jobs for as long as the lease is held, once it is."""
        if self.lease.epoch is None:
            log.info("another Conductor runs the jobs; this one stands by")
            while not await self._acquired():
                await asyncio.sleep(STANDBY_S)
            await self._lead()
        await self._sweep_for_ever()

    async def _acquired(self) -> bool:
        try:
            return await asyncio.to_thread(self.lease.acquire)
        except Exception as error:  # the database is away
            log.warning(f"could not ask for the lease: {type(error).__name__}: {error}")
            return False

    async def _lead(self) -> None:
        await self.runner.launch()
        await self._open_queues()

    async def _open_queues(self) -> None:
        """Twice as many workflows as there are seats: the others wait for one, or write their files.

        Each look at a queue costs some milliseconds of a core: those of models that are not served are rare.
        """
        queues = {
            queue_of("reconstruction", name): (2 * self.config.slots_of(name), 0.2 if name in self.models else 5.0)
            for name in MODELS
        }
        await self.runner.open({**queues, EXPORTS: (8, 0.5), DELIVERIES: (WAITING_DELIVERIES, 1.0)})

    def _abandon(self) -> None:
        """The lease is lost: another Conductor repeats what runs here. In a thread, the loop may be stuck."""
        for job_id in list(self.calls.running):
            with contextlib.suppress(RuntimeError):  # the loop has ended, and the calls with it
                self.loop.call_soon_threadsafe(self.calls.stop, job_id)
        if ray.is_initialized():  # else the graph is in somebody else's process, who asks check_health
            threading.Event().wait(FAREWELL_S)
            os._exit(1)

    async def reconfigure(self, config: dict[str, Any]) -> None:
        self.config = ConductorConfig.model_validate(config)
        self.seats.set(self.config.slots_of)
        if self.lease.epoch is not None:
            await self._open_queues()

    async def check_health(self) -> None:
        if self.lease.lost:
            raise RuntimeError("the Conductor has lost its lease")
        if self.work.done():
            raise RuntimeError("the Conductor's work has ended") from self.work.exception()

    async def ready(self) -> bool:
        return True

    async def stop(self, job_id: str) -> bool:
        """Stops the job's running call now, instead of when DBOS next looks for cancelled workflows."""
        return self.calls.stop(job_id)

    async def held(self) -> dict[str, dict[str, str]]:
        """By generative model: {}, or reason and hint where the worker that runs does not hold it. A worker that is
        scaled to zero is not woken for that."""
        found: dict[str, dict[str, str]] = {}
        seen = await self.replicas.seen()
        for name, handle in self.models.items():
            model = MODELS[name]
            asleep = model.deployment in seen and not seen[model.deployment].running
            if model.kind == "generator" and name not in found and not asleep:
                found |= await handle.held.remote()
        return found

    async def _broken(self) -> dict[str, Readiness]:
        return await self.replicas.broken(MODELS[name] for name in self.models)

    async def close(self) -> None:
        """For graphs inside one process: a replica just ends."""
        self.work.cancel()
        await asyncio.to_thread(self.runner.close)
        self.workflows.close()
        self.lease.release()  # here: DBOS has taken the loop's threads with it
        self.store.close()

    # --- workflows -------------------------------------------------------------------------------------------------

    async def _reconstruct(self, job_id: str) -> None:
        await self._guarded(workflow.reconstruct, job_id)

    async def _export(self, job_id: str) -> None:
        await self._guarded(workflow.export, job_id)

    async def _guarded(self, run: Any, job_id: str) -> None:
        try:
            await run(step, self.calls, job_id)
        except STOPPED:  # it takes no further step, which could tidy up
            if not self.lease.lost:
                await self.calls.tidy_unwanted(job_id)
            raise
        except Exception:
            if self.lease.lost:
                raise  # whoever has it now goes on with the job
            row = await asyncio.to_thread(self.store.get, job_id)
            if row is None or row["state"] not in ACTIVE:
                raise  # cancelled or deleted meanwhile
            log.exception(f"the workflow of {job_id} failed")
            await self.calls.fail(
                job_id,
                {
                    "code": "internal_error",
                    "message": "The job failed unexpectedly.",
                    "hint": "See the service's log.",
                    "details": {},
                },
            )
        finally:
            self.seats.leave(job_id)

    async def _deliver(self, job_id: str) -> None:
        for pause in PAUSES_S:
            if pause:
                await sleep(pause)
            if (await step("deliver", self._deliver_once, job_id))["over"]:
                return

    async def _deliver_once(self, job_id: str) -> dict[str, Any]:
        try:
            return {"over": await self._told(job_id)}
        except Exception:  # an error would end the workflow, and with it the later attempts
            log.exception(f"the webhook of {job_id} failed")
            return {"over": False}

    async def _told(self, job_id: str) -> bool:
        row = await asyncio.to_thread(self.store.get, job_id)
        if row is None or not row["webhook"]:
            return True
        secret = self.keys.webhook_secret(row["owner"]) or self.args.outbound.webhook_secret
        files = await asyncio.to_thread(self.store.artifacts, [job_id])
        async with self.delivering:
            return await deliver(row, files[job_id], secret, self.args.outbound)

    # --- housekeeping ----------------------------------------------------------------------------------------------

    async def _sweep_for_ever(self) -> None:
        for number in itertools.count():
            try:
                await asyncio.to_thread(self.sweep, orphans=number % ORPHAN_SWEEPS == 0)
            except Exception:
                log.exception("the sweep failed")
            await asyncio.sleep(SWEEP_S)

    def sweep(self, *, orphans: bool = True) -> None:
        """Deletes what has expired and what nobody refers to; ends jobs whose workflow has ended without telling."""
        self._reconcile()
        last = ""
        while ids := self.store.expired(time.time(), after=last):
            for last in ids:
                with self._one_file_aside():
                    forget(self.store, self.workflows, self.artifacts, last, None)
        if orphans:
            self._remove_orphans()

    def _remove_orphans(self) -> None:
        try:
            for key in self.artifacts.older_than("tmp", ORPHAN_S):
                self._remove(key)
            folders = self.artifacts.older_than("jobs", ORPHAN_S)
            kept = self.store.with_files([key.split("/")[1] for key in folders])
            for key in folders:
                if key.split("/")[1] not in kept:
                    self._remove(key)
            for shard in self.artifacts.older_than("inputs", 0):  # each: an upload makes its shard young, not its files
                self.store.drop_unused_inputs(self.artifacts.older_than(shard, ORPHAN_S), self._remove_inputs)
        except StoreError as error:
            log.warning(f"the sweep could not reach the artifact store: {error}")

    def _remove(self, key: str) -> None:
        self.lease.require()  # the store has no fence: what was an orphan before a pause may be in use
        with self._one_file_aside():
            self.artifacts.remove(key)

    def _remove_inputs(self, keys: list[str]) -> None:
        self.lease.require()
        with self._one_file_aside():
            self.artifacts.remove_files(keys)

    @contextlib.contextmanager
    def _one_file_aside(self) -> Iterator[None]:
        """A file that cannot be removed stays until the next sweep, and this one goes on. Raises StoreError where the
        whole store cannot be reached."""
        try:
            yield
        except StoreError as error:
            self.artifacts.exists("tmp")
            log.warning(f"left for the next sweep: {error}")

    def _reconcile(self) -> None:
        active = self.store.ids(ACTIVE, older_than_s=10)
        for start in range(0, len(active), 200):
            for job_id, state in self.workflows.over(active[start : start + 200]).items():
                row = self.store.get(job_id)  # the workflow may have told us since
                if row is None or row["state"] not in ACTIVE:
                    continue
                log.error(json.dumps({"job_id": job_id, "workflow": state, "message": "the workflow ended in silence"}))
                self.store.fail(
                    job_id,
                    {
                        "code": "internal_error",
                        "message": "The job's workflow ended unexpectedly.",
                        "hint": "See the service's log.",
                        "details": {},
                    },
                    self.calls._expires(),
                )


def forget(store: JobStore, workflows: Workflows, artifacts: ArtifactStore, job_id: str, owner: str | None) -> bool:
    """Deletes a job, its exports, their files and workflows. False if there is no such job of this owner."""
    ids = store.delete(job_id, owner, artifacts.remove_files)
    if ids is None:
        return False
    workflows.delete(ids)
    for gone in ids:
        artifacts.remove(f"jobs/{gone}")
    return True
