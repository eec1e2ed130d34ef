"""Jobs as the service sees them: rows that are accepted, move between states, write events and end exactly once.

Every change of a job and the event that tells of it are one transaction, and every change is guarded by the state it
starts from, so a step that runs twice (its first run was lost with its process) changes nothing the second time.
"""

import functools
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from serve_app import quotas, tallies
from serve_app.database import artifacts, await_database, create_tables, engine_of, events, inputs, jobs, lock_inputs
from serve_app.lease import look
from serve_app.quotas import Quota
from serve_app.schemas import ACTIVE, TERMINAL, media_type


class DifferentRequest(Exception):
    """The idempotency key was used before, for a request with another body."""


class InputGone(Exception):
    """A deduplicated input was deleted between its upload and the job's acceptance: the upload must be repeated."""


@dataclass(frozen=True)
class NewJob:
    """A job that asks to be accepted."""

    id: str
    owner: str
    kind: str
    model: str
    options: dict[str, Any]
    inputs: dict[str, Any]  # {name: Ref.json()}
    request_hash: str
    parent: str | None = None
    webhook: str | None = None
    result: dict[str, Any] | None = None  # an export's source; of a reconstruction, the facts known before it runs


Row = dict[str, Any]
Enqueue = Callable[[sa.Connection, str, str, str], None]

# Statements that every job needs many times are built once: building one, and asking whether it was compiled before,
# takes longer than SQLite needs for it. Parameters that are no columns end in an underscore.
JOB = jobs.c.id == sa.bindparam("job_")
WHOLE_ROW = sa.select(jobs).where(JOB)
STATE = sa.select(jobs.c.state).where(JOB)
TIMINGS = sa.select(jobs.c.timings, jobs.c.state).where(JOB)
SET = sa.update(jobs).where(JOB)  # what the parameters say
FURTHER = jobs.c.percent < sa.bindparam("percent_")
NEW_EVENT, NEW_ARTIFACT = sa.insert(events), sa.insert(artifacts)
OWNED = WHOLE_ROW.where(jobs.c.owner == sa.bindparam("owner_"))
FILES = sa.select(artifacts).where(artifacts.c.job_id == sa.bindparam("job_")).order_by(artifacts.c.name)
BEFORE_IT = sa.select(sa.func.count()).where(
    jobs.c.state == "queued", jobs.c.model == sa.bindparam("model_"), jobs.c.created < sa.bindparam("created_")
)
HEADS = sa.select(jobs.c.id, jobs.c.seq).where(jobs.c.id.in_(sa.bindparam("jobs_", expanding=True)))
TOLD = (
    sa.select(events)
    .where(events.c.job_id == sa.bindparam("job_"), events.c.seq > sa.bindparam("after_"))
    .order_by(events.c.seq)
    .limit(sa.bindparam("limit_"))
)


def new_id() -> str:
    """A UUID of version 7: sorts by time, says nothing else."""
    stamp = int(time.time() * 1000).to_bytes(6, "big")
    raw = bytearray(stamp + uuid.uuid4().bytes[6:])
    raw[6] = (raw[6] & 0x0F) | 0x70
    raw[8] = (raw[8] & 0x3F) | 0x80
    return str(uuid.UUID(bytes=bytes(raw)))


def id_of_key(owner: str, key: str) -> str:
    """The job id of an Idempotency-Key: the same key of the same owner is the same job."""
    return str(uuid.uuid5(uuid.UUID("5b0f7f5c-6f0e-5f5e-9d39-5f1f7a1f0a11"), f"{owner}\n{key}"))


