"""Who runs the jobs: laws of the lease and its fence, and two Conductors of which one, or its network, is paused."""

import asyncio
import contextlib
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from conductor_process import LEASE_S
from in_process import Running
from sqlalchemy.exc import OperationalError
from stores import stores_of
from test_jobs import REF, accept, new_job
from wire import Wire

from serve_app.database import events, jobs, leases
from serve_app.jobs import JobStore
from serve_app.lease import Lease, LeaseLost, Process, _machine, _started
from serve_app.router import Service
from serve_app.settings import AppArgs, RouterConfig

SHORT = {"lease_s": 1.2, "margin_s": 0.4, "renew_s": 0.1}


@pytest.fixture(params=["local", "cloud"])
def args(request, tmp_path):
    return AppArgs(data=tmp_path / "data", fake={"optimise_s": 0.1}, **stores_of(request.param, request).args)


@pytest.fixture
def store(args):
    made = JobStore(args.database_url())
    made.create()
    yield made
    made.close()


@pytest.fixture
def lease(args, store):
    """Makes leases; none of them outlives the test."""
    made = []

    def make(kind=Lease, **more):
        given = {**SHORT, **more}
        made.append(kind(args.database_url(), **{**given, "renew_s": 30}))  # so patient with SQLite's other writers
        made[-1].renew_s = given["renew_s"]
        return made[-1]

    yield make
    for each in made:
        each.release()


class Paused(Lease):
    """Of a process that was stopped right after it took the lease: neither renews it nor sees that it has run out."""

    def _renew_for_ever(self):
        pass

    def _watch(self):
        pass


def test_of_many_who_ask_at_once_one_gets_it_and_keeps_it(lease):
    asking = [lease(lease_s=3600) for _ in range(6)]
    with ThreadPoolExecutor(len(asking)) as pool:
        got = list(pool.map(lambda each: each.acquire(), asking))
    assert got.count(True) == 1
    holder = asking[got.index(True)]
    for _ in range(3):
        until = expires(holder)
        while expires(holder) == until:  # the next renewal
            assert not any(each.acquire() for each in asking if each is not holder)
    assert [each.proven for each in asking] == got


def expires(lease):
    with lease.engine.connect() as connection:
        return connection.execute(sa.select(leases.c.expires)).scalar_one()


def test_who_releases_it_lets_the_next_one_in_at_once_with_a_higher_epoch(lease, store):
    first, second = lease(lease_s=3600), lease(lease_s=3600)
    assert first.acquire()
    assert store.figures()["lease"].epoch == first.epoch == 1
    first.release()
    assert second.acquire()
    assert (first.proven, second.proven, second.epoch) == (False, True, 2)


def test_who_cannot_renew_stops_before_another_may_take_over(lease, monkeypatch):
    stopped = threading.Event()
    first, second = lease(on_lost=stopped.set), lease()
    assert first.acquire()

    def away():
        raise OperationalError("UPDATE", {}, OSError("no route to host"))

    monkeypatch.setattr(first, "renew", away)
    while not second.acquire():
        time.sleep(0.01)
    assert stopped.is_set()
    assert first.lost


def test_a_dead_process_of_this_machine_is_followed_at_once(lease):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        holder = Process(_machine(), child.pid, _started(child.pid) or "")
        elsewhere = Process("another machine", 2**22 + 1, "1")
        first, second = lease(Paused, lease_s=3600), lease(lease_s=3600)
        first.process = holder
        assert first.acquire()
        assert not second.acquire()
        child.kill()
        while not second.acquire():  # a signal takes a moment
            time.sleep(0.01)
    assert holder.is_dead()
    assert not elsewhere.is_dead()
    assert not Process.me().is_dead()
    assert Process(_machine(), Process.me().pid, "1").is_dead()  # its number was used again


def test_nothing_that_a_replaced_conductor_writes_is_kept(args, store, lease):
    old = JobStore(args.database_url())
    first, second = lease(Paused), lease()
    first.fence(old.engine)
    with pytest.raises(LeaseLost):
        old.start("-")  # has none yet
    assert first.acquire()
    job = new_job()
    accept(store, job)
    old.start(job.id)
    data = {"stage": "optimise", "step": 1, "steps": 9}
    assert old.progress(job.id, percent=5, data=data)
    while not second.acquire():
        time.sleep(0.02)
    before = everything(store)
    for write in (
        lambda: old.progress(job.id, percent=50, data=data),
        lambda: old.preview(job.id, 3, REF),
        lambda: old.stage_done(job.id, "optimise", 1.0),
        lambda: old.resumed(job.id),
        lambda: old.succeed(job.id, [{"name": "mesh.glb", **REF}], {}, None),
        lambda: old.fail(job.id, {"code": "x"}, None),
        lambda: old.delete(job.id, None, lambda keys: None),
    ):
        with pytest.raises(LeaseLost):
            write()
        assert everything(store) == before
    assert first.lost
    assert not first.proven
    assert store.succeed(job.id, [], {}, None)  # the others' writes go on
    old.close()


def everything(store):
    with store.engine.connect() as connection:
        return [connection.execute(sa.select(table)).fetchall() for table in (jobs, events)]


# --- two real processes ---------------------------------------------------------------------------------------------


