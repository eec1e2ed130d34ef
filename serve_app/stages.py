"""The steps of a job: call a deployment, pass its progress on, try again when a replica was lost, record what came out.

It knows the deployments' handles and the job store; it does not know in which order a job goes through them.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import ray.exceptions
from ray.serve import exceptions as serve_exceptions

from deployments.artifacts import ArtifactStore
from deployments.logs import log_of
from deployments.messages import Done, Failed, Progress
from serve_app.jobs import JobStore
from serve_app.models import MODELS
from serve_app.seats import Seats
from viewmesh.choose import after_no_poses
from viewmesh.errors import MissingModel, PoseError, ViewmeshError
from viewmesh.weights.ready import Readiness

Json = dict[str, Any]

LOST = (
    ray.exceptions.ActorDiedError,
    ray.exceptions.ActorUnavailableError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.ActorUnschedulableError,
)
BUSY = (serve_exceptions.BackPressureError, serve_exceptions.DeploymentUnavailableError)

MAX_LOSSES = 6  # of one step, without progress between them: then the job itself is what kills its workers
MAX_DEVICE_LOSSES = 3
MAX_WAIT_S = 1800.0  # for a deployment that is not there

SPANS = {  # of the percent, by the kind of model
    "optimiser": {"prepare": (0, 6), "optimise": (6, 88), "finish": (88, 93), "export": (93, 99)},
    "generator": {
        "prepare": (0, 6),
        "generate": (6, 50),
        "optimise": (50, 88),
        "pose": (80, 85),  # after an optimisation that found no place for its mesh; another one follows
        "finish": (88, 93),
        "export": (93, 99),
    },
    "export": {"export": (0, 99)},
}


class Calls:
    """workflow.Stages on Serve handles."""

    def __init__(
        self,
        store: JobStore,
        artifacts: ArtifactStore,
        preprocessor: Any,
        exporter: Any,
        models: dict[str, Any],
        seats: Seats,
        retention_s: float | None,
        broken: Callable[[], Awaitable[dict[str, Readiness]]],
    ) -> None:
        self.store = store
        self.artifacts = artifacts
        self.preprocessor = preprocessor
        self.exporter = exporter
        self.models = models
        self.seats = seats
        self.retention_s = retention_s
        self.broken = broken  # models without a worker, and why
        self.running: dict[str, Any] = {}  # job → the response generator of its call

    def stop(self, job_id: str) -> bool:
        """Stops the job's running call, if there is one in this process."""
        response = self.running.get(job_id)
        if response is not None:
            response.cancel()
        return response is not None

    # --- the steps -------------------------------------------------------------------------------------------------

    async def begin(self, job_id: str) -> Json:
        row = await self._database(self.store.get, job_id)
        if row is not None and row["kind"] != "export":
            await self._take_seat(row, row["model"])
        row = await self._database(self.store.start, job_id)
        if row is None:
            return {}
        kind = "export" if row["kind"] == "export" else MODELS[row["model"]].kind
        keys = ("id", "created", "model", "options", "inputs", "result")
        return {**{key: row[key] for key in keys}, "kind_of_model": kind}

    async def prepare(self, job: Json) -> Json:
        """With "job" in it what changed about the job: `auto` goes on with trellis where no cameras were found."""
        made = await self._prepare(job)
        if made.get("failed", {}).get("code") != PoseError.code or not self._left_to_auto(job):
            return made
        if "trellis" in (broken := await self.broken()):
            error = made["failed"]
            hint = f"{error['hint']} The model trellis needs no cameras. {broken['trellis'].reason}"
            return {"failed": {**error, "hint": hint.strip()}}
        choice = after_no_poses(made["failed"]["message"])
        options = {**job["options"], "model": choice.model}
        await self._database(self.store.change_model, job["id"], choice.model, options, choice.because)
        changed = {"model": choice.model, "options": options, "kind_of_model": MODELS[choice.model].kind}
        return {**await self._prepare({**job, **changed}), "job": changed}

    async def _prepare(self, job: Json) -> Json:
        await self._take_seat(job, job["model"])
        call = {"job_id": job["id"], "options": job["options"], "inputs": job["inputs"]}
        return await self._call(job, "prepare", self.preprocessor, "prepare", call)

    def _left_to_auto(self, job: Json) -> bool:
        facts = (job["result"] or {}).get("facts", {})
        return bool(facts.get("chosen_because")) and job["model"] == "nvdiffrec" and "trellis" in self.models

    async def generate(self, job: Json, views: Json) -> Json:
        await self._take_seat(job, job["model"])
        call = {"job_id": job["id"], "options": job["options"], "views": views}
        return await self._call(job, "generate", self.models.get(job["model"]), "generate", call)

    async def pose(self, job: Json) -> Json:
        """Views with cameras from structure from motion; where they cannot be had the job goes on without them, and
        facts.reason says why."""
        call = {"job_id": job["id"], "options": job["options"], "inputs": job["inputs"]}
        made = await self._call(job, "pose", self.preprocessor, "pose", call)
        failed = made.get("failed")
        return made if failed is None or failed["code"] == "cancelled" else {"facts": {"reason": failed["message"]}}

    async def slice(self, job: Json, views: Json, checkpoint: Json | None, initial: Json | None, smaller: bool) -> Json:
        call = {
            "job_id": job["id"],
            "options": job["options"],
            "views": views,
            "checkpoint": checkpoint,
            "initial": initial,
            "smaller": smaller,
        }
        await self._take_seat(job, "nvdiffrec")
        made = await self._call(job, "optimise", self.models.get("nvdiffrec"), "slice", call)
        if "failed" not in made:
            if made.get("resumed"):
                log_of(job["id"]).info(f"optimise went on from its checkpoint at step {made['step']} elsewhere")
                await self._database(self.store.resumed, job["id"])
            if made.get("preview"):
                await self._database(self.store.preview, job["id"], made["step"], made["preview"])
        return made

    async def finish(
        self, job: Json, views: Json, checkpoint: Json, smaller: bool, initial: Json | None = None
    ) -> Json:
        call = {
            "job_id": job["id"],
            "options": job["options"],
            "views": views,
            "checkpoint": checkpoint,
            "initial": initial,
            "smaller": smaller,
        }
        await self._take_seat(job, "nvdiffrec")
        return await self._call(job, "finish", self.models.get("nvdiffrec"), "finish", call)

    async def export(self, job: Json, views: Json | None, result: Json, facts: Json) -> Json:
        self.seats.leave(job["id"])
        facts = {**((job["result"] or {}).get("facts") or {}), **facts}
        row = await self._database(self.store.get, job["id"])
        call = {
            "job_id": job["id"],
            "options": job["options"],
            "views": views,
            "result": result,
            "facts": {**facts, "seconds": row["timings"] if row is not None else {}},
        }
        source = {"views": views, "result": result, "facts": facts}  # of other exports of this job
        return await self._call(job, "export", self.exporter, "export", call, result=source)

    async def succeed(self, job: Json, done: Json) -> Json:
        report = done["report"]
        await self._database(self.store.succeed, job["id"], done["artifacts"], report, self._expires())
        for folder in ("checkpoints", "previews"):
            await self._tidy(f"jobs/{job['id']}/{folder}")
        return {}

    async def fail(self, job_id: str, error: Json) -> Json:
        if error["code"] != "cancelled":
            await self._database(self.store.fail, job_id, error, self._expires())
        await self._tidy(f"jobs/{job_id}")
        return {}

    async def tidy_unwanted(self, job_id: str) -> None:
        """Removes the files of a job that was cancelled or deleted. What a worker still writes is left to the sweep."""
        row = await self._database(self.store.get, job_id)
        if row is None or row["state"] == "cancelled":
            await self._tidy(f"jobs/{job_id}")

    async def drop_checkpoint(self, job: Json, checkpoint: Json) -> None:
        await self._tidy(checkpoint["key"].rsplit("/", 1)[0])

    async def _take_seat(self, job: Json, model: str) -> None:
        # What an earlier version began does not say when it was accepted: it is older than all that wait.
        await self.seats.take(job["id"], model, job.get("created", 0.0))

    def _expires(self) -> float | None:
        return None if self.retention_s is None else time.time() + self.retention_s

    # --- calling ---------------------------------------------------------------------------------------------------

    async def _call(self, job: Json, stage: str, handle: Any, method: str, call: Json, **left: Any) -> Json:
        """The Done value of one call, or {"failed": …}. Replicas that die are replaced by others, with patience.

        handle: None of a model that was served when the job was accepted, and is no longer. left: what the job's row
        shall have once the stage is done.
        """
        if handle is None:
            return _failed(
                MissingModel.code,
                f"The stage {stage} needs a model that this service no longer serves.",
                "Submit the job again with another model; GET /v1/models lists them.",
            )
        log, started = log_of(job["id"]), time.monotonic()
        if not call.get("checkpoint") or stage != "optimise":  # of the slices, the first
            log.info(f"{stage} began")
        made = await self._until_answered(job, stage, handle, method, call, left)
        if "failed" in made:
            log.warning(f"{stage} failed after {time.monotonic() - started:.2f} s: {made['failed']['code']}")
        return made

    async def _until_answered(self, job: Json, stage: str, handle: Any, method: str, call: Json, left: Json) -> Json:
        log, started = log_of(job["id"]), time.monotonic()
        losses, device_losses, pause = 0, 0, 0.5
        while True:
            if not await self._wanted(job["id"]):
                return _failed("cancelled", "The job was cancelled.")
            try:
                message, progressed = await self._once(job, stage, handle, method, call)
            except LOST as error:
                losses += 1
                log.warning(f"{stage} lost its worker ({type(error).__name__}), attempt {losses}")
                if losses >= MAX_LOSSES:
                    return _failed(
                        "worker_lost",
                        f"The stage {stage} lost its worker {losses} times.",
                        "The workers may be short of memory; see the service's log.",
                    )
            except BUSY as error:
                if time.monotonic() - started > MAX_WAIT_S:
                    return _failed(
                        "no_worker",
                        f"No worker for the stage {stage} ({type(error).__name__}).",
                        "Look at the deployment in the Ray dashboard.",
                    )
            except (
                Exception
            ) as error:  # what a handle raises while its process or its deployment goes away is not one type
                losses += 1
                log.warning(f"{stage} could not be called, attempt {losses}", exc_info=error)
                if losses >= MAX_LOSSES:
                    return _failed("worker_lost", f"The stage {stage} could not be called.", "See the service's log.")
            else:
                if isinstance(message, Done):
                    seconds = await self._seconds(job, stage, message)
                    await self._database(self.store.stage_done, job["id"], stage, seconds, **left)
                    if message.value.get("done", True):  # of the slices, the last
                        log.info(f"{stage} done in {seconds:.2f} s")
                    return message.value
                if not message.retry:
                    return {"failed": message.json()}
                if message.code == "worker_unfit":  # nothing was tried: wait for its successor
                    if time.monotonic() - started > MAX_WAIT_S:
                        return {"failed": message.json()}
                else:
                    losses = 1 if progressed else losses + 1
                    device_losses += message.code == "device_lost"
                    if device_losses >= MAX_DEVICE_LOSSES or losses >= MAX_LOSSES:
                        return {"failed": message.json()}
            await asyncio.sleep(pause)
            pause = min(5.0, pause * 1.6)

    async def _once(self, job: Json, stage: str, handle: Any, method: str, call: Json) -> tuple[Done | Failed, bool]:
        """One attempt: the last message, and whether there was progress before it."""
        options = {"session_id": job["id"]} if method in ("slice", "finish") else {}
        response = handle.options(method_name=method, stream=True, **options).remote(call)
        self.running[job["id"]] = response
        begun, first, progressed = time.monotonic(), None, False
        try:
            async for message in response:
                if not isinstance(message, Progress):
                    return message, progressed
                if first is None:
                    first = (time.monotonic(), message.step)
                progressed = True
                await self._tell(job, stage, message, begun if message.step == first[1] else first[0], first[1])
            return Failed("internal_error", f"The stage {stage} ended without a result.", retry=True), progressed
        except (serve_exceptions.RequestCancelledError, ray.exceptions.TaskCancelledError):
            return Failed("cancelled", "The job was cancelled."), progressed
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, LOST):
                raise error.cause from error
            log_of(job["id"]).exception(f"{stage} raised")
            return Failed(
                "internal_error", f"The stage {stage} failed unexpectedly.", "See the service's log."
            ), progressed
        except asyncio.CancelledError:
            response.cancel()  # the workflow was cancelled: so must the work be
            raise
        finally:
            if self.running.get(job["id"]) is response:
                del self.running[job["id"]]

    async def _tell(self, job: Json, stage: str, message: Progress, since: float, from_step: int) -> None:
        low, high = SPANS[job["kind_of_model"]][stage]
        fraction = message.step / max(1, message.steps)
        data: Json = {"stage": stage, "step": message.step, "steps": message.steps, **message.metrics}
        percent = data["percent"] = round(low + (high - low) * fraction, 2)
        done = message.step - from_step
        if done > 0 and stage in ("optimise", "generate"):
            data["eta_s"] = round((time.monotonic() - since) / done * (message.steps - message.step), 1)
        try:
            await asyncio.to_thread(self.store.progress, job["id"], percent=percent, data=data)
        except Exception as error:  # progress is not worth a job
            log_of(job["id"]).warning(f"could not record progress: {error}")

    async def _seconds(self, job: Json, stage: str, message: Done) -> float:
        """Of the stage so far: slices add up. Apart from recording it, which may be repeated."""
        row = await self._database(self.store.get, job["id"]) if stage == "optimise" else None
        before = row["timings"].get(stage, 0.0) if row is not None else 0.0
        return round(before + message.value.get("seconds", 0.0), 3)

    async def _wanted(self, job_id: str) -> bool:
        return await self._database(self.store.state, job_id) == "running"

    async def _database(self, query: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A query that is repeated while the database is away: what was accepted is not given up for that."""
        return await patiently(lambda: asyncio.to_thread(query, *args, **kwargs))

    async def _tidy(self, key: str) -> None:
        try:
            await asyncio.to_thread(self.artifacts.remove, key)
        except ViewmeshError as error:  # the sweeper comes by again
            logging.getLogger("ray.serve").warning(f"could not remove {key}: {error}")


async def patiently(attempt: Callable[[], Awaitable[Any]], *, seconds: float = 120.0) -> Any:
    import sqlalchemy.exc as sql

    until, pause = time.monotonic() + seconds, 0.2
    while True:
        try:
            return await attempt()
        except (sql.OperationalError, sql.InterfaceError, sql.TimeoutError):
            if time.monotonic() > until:
                raise
            await asyncio.sleep(pause)
            pause = min(5.0, pause * 2)


def _failed(code: str, message: str, hint: str = "") -> Json:
    return {"failed": Failed(code, message, hint).json()}
