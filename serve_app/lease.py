"""The lease: which of several Conductors runs the jobs, and that none of the others can change anything.

A Conductor may be paused (a stopped process, a network that is away) while another one takes its place, and does not
know of it when it goes on. So there are two guards. The lease row says who may work, until when by the database's
clock; who cannot renew it in time stops by its own clock, before another may take over. And the row's epoch is a fence
(Kleppmann, How to do distributed locking, 2016): every transaction of a Conductor's engine, DBOS's too, looks
before its commit whether the epoch is still its own, and locks it until it has committed.
"""

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from serve_app.database import engine_of, leases, seconds_now

log = logging.getLogger("ray.serve")

LEASE_S = 10.0
LEASE_ON_SQLITE_S = 20.0  # a renewal may wait for other writers; who follows a dead process need not wait at all
MARGIN_S = 2.0  # so much earlier than others may take over, its holder stops
RENEW_S = 2.0
ROLE = "conductor"

# A takeover changes the epoch, which is a key: it waits for the transaction that asks. A renewal does not. On SQLite
# whoever writes is alone.
EPOCH = sa.select(leases.c.epoch).where(leases.c.role == ROLE).with_for_update(read=True, key_share=True)


class LeaseLost(Exception):
    """Another Conductor has taken over, or may have: nothing of this transaction was written."""


@dataclass(frozen=True)
class Process:
    """A process, so that another one on the same machine can tell that it is dead."""

    machine: str  # kernel and process namespace; empty where it cannot be told
    pid: int
    started: str  # in the kernel's ticks: a number that is used again is another process

    @staticmethod
    def me() -> "Process":
        return Process(_machine(), os.getpid(), _started(os.getpid()) or "")

    def is_dead(self) -> bool:
        """True only where that is certain."""
        return bool(self.machine) and self.machine == _machine() and _started(self.pid) != self.started


@dataclass(frozen=True)
class Held:
    """The row as it is: who may work, since which takeover, for how many more seconds."""

    epoch: int
    holder: str
    process: Process
    left_s: float