class Conductor:
    def __init__(self, args: AppArgs, log: Path) -> None:
        command = [sys.executable, str(Path(__file__).with_name("conductor_process.py")), args.model_dump_json()]
        self.log = log
        with open(log, "wb") as out, open(f"{log}.err", "wb") as errors:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=errors)

    async def says(self, word: str, seconds: float = 40) -> str:
        return (await self.says_when(word, seconds))[0]

    async def says_when(self, word: str, seconds: float = 40) -> tuple[str, float]:
        """The first line that starts so, and when it was said, by time.monotonic()."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for line in self.log.read_text().splitlines(keepends=True):
                if line.startswith(word) and line.endswith("\n"):
                    text, _, when = line.rpartition("\t")
                    return text, float(when)
            await asyncio.sleep(0.02)
        raise AssertionError(f"{self.log} says no {word!r}: {self.log.read_text()}")

    def pause(self, args: AppArgs) -> None:
        while True:
            self.process.send_signal(signal.SIGSTOP)
            if args.database is not None:
                return
            # Who is stopped in the middle of a transaction keeps SQLite's lock; nothing can be done about that.
            with contextlib.closing(sqlite3.connect(args.data / "jobs.sqlite", timeout=0.2)) as connection:
                try:
                    connection.execute("BEGIN IMMEDIATE").connection.rollback()
                    return
                except sqlite3.OperationalError:
                    self.process.send_signal(signal.SIGCONT)
                    time.sleep(0.03)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)


@pytest.fixture
def conductor(tmp_path):
    """Starts Conductors; none of them outlives the test."""
    made: list[Conductor] = []

    def start(args: AppArgs) -> Conductor:
        made.append(Conductor(args, tmp_path / f"conductor-{len(made)}"))
        return made[-1]

    yield start
    for each in made:
        each.process.kill()
        each.process.wait()


@contextlib.asynccontextmanager
async def jobs_at_work(args: AppArgs):
    """Eight jobs, one of them being worked on; within, another Conductor takes them over, and `going_on` waits until it
    has. At the end each has ended once, and its events have no gap and no repeat."""
    service = Service(args, None)
    service.config = RouterConfig.model_validate({"poll_s": 0.05, "heartbeat_s": 0.5})
    running = Running(service, None, args.data)
    ids = [
        (await running.submit(wait=None, optimise_s=8 if i == 0 else 0.4, options={"seed": i})).json()["id"]
        for i in range(8)
    ]

    def percent() -> float:
        row = service.store.get(ids[0])
        assert row is not None
        return row["percent"]

    async def beyond(reached: float) -> None:
        async with asyncio.timeout(60):
            while percent() <= reached:
                await asyncio.sleep(0.05)

    async def going_on() -> None:
        await beyond(percent())

    try:
        await beyond(10)
        yield going_on
        for job_id in ids:
            await running.until(job_id, "succeeded", seconds=30)
            told = await running.events(job_id)
            assert [number for number, _, _ in told] == list(range(1, len(told) + 1))
            assert [kind for _, kind, _ in told].count("done") == 1
            assert [data["state"] for _, kind, data in told if kind == "state"] == ["queued", "running", "succeeded"]
        ended = [(label, value) for name, label, value in service.store.figures()["tallies"] if name == "jobs"]
        assert ended == [("reconstruction|nvdiffrec|succeeded|", float(len(ids)))]
        assert "viewmesh_conductor_epoch 2.0" in (await running.http.get("/metrics")).text
    finally:
        await running.http.aclose()
        await service.close()


@pytest.mark.parametrize("args", [pytest.param("local", marks=pytest.mark.slow), "cloud"], indirect=True)
async def test_a_paused_conductor_is_replaced_and_ends_itself(args, conductor):
    first = conductor(args)
    await first.says("leads 1")
    second = conductor(args)
    await second.says("ready")
    async with jobs_at_work(args) as going_on:
        first.pause(args)
        paused = time.monotonic()
        assert await second.says("leads") == "leads 2"
        print(f"replaced {time.monotonic() - paused:.1f} s after the pause began (lease {LEASE_S} s)")  # noqa: T201
        assert time.monotonic() - paused > LEASE_S / 2  # the first had renewed it in between
        await going_on()
        first.resume()
        assert await asyncio.to_thread(first.process.wait, 10) == 1
        assert "lost its lease" in await first.says("unhealthy")
    assert second.process.poll() is None


@pytest.mark.parametrize("args", ["cloud"], indirect=True)
async def test_a_conductor_whose_network_pauses_has_ended_before_another_works(args, conductor):
    """The network goes away before a COMMIT: the database has seen the fence's look at the epoch, holds its lock, and
    hears nothing more. It gives the transaction up, another Conductor takes over, and then the COMMIT arrives."""
    database = sa.make_url(args.database)
    assert database.port is not None
    with Wire(database.port) as wire:
        far = database.set(port=wire.port).render_as_string(hide_password=False)
        first = conductor(args.model_copy(update={"database": far}))
        await first.says("leads 1")
        second = conductor(args)
        await second.says("ready")
        async with jobs_at_work(args) as going_on:
            wire.cut_before(b"COMMIT")
            assert await asyncio.to_thread(wire.was_cut.wait, 10)
            said, ended = await first.says_when("unhealthy")
            assert "lost its lease" in said  # by its own clock: nobody could tell it
            assert await asyncio.to_thread(first.process.wait, 10) == 1
            leads, taken = await second.says_when("leads")
            assert leads == "leads 2"
            assert ended < taken
            wire.mend()
            await going_on()
        assert second.process.poll() is None
