"""What an owner may have: so many jobs at once, and so many bytes sent in a day, those of deleted jobs too.

Asked in the transaction that accepts a job, which is one at a time: two requests that ask beside each other would both
find room for one.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from serve_app.database import jobs, spent
from serve_app.schemas import ACTIVE

DAY_S = 86400.0  # for so long an upload counts


@dataclass(frozen=True)
class Quota:
    """None: any number."""

    active_jobs: int | None = None
    upload_bytes_per_day: int | None = None


class TooManyJobs(Exception):
    """The owner has as many jobs waiting or running as the owner may have."""


class TooMuchSent(Exception):
    """With this job the owner would have sent more in a day than the owner may."""


def check(connection: sa.Connection, owner: str, input_bytes: int, quota: Quota) -> None:
    """Raises TooManyJobs or TooMuchSent where a job of so many bytes is one too many."""
    if quota.active_jobs is not None:
        active = sa.select(sa.func.count()).where(jobs.c.owner == owner, jobs.c.state.in_(ACTIVE))
        if connection.execute(active).scalar_one() >= quota.active_jobs:
            raise TooManyJobs(owner)
    most = quota.upload_bytes_per_day
    if most is not None and input_bytes > 0 and sent(connection, owner, time.time()) + input_bytes > most:
        raise TooMuchSent(owner)  # an export, which sends nothing, is none too many


def sent(connection: sa.Connection, owner: str, now: float, *, but: str = "") -> int:
    """Bytes of the owner's inputs of the last 24 hours, without those of the job `but`."""

    def of(table: sa.Table, *where: sa.ColumnElement[bool]) -> int:
        bytes_ = sa.select(sa.func.coalesce(sa.func.sum(table.c.input_bytes), 0))
        return int(
            connection.execute(bytes_.where(table.c.owner == owner, table.c.created > now - DAY_S, *where)).scalar_one()
        )

    return of(jobs, jobs.c.id != but) + of(spent)


def charge(connection: sa.Connection, owner: str, sent_bytes: int, now: float) -> None:
    """What was sent and became no job."""
    connection.execute(sa.insert(spent).values(owner=owner, created=now, input_bytes=sent_bytes))


def remember(connection: sa.Connection, job_ids: Sequence[str], now: float) -> None:
    """What these jobs were sent today; before they are deleted, which does not give the day's bytes back."""
    columns = ("owner", "created", "input_bytes")
    young = sa.select(*(jobs.c[name] for name in columns)).where(jobs.c.id.in_(job_ids), jobs.c.created > now - DAY_S)
    connection.execute(sa.insert(spent).from_select(columns, young))
    connection.execute(sa.delete(spent).where(spent.c.created <= now - DAY_S))
