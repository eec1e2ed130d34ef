"""The job database: one SQLAlchemy engine per process on SQLite or Postgres, shared by our tables and by DBOS's.

Our tables hold what a caller can see of a job (state, progress, events, artifacts); DBOS's hold how far its workflow
is. They lie in one database so that accepting a job and enqueueing its workflow is one transaction.
"""

import logging
import os
import time
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, OperationalError

from viewmesh.errors import OptionError

log = logging.getLogger("ray.serve")
metadata = sa.MetaData()

jobs = sa.Table(
    "viewmesh_jobs",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("owner", sa.String(64), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),  # reconstruction | export
    sa.Column("parent", sa.String(36)),  # an export's reconstruction
    sa.Column("model", sa.String(32), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("stage", sa.String(32)),
    sa.Column("step", sa.Integer, nullable=False, default=0),
    sa.Column("steps", sa.Integer, nullable=False, default=0),
    sa.Column("percent", sa.Float, nullable=False, default=0.0),
    sa.Column("eta_s", sa.Float),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("started", sa.Float),
    sa.Column("finished", sa.Float),
    sa.Column("expires", sa.Float),
    sa.Column("options", sa.JSON, nullable=False),
    sa.Column("inputs", sa.JSON, nullable=False),  # {name: Ref}
    sa.Column("input_bytes", sa.BigInteger, nullable=False, default=0),
    sa.Column("request_hash", sa.String(64), nullable=False),
    sa.Column("error", sa.JSON),
    sa.Column("report", sa.JSON),
    sa.Column("timings", sa.JSON, nullable=False),  # {stage: seconds}
    sa.Column("result", sa.JSON),  # {"views": Ref, "result": Ref}: what an export starts from
    sa.Column("resumes", sa.Integer, nullable=False, default=0),
    sa.Column("webhook", sa.String(2048)),
    sa.Column("seq", sa.Integer, nullable=False, default=0),  # number of its events
    sa.Index("viewmesh_jobs_by_owner", "owner", "created", "id"),
    sa.Index("viewmesh_jobs_by_owner_state", "owner", "state", "created", "id"),
    sa.Index("viewmesh_jobs_by_state", "state", "model", "created"),
    sa.Index("viewmesh_jobs_by_expiry", "expires"),
    sa.Index("viewmesh_jobs_by_parent", "parent"),
)

events = sa.Table(
    "viewmesh_events",
    metadata,
    sa.Column("job_id", sa.String(36), sa.ForeignKey("viewmesh_jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("type", sa.String(16), nullable=False),
    sa.Column("data", sa.JSON, nullable=False),
)

artifacts = sa.Table(
    "viewmesh_artifacts",
    metadata,
    sa.Column("job_id", sa.String(36), sa.ForeignKey("viewmesh_jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("name", sa.String(128), primary_key=True),
    sa.Column("key", sa.String(256), nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("media_type", sa.String(64), nullable=False),
)

inputs = sa.Table(
    "viewmesh_inputs",
    metadata,
    sa.Column("job_id", sa.String(36), sa.ForeignKey("viewmesh_jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("key", sa.String(128), primary_key=True, index=True),
)

# What deleted jobs leave to the sums of /metrics: one row per label, so that counters never fall.
tallies = sa.Table(
    "viewmesh_tallies",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("label", sa.String(128), primary_key=True),
    sa.Column("value", sa.Float, nullable=False),
)

# What jobs deleted since yesterday had been sent: deleting them does not give the day's quota back.
spent = sa.Table(
    "viewmesh_spent",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("owner", sa.String(64), nullable=False),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("input_bytes", sa.BigInteger, nullable=False),
)

# Which Conductor runs the jobs: one row, see lease.py. The epoch is unique so that Postgres takes it for a key: a
# transaction can then lock it against another epoch without being in the way of a renewal (FOR KEY SHARE).
leases = sa.Table(
    "viewmesh_leases",
    metadata,
    sa.Column("role", sa.String(16), primary_key=True),
    sa.Column("epoch", sa.Integer, nullable=False, unique=True),
    sa.Column("holder", sa.String(256), nullable=False),
    sa.Column("machine", sa.String(512), nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("started", sa.String(32), nullable=False),
    sa.Column("since", sa.Float, nullable=False),
    sa.Column("expires", sa.Float, nullable=False),
)

POSTGRES: dict[str, Any] = {
    "connect_timeout": 10,
    # A peer that has gone without a word is noticed within half a minute, not in two hours.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
IDLE_IN_TRANSACTION_MS = 20_000
AGAIN_S = 1.0  # after which a database that is not there is looked for again
SAY_EVERY = 15  # of those looks one is told in the log


def engine_of(url: str, *, pool_size: int = 10, patience_s: float = 30.0) -> sa.Engine:
    """A pool of connections; SQLite in write-ahead mode, so that readers never wait for the writer.

    `patience_s`: how long SQLite waits for another writer.
    """
    if not url.startswith("sqlite"):
        if url.startswith("postgresql://"):
            url = url.replace("postgresql://", "postgresql+psycopg://", 1)
        pool = {"pool_size": pool_size, "max_overflow": 10, "pool_pre_ping": True, "pool_recycle": 1800}
        engine = sa.create_engine(url, connect_args=POSTGRES, **pool)

        @event.listens_for(engine, "connect")
        def _limit(connection: Any, _record: Any) -> None:
            # A process that is stopped in the middle of a transaction must not keep its locks.
            connection.execute(f"SET idle_in_transaction_session_timeout = {IDLE_IN_TRANSACTION_MS}")
            connection.commit()

        return engine
    path = sa.make_url(url).database
    if path and path != ":memory:":
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    engine = sa.create_engine(url, pool_size=pool_size, max_overflow=10)

    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, _record: Any) -> None:
        # DBOS does so on the engines that it makes; IMMEDIATE takes the write lock when a transaction begins.
        connection.isolation_level = "IMMEDIATE"
        connection.execute(f"PRAGMA busy_timeout={round(patience_s * 1000)}")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")

    return engine


def await_database(engine: sa.Engine) -> None:
    """Returns once the database answers, however late: Serve gives up for good on a deployment whose first replicas
    fail to start three times, and a database that comes up after them would find nobody. A SQLite file that cannot be
    opened now cannot be opened later; raises OperationalError then."""
    looks = 0
    while True:
        try:
            engine.connect().close()
            return
        except OperationalError as error:
            if engine.dialect.name == "sqlite":
                raise
            if looks % SAY_EVERY == 0:
                log.warning(f"the job database does not answer; waiting for it: {str(error.orig).strip()}")
            looks += 1
            time.sleep(AGAIN_S)


def create_tables(engine: sa.Engine) -> None:
    """Creates our tables and indexes if they are not there. Several processes may do so at once. Raises OptionError for
    tables that another version of ours has made in another form."""
    for _ in range(5):
        try:
            return _create_tables(engine)
        except DBAPIError:  # another process was between our look and our CREATE
            time.sleep(0.1)
    return _create_tables(engine)


def _create_tables(engine: sa.Engine) -> None:
    metadata.create_all(engine)
    there = sa.inspect(engine)
    for table in metadata.tables.values():
        found = {column["name"] for column in there.get_columns(table.name)}
        missing = {column.name for column in table.columns} - found
        if missing:
            raise OptionError(
                f"The job database has no {table.name}.{min(missing)}: its tables are another version's.",
                hint="Let that version end its jobs, then name a new database in args.database.",
            )
        for index in table.indexes:  # create_all makes those of new tables only
            index.create(engine, checkfirst=True)


def seconds_now(connection: sa.Connection) -> float:
    """Seconds since 1970 by the database's clock, which is the same for all its clients."""
    if connection.dialect.name == "postgresql":
        clock = "SELECT extract(epoch FROM clock_timestamp())"
    else:
        clock = "SELECT (julianday('now') - 2440587.5) * 86400.0"
    return float(connection.execute(sa.text(clock)).scalar_one())


def lock_inputs(connection: sa.Connection) -> None:
    """Keeps accepting a job and deleting unreferenced inputs apart, until the transaction ends."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(827364)"))
    else:
        connection.execute(sa.text("DELETE FROM viewmesh_inputs WHERE job_id = ''"))  # takes SQLite's write lock