class JobStore:
    """Queries and transitions. All methods block; an event loop calls them in a thread."""

    def __init__(self, url: str, *, pool_size: int = 10) -> None:
        self.engine = engine_of(url, pool_size=pool_size)
        self.on_end: Callable[[sa.Connection, str], None] | None = None  # for jobs with a webhook, in the transaction

    def create(self) -> None:
        """Waits for the database, and makes the tables that are not there."""
        await_database(self.engine)
        create_tables(self.engine)

    def close(self) -> None:
        self.engine.dispose()

    # --- accepting -------------------------------------------------------------------------------------------------

    def accept(
        self,
        job: NewJob,
        enqueue: Enqueue,
        *,
        quota: Quota = Quota(),
        missing: Callable[[list[str]], list[str]] = lambda keys: [],
    ) -> tuple[Row, bool]:
        """Inserts the job, its first event and its workflow at once. Returns the row and whether it is new. missing: of
        keys those that are not in the store; asked while nobody can delete an input.

        Raises DifferentRequest, TooManyJobs, TooMuchSent, InputGone.
        """
        keys = sorted({ref["key"] for ref in job.inputs.values()})
        input_bytes = sum(ref["size"] for ref in job.inputs.values())
        with self.engine.begin() as connection:
            lock_inputs(connection)
            known = _one(connection, WHOLE_ROW, job_=job.id)
            if known is not None:
                if known["owner"] != job.owner or known["request_hash"] != job.request_hash:
                    raise DifferentRequest(job.id)
                return known, False
            quotas.check(connection, job.owner, input_bytes, quota)
            if gone := missing(keys):
                raise InputGone(gone[0])
            now = time.time()
            row = {
                "id": job.id,
                "owner": job.owner,
                "kind": job.kind,
                "parent": job.parent,
                "model": job.model,
                "state": "queued",
                "step": 0,
                "steps": 0,
                "percent": 0.0,
                "created": now,
                "options": job.options,
                "inputs": job.inputs,
                "input_bytes": input_bytes,
                "request_hash": job.request_hash,
                "timings": {},
                "resumes": 0,
                "webhook": job.webhook,
                "result": job.result,
                "seq": 1,
            }
            connection.execute(sa.insert(jobs).values(row))
            if keys:
                connection.execute(sa.insert(inputs), [{"job_id": job.id, "key": key} for key in keys])
            _add_events(connection, job.id, 1, "state", [{"state": "queued"}])
            enqueue(connection, job.id, job.kind, job.model)
            return _one(connection, WHOLE_ROW, job_=job.id) or row, True

    # --- reading ---------------------------------------------------------------------------------------------------

    def get(self, job_id: str, owner: str | None = None) -> Row | None:
        with self.engine.connect() as connection:
            row = _one(connection, WHOLE_ROW, job_=job_id)
        return row if row is None or owner in (None, row["owner"]) else None

    def state(self, job_id: str) -> str | None:
        with self.engine.connect() as connection:
            return connection.execute(STATE, {"job_": job_id}).scalar_one_or_none()

    def view(self, job_id: str, owner: str) -> tuple[Row, list[Row], int | None] | None:
        """The job, its artifacts and its place in the queue, in one go."""
        with self.engine.connect() as connection:
            row = _one(connection, OWNED, job_=job_id, owner_=owner)
            if row is None:
                return None
            if row["state"] == "queued":
                place = {"model_": row["model"], "created_": row["created"]}
                return row, [], connection.execute(BEFORE_IT, place).scalar_one()
            return row, _all(connection, FILES, job_=job_id), None

    def page(
        self, owner: str, *, state: str | None = None, limit: int = 20, before: tuple[float, str] | None = None
    ) -> list[Row]:
        """Newest first; `before` is the (created, id) of the last job seen."""
        query = sa.select(jobs).where(jobs.c.owner == owner)
        if state is not None:
            query = query.where(jobs.c.state == state)
        if before is not None:
            created, job_id = before
            query = query.where((jobs.c.created < created) | ((jobs.c.created == created) & (jobs.c.id < job_id)))
        with self.engine.connect() as connection:
            return _all(connection, query.order_by(jobs.c.created.desc(), jobs.c.id.desc()).limit(limit))

    def artifact(self, job_id: str, name: str) -> Row | None:
        query = sa.select(artifacts).where(artifacts.c.job_id == job_id, artifacts.c.name == name)
        with self.engine.connect() as connection:
            return _one(connection, query)

    def artifacts(self, job_ids: list[str]) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {job_id: [] for job_id in job_ids}
        query = sa.select(artifacts).where(artifacts.c.job_id.in_(job_ids)).order_by(artifacts.c.name)
        with self.engine.connect() as connection:
            for row in _all(connection, query):
                found[row["job_id"]].append(row)
        return found

    def events(self, job_id: str, after: int = 0, limit: int = 500) -> list[Row]:
        with self.engine.connect() as connection:
            return _all(connection, TOLD, job_=job_id, after_=after, limit_=limit)

    def family(self, job_id: str) -> list[str]:
        """The ids of a job and of its exports."""
        with self.engine.connect() as connection:
            return _family(connection, job_id)

    def heads(self, job_ids: Iterable[str]) -> dict[str, int]:
        """How many events each of these jobs has; jobs that are gone are left out."""
        with self.engine.connect() as connection:
            return {row.id: row.seq for row in connection.execute(HEADS, {"jobs_": list(job_ids)})}

    def left_today(self, owner: str, job_id: str, quota: Quota) -> int | None:
        """Bytes that the owner may still send today for a job; None: any number. What a job that is there already was
        sent does not count: its request is repeated. Raises TooManyJobs where a new one would be."""
        with self.engine.connect() as connection:
            if connection.execute(STATE, {"job_": job_id}).scalar_one_or_none() is None:
                quotas.check(connection, owner, 0, quota)
            if quota.upload_bytes_per_day is None:
                return None
            return quota.upload_bytes_per_day - quotas.sent(connection, owner, time.time(), but=job_id)

    def charge(self, owner: str, sent_bytes: int) -> None:
        """Counts what was sent and became no job among the owner's bytes of today."""
        with self.engine.begin() as connection:
            quotas.charge(connection, owner, sent_bytes, time.time())

    def ping(self) -> None:
        with self.engine.connect() as connection:
            connection.execute(sa.select(jobs.c.id).limit(1)).first()

    # --- changing --------------------------------------------------------------------------------------------------

    def start(self, job_id: str) -> Row | None:
        """queued → running. None if the job is gone or over; a second call changes nothing."""
        with self.engine.begin() as connection:
            self._change(
                connection,
                job_id,
                ("queued",),
                {"state": "running", "started": time.time()},
                "state",
                {"state": "running"},
            )
            row = _one(connection, WHOLE_ROW, job_=job_id)
            return row if row is not None and row["state"] == "running" else None

    def progress(self, job_id: str, *, percent: float, data: dict[str, Any]) -> bool:
        """Records progress unless the job is not running or is further already (a repeated slice)."""
        values = {
            "stage": data["stage"],
            "step": data["step"],
            "steps": data["steps"],
            "percent": percent,
            "eta_s": data.get("eta_s"),
        }
        with self.engine.begin() as connection:
            return self._change(connection, job_id, ("running",), values, "progress", data, further=True)

    def preview(self, job_id: str, step: int, ref: dict[str, Any]) -> bool:
        """The picture of an intermediate state replaces the one before it; told once per step."""
        name = "preview.png"
        data = {"url": f"/v1/reconstructions/{job_id}/artifacts/{name}?step={step}", "step": step}
        with self.engine.begin() as connection:
            connection.execute(
                sa.update(jobs).where(jobs.c.id == job_id).values(seq=jobs.c.seq)
            )  # one writer from here
            told = sa.select(events.c.data).where(events.c.job_id == job_id, events.c.type == "preview")
            if any(row.data["step"] >= step for row in connection.execute(told)):
                return False
            if not self._change(connection, job_id, ("running",), {}, "preview", data):
                return False
            connection.execute(sa.delete(artifacts).where(artifacts.c.job_id == job_id, artifacts.c.name == name))
            connection.execute(NEW_ARTIFACT, {**ref, "job_id": job_id, "name": name, "media_type": media_type(name)})
            return True

    def stage_done(self, job_id: str, stage: str, seconds: float, **values: Any) -> None:
        """Records a stage's seconds, and whatever else it left on the job."""
        with self.engine.begin() as connection:
            row = _one(connection, TIMINGS, job_=job_id)
            if row is not None and row["state"] == "running":
                timings = {**row["timings"], stage: seconds}
                connection.execute(SET, {"job_": job_id, "timings": timings, **values})

    def change_model(self, job_id: str, model: str, options: dict[str, Any], because: str) -> None:
        """Another model goes on with a running job than the one that `auto` picked at first."""
        values = {"model": model, "options": options, "result": {"facts": {"chosen_because": because}}}
        with self.engine.begin() as connection:
            mine = (jobs.c.id == job_id) & (jobs.c.state == "running")
            connection.execute(sa.update(jobs).where(mine).values(values))

    def resumed(self, job_id: str) -> None:
        with self.engine.begin() as connection:
            connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(resumes=jobs.c.resumes + 1))
            tallies.add(connection, {("resumes", ""): 1})

    def succeed(self, job_id: str, files: list[dict[str, Any]], report: dict[str, Any], expires: float | None) -> bool:
        """running → succeeded, with its artifacts: all of them or none."""
        with self.engine.begin() as connection:
            lock = sa.update(jobs).where(jobs.c.id == job_id, jobs.c.state == "running").values(seq=jobs.c.seq)
            if connection.execute(lock).rowcount == 0:
                return False
            connection.execute(sa.delete(artifacts).where(artifacts.c.job_id == job_id))  # the preview
            rows = [{**file, "job_id": job_id, "media_type": media_type(file["name"])} for file in files]
            told = [
                {
                    "name": file["name"],
                    "bytes": file["size"],
                    "sha256": file["sha256"],
                    "url": f"/v1/reconstructions/{job_id}/artifacts/{file['name']}",
                }
                for file in files
            ]
            if rows:
                connection.execute(NEW_ARTIFACT, rows)
                self._change(connection, job_id, ("running",), {}, "artifact", *told)
            return self._end(connection, job_id, "succeeded", {"report": report, "percent": 100.0}, expires)

    def fail(self, job_id: str, error: dict[str, Any], expires: float | None) -> bool:
        with self.engine.begin() as connection:
            return self._end(connection, job_id, "failed", {"error": error}, expires)

    def cancel(self, job_id: str, expires: float | None) -> bool:
        """Whether the job is cancelled, now or before."""
        with self.engine.begin() as connection:
            if self._end(connection, job_id, "cancelled", {}, expires):
                return True
            return connection.execute(STATE, {"job_": job_id}).scalar_one_or_none() == "cancelled"

    def _end(
        self, connection: sa.Connection, job_id: str, state: str, values: dict[str, Any], expires: float | None
    ) -> bool:
        changed = self._change(
            connection,
            job_id,
            ACTIVE,
            {"state": state, "finished": time.time(), "expires": expires, "eta_s": None, **values},
            "state",
            {"state": state},
        )
        if changed:
            if state != "succeeded":  # its files are removed, so that the preview's would not be found
                connection.execute(sa.delete(artifacts).where(artifacts.c.job_id == job_id))
            row = _one(connection, WHOLE_ROW, job_=job_id)
            assert row is not None
            done: dict[str, Any] = {"state": state}
            if row["error"]:
                done["error"] = row["error"]
            self._change(connection, job_id, (state,), {}, "done", done)
            tallies.add(connection, tallies.of_job(row))
            if row["webhook"] and self.on_end is not None:
                self.on_end(connection, job_id)
        return changed

    def _change(
        self,
        connection: sa.Connection,
        job_id: str,
        states: tuple[str, ...],
        values: dict[str, Any],
        kind: str,
        *told: dict[str, Any],
        further: bool = False,
    ) -> bool:
        """Sets the values and tells the events, if the job is in one of the states, and, if only what is `further` is
        wanted, has not come as many percent before."""
        given = {**values, "job_": job_id, "events_": len(told)}
        if further:
            given["percent_"] = values["percent"]
        last = connection.execute(_changing(states, further), given).scalar_one_or_none()
        if last is None:
            return False
        _add_events(connection, job_id, last - len(told) + 1, kind, told)
        return True

    # --- removing --------------------------------------------------------------------------------------------------

    def delete(self, job_id: str, owner: str | None, remove_inputs: Callable[[list[str]], None]) -> list[str] | None:
        """Forgets a job and its exports; removes inputs that no other job uses. Returns the ids removed."""
        with self.engine.begin() as connection:
            lock_inputs(connection)
            where = jobs.c.id == job_id if owner is None else sa.and_(jobs.c.id == job_id, jobs.c.owner == owner)
            if _one(connection, sa.select(jobs.c.id).where(where)) is None:
                return None
            ids = _family(connection, job_id)
            keys = {row.key for row in connection.execute(sa.select(inputs.c.key).where(inputs.c.job_id.in_(ids)))}
            for table in (events, artifacts, inputs):
                connection.execute(sa.delete(table).where(table.c.job_id.in_(ids)))
            quotas.remember(connection, ids, time.time())
            connection.execute(sa.delete(jobs).where(jobs.c.id.in_(ids)))
            remove_inputs(_unused(connection, keys))
            return ids

    def expired(self, now: float, after: str = "", limit: int = 100) -> list[str]:
        """Jobs whose time is over and that of their exports, by id, from the one that comes next after `after`."""
        over = (jobs.c.expires < now, jobs.c.state.in_(TERMINAL), jobs.c.id > after)
        exports = jobs.alias()
        kept = exports.c.expires.is_(None) | (exports.c.expires >= now)  # a job that is not over has no time yet
        needed = sa.exists().where(exports.c.parent == jobs.c.id, kept)
        query = sa.select(jobs.c.id).where(*over, ~needed).order_by(jobs.c.id).limit(limit)
        with self.engine.connect() as connection:
            return [row.id for row in connection.execute(query)]

    def ids(self, states: tuple[str, ...], *, older_than_s: float) -> list[str]:
        query = sa.select(jobs.c.id).where(jobs.c.state.in_(states), jobs.c.created < time.time() - older_than_s)
        with self.engine.connect() as connection:
            return [row.id for row in connection.execute(query)]

    def with_files(self, job_ids: list[str]) -> set[str]:
        """Those among these that have files or may get some: not the ones that failed or were cancelled."""
        return self._among(job_ids, jobs.c.id, jobs.c.state.in_((*ACTIVE, "succeeded")))

    def drop_unused_inputs(self, keys: list[str], remove_inputs: Callable[[list[str]], None]) -> None:
        used = self._among(keys, inputs.c.key)  # before the lock, which keeps new jobs waiting
        unused = [key for key in keys if key not in used]
        for start in range(0, len(unused), 50):  # so long, and no longer
            with self.engine.begin() as connection:
                lock_inputs(connection)
                remove_inputs(_unused(connection, unused[start : start + 50]))

    def _among(self, values: list[str], column: sa.Column[str], *where: Any) -> set[str]:
        """Which of these values the column has: asked in parts, as databases take only so many parameters."""
        found: set[str] = set()
        with self.engine.connect() as connection:
            for start in range(0, len(values), 500):
                these = column.in_(values[start : start + 500])
                found.update(connection.execute(sa.select(column).where(these, *where)).scalars())
        return found

    # --- figures ---------------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, Any]:
        """What /metrics shows: the same from every process."""
        by_state = sa.select(jobs.c.state, jobs.c.model, sa.func.count()).where(jobs.c.state.in_(ACTIVE))
        oldest = sa.select(sa.func.min(jobs.c.created)).where(jobs.c.state == "queued")
        with self.engine.connect() as connection:
            return {
                "active": [tuple(row) for row in connection.execute(by_state.group_by(jobs.c.state, jobs.c.model))],
                "oldest": connection.execute(oldest).scalar_one_or_none(),
                "tallies": tallies.sums(connection),
                "lease": look(connection),
            }