class Lease:
    """One Conductor's claim. `acquire` until it is true; `on_lost` is then called once, from a thread."""

    def __init__(
        self,
        url: str,
        *,
        lease_s: float | None = None,
        margin_s: float = MARGIN_S,
        renew_s: float = RENEW_S,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine = engine_of(url, pool_size=1, patience_s=renew_s)
        usual = LEASE_ON_SQLITE_S if self.engine.dialect.name == "sqlite" else LEASE_S
        self.lease_s, self.margin_s, self.renew_s = lease_s or usual, margin_s, renew_s
        self.on_lost = on_lost
        self.process = Process.me()
        self.holder = f"{socket.gethostname()}:{os.getpid()}"
        self.epoch: int | None = None
        self.until = 0.0  # by this process's own clock
        self.ended = threading.Event()

    # --- claiming --------------------------------------------------------------------------------------------------

    def acquire(self) -> bool:
        """Takes the lease if it is free, has run out, or its holder is a dead process of this machine."""
        held = self.look()
        if held is not None and held.left_s > 0 and not held.process.is_dead():
            return False
        with self.engine.begin() as connection:
            # May wait long for a holder that has gone in the middle of a transaction: the clocks are read after it.
            connection.execute(sa.select(leases.c.epoch).where(leases.c.role == ROLE).with_for_update())
            asked = time.monotonic()
            epoch = self._take(connection, held)
        if epoch is None:
            return False  # another one was faster
        self.epoch, self.until = epoch, asked + self.lease_s - self.margin_s
        log.info(f"this Conductor runs the jobs now: lease epoch {epoch}")
        threading.Thread(target=self._renew_for_ever, name="lease-renewal", daemon=True).start()
        threading.Thread(target=self._watch, name="lease-watch", daemon=True).start()
        return True

    def _take(self, connection: sa.Connection, held: Held | None) -> int | None:
        process = {"machine": self.process.machine, "pid": self.process.pid, "started": self.process.started}
        now = seconds_now(connection)
        values = {"holder": self.holder, **process, "since": now, "expires": now + self.lease_s}
        if held is None:
            try:
                with connection.begin_nested():
                    connection.execute(sa.insert(leases).values(role=ROLE, epoch=1, **values))
                return 1
            except IntegrityError:
                return None
        was = (leases.c.role == ROLE) & (leases.c.epoch == held.epoch)
        if not held.process.is_dead():
            was &= leases.c.expires <= now  # it may have been renewed since we looked
        taken = connection.execute(sa.update(leases).where(was).values(epoch=held.epoch + 1, **values))
        return held.epoch + 1 if taken.rowcount else None

    def look(self) -> Held | None:
        with self.engine.connect() as connection:
            return look(connection)

    # --- keeping ---------------------------------------------------------------------------------------------------

    @property
    def proven(self) -> bool:
        """Whether nobody else can have the lease now."""
        return self.epoch is not None and not self.ended.is_set() and time.monotonic() < self.until

    def require(self) -> None:
        if not self.proven:
            raise LeaseLost("this Conductor cannot prove that it holds the lease")

    def renew(self) -> None:
        """Raises LeaseLost if it is another's, a database error if that cannot be told."""
        asked = time.monotonic()
        with self.engine.begin() as connection:
            mine = (leases.c.role == ROLE) & (leases.c.epoch == self.epoch)
            expires = seconds_now(connection) + self.lease_s
            if connection.execute(sa.update(leases).where(mine).values(expires=expires)).rowcount == 0:
                raise LeaseLost(f"lease epoch {self.epoch} is over")
        self.until = asked + self.lease_s - self.margin_s

    def _renew_for_ever(self) -> None:
        while not self.ended.wait(self.renew_s):
            try:
                self.renew()
            except LeaseLost:
                self.until = 0.0
                return
            except Exception as error:
                log.warning(f"the lease could not be renewed: {type(error).__name__}: {error}")

    def _watch(self) -> None:
        while not self.ended.wait(min(0.2, self.renew_s / 4)):
            if time.monotonic() >= self.until:
                self.ended.set()  # it does not come back: what ran under it is stopped
                log.error(f"lease epoch {self.epoch} is lost: this Conductor stops")
                self.on_lost()

    @property
    def lost(self) -> bool:
        return self.epoch is not None and (self.ended.is_set() or time.monotonic() >= self.until)

    def release(self) -> None:
        """Lets another Conductor take over at once. Nothing may run any more."""
        self.ended.set()
        if self.epoch is not None:
            with contextlib.suppress(SQLAlchemyError), self.engine.begin() as connection:
                mine = (leases.c.role == ROLE) & (leases.c.epoch == self.epoch)
                connection.execute(sa.update(leases).where(mine).values(expires=0.0))
        self.engine.dispose()

    # --- the fence -------------------------------------------------------------------------------------------------

    def fence(self, engine: sa.Engine) -> None:
        """From now on no transaction of this engine is committed without the lease."""

        @event.listens_for(engine, "commit")
        def _refuse(connection: sa.Connection) -> None:
            if self.ended.is_set() or self.epoch is None:
                raise LeaseLost("this Conductor does not hold the lease")
            epoch = connection.execute(EPOCH).scalar()
            if epoch != self.epoch:
                self.until = 0.0
                raise LeaseLost(f"epoch {epoch} has taken over from this Conductor's {self.epoch}")


def look(connection: sa.Connection) -> Held | None:
    """The lease as the database knows it; None before the first Conductor."""
    row = connection.execute(sa.select(leases).where(leases.c.role == ROLE)).mappings().first()
    if row is None:
        return None
    left_s = row["expires"] - seconds_now(connection)
    return Held(row["epoch"], row["holder"], Process(row["machine"], row["pid"], row["started"]), left_s)


def _machine() -> str:
    """The same for two processes only if one's process ids mean the same to the other."""
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{kernel} {os.readlink('/proc/self/ns/pid')} {socket.gethostname()}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """None if there is no such process, or only what is left of it until its parent asks."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]
