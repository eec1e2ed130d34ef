"""DBOS, and the only file that imports it: enqueueing, running, cancelling and forgetting workflows.

A job's id is its workflow's id. Values are stored as JSON, never pickled: who can write the database cannot run code.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import sqlalchemy as sa
from dbos import DBOS, DBOSClient, DBOSConfig, DBOSPortableJSONSerializer
from dbos import error as dbos_error

from deployments.logs import log_of
from serve_app.workflow import VERSION

APPLICATION = "viewmesh"
EXECUTOR = "conductor"  # fixed: a restarted Conductor takes over what the last one left
DELIVERIES = "webhooks"
EXPORTS = "export"
CANCELLED = (dbos_error.DBOSAwaitedWorkflowCancelledError, dbos_error.DBOSWorkflowCancelledError)
STOPPED = (*CANCELLED, dbos_error.DBOSWorkflowConflictIDError)  # cancelled, deleted, or another process has it
OVER = ("SUCCESS", "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED")


def queue_of(kind: str, model: str) -> str:
    return EXPORTS if kind == "export" else f"reconstruct-{model}"


class Workflows:
    """What any process may do with workflows, on the job store's own engine. All methods block."""

    def __init__(self, engine: sa.Engine) -> None:
        self.client = DBOSClient(
            system_database_engine=engine,
            serializer=DBOSPortableJSONSerializer(),
            application_name=APPLICATION,
            lazy=True,
        )

    def enqueue(self, connection: sa.Connection, job_id: str, kind: str, model: str) -> None:
        """Part of the caller's transaction: the job and its workflow are accepted together."""
        self._enqueue(connection, kind, queue_of(kind, model), job_id, job_id)

    def deliver(self, connection: sa.Connection, job_id: str) -> None:
        """Tells the job's webhook that it is over, as a workflow of its own. Part of the caller's transaction."""
        self._enqueue(connection, "deliver", DELIVERIES, f"{job_id}-webhook", job_id)

    def _enqueue(self, connection: sa.Connection, name: str, queue: str, workflow_id: str, job_id: str) -> None:
        self.client.enqueue_in_transaction(
            connection,
            {"workflow_name": name, "queue_name": queue, "workflow_id": workflow_id, "app_version": VERSION},
            job_id,
        )

    def cancel(self, job_id: str) -> None:
        self.client.cancel_workflow(job_id)

    def delete(self, job_ids: list[str]) -> None:
        for job_id in job_ids:
            self.client.delete_workflows([job_id, f"{job_id}-webhook"])

    def over(self, job_ids: list[str]) -> dict[str, str]:
        """The workflows among these that have ended, and how; a job without a workflow counts as `MISSING`."""
        found = {
            status.workflow_id: status.status
            for status in self.client.list_workflows(workflow_ids=job_ids, load_input=False, load_output=False)
        }
        states = {job_id: found.get(job_id, "MISSING") for job_id in job_ids}
        return {job_id: state for job_id, state in states.items() if state in (*OVER, "MISSING")}

    def ping(self) -> None:
        self.client.check_connection()

    def close(self) -> None:
        self.client.destroy()


async def step(name: str, work: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    """Runs `work` once per workflow and place; a cancelled workflow ends it."""
    return await DBOS.run_step_async({"name": name, "preemptible": True}, work, *args)


async def sleep(seconds: float) -> None:
    """A pause that outlives the process."""
    await DBOS.sleep_async(seconds)


def brief_about_cancelling(record: logging.LogRecord) -> bool:
    """For DBOS's logger: a cancelled workflow is one line of ours, not a warning that another process has it and a
    traceback. If another process has it, the lease has said so."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, CANCELLED):
        log_of(getattr(error, "workflow_id", "")).info("the workflow was cancelled")
        return False
    return "is no longer owned by this execution" not in str(record.msg)


class Runner:
    """Runs workflows in this process: the Conductor's half."""

    def __init__(self, url: str, engine: sa.Engine) -> None:
        config: DBOSConfig = {
            "name": APPLICATION,
            "system_database_url": url,
            "system_database_engine": engine,
            "serializer": DBOSPortableJSONSerializer(),
            "executor_id": EXECUTOR,
            "application_version": VERSION,
            "log_level": "WARNING",
            "notification_listener_polling_interval_sec": 1.0,
        }
        logger = logging.getLogger("dbos")
        logger.setLevel(logging.WARNING)
        logger.addFilter(brief_about_cancelling)  # once, however often
        self.dbos = DBOS(config=config)

    def register(self, name: str, workflow: Callable[[str], Awaitable[None]]) -> None:
        async def run(job_id: str) -> None:  # DBOS writes attributes on what it is given, which a method refuses
            await workflow(job_id)

        DBOS.workflow(name=name, max_recovery_attempts=1000)(run)

    async def launch(self) -> None:
        await asyncio.to_thread(DBOS.launch)

    async def open(self, queues: dict[str, tuple[int, float]]) -> None:
        """Takes workflows from these queues, so many at once, and looks for them so often (seconds); may be called
        again with other numbers."""
        for name, (at_once, every_s) in queues.items():
            await DBOS.register_queue_async(
                name, worker_concurrency=at_once, polling_interval_sec=every_s, on_conflict="always_update"
            )

    def close(self) -> None:
        DBOS.destroy(destroy_registry=True)