@functools.cache
def _changing(states: tuple[str, ...], further: bool) -> Any:
    where = (JOB, jobs.c.state.in_(states), *([FURTHER] if further else []))
    return sa.update(jobs).where(*where).values(seq=jobs.c.seq + sa.bindparam("events_")).returning(jobs.c.seq)


def _add_events(connection: sa.Connection, job_id: str, first: int, kind: str, told: Sequence[dict[str, Any]]) -> None:
    now = time.time()
    connection.execute(
        NEW_EVENT,
        [{"job_id": job_id, "seq": seq, "at": now, "type": kind, "data": data} for seq, data in enumerate(told, first)],
    )


def _unused(connection: sa.Connection, keys: Iterable[str]) -> list[str]:
    """Those among these inputs that no job has."""
    used = sa.select(inputs.c.key).where(inputs.c.key == sa.bindparam("key_")).limit(1)
    return [key for key in keys if _one(connection, used, key_=key) is None]


def _family(connection: sa.Connection, job_id: str) -> list[str]:
    query = sa.select(jobs.c.id).where((jobs.c.id == job_id) | (jobs.c.parent == job_id))
    return [row.id for row in connection.execute(query)]


def _one(connection: sa.Connection, query: Any, **given: Any) -> Row | None:
    row = connection.execute(query, given).mappings().first()
    return None if row is None else dict(row)


def _all(connection: sa.Connection, query: Any, **given: Any) -> list[Row]:
    return [dict(row) for row in connection.execute(query, given).mappings()]
