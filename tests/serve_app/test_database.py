"""The job database as it is found: late, from an earlier version, or from another one."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError
from stores import new_database

from serve_app import database
from serve_app.ingress import free_port
from serve_app.jobs import JobStore, NewJob, new_id
from serve_app.quotas import Quota
from viewmesh.errors import OptionError


@asynccontextmanager
async def forwarding(port: int, to: int) -> AsyncIterator[None]:
    """What comes to one port of this machine goes on to another."""

    async def carry(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            target.write(data)
        target.close()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", to)
        await asyncio.gather(carry(reader, back), carry(there, writer))

    async with await asyncio.start_server(one, "127.0.0.1", port):
        yield


async def test_a_database_that_comes_later_than_the_service_is_waited_for(postgres_server, monkeypatch, caplog):
    monkeypatch.setattr(database, "AGAIN_S", 0.05)
    url, port = sa.make_url(new_database(postgres_server)), free_port()
    assert url.port is not None
    store = JobStore(url.set(port=port).render_as_string(hide_password=False))
    creating = asyncio.create_task(asyncio.to_thread(store.create))
    while "waiting for it" not in caplog.text:
        await asyncio.sleep(0.02)
    assert not creating.done()
    async with forwarding(port, url.port):
        await asyncio.wait_for(creating, 30)
        await asyncio.to_thread(store.ping)
        store.close()


def test_a_file_that_is_no_database_is_not_waited_for(tmp_path):
    (tmp_path / "jobs.sqlite").mkdir()
    with pytest.raises(OperationalError):
        JobStore(f"sqlite:///{tmp_path}/jobs.sqlite").create()


@pytest.fixture
def store(tmp_path):
    made = JobStore(f"sqlite:///{tmp_path}/jobs.sqlite")
    made.create()
    yield made
    made.close()


def run(store: JobStore, statement: str) -> list:
    with store.engine.begin() as connection:
        result = connection.execute(sa.text(statement))
        return list(result) if result.returns_rows else []


def test_an_index_that_an_earlier_version_did_not_have_is_made(store):
    run(store, "DROP INDEX viewmesh_jobs_by_owner_state")
    store.create()
    found = {index["name"] for index in sa.inspect(store.engine).get_indexes("viewmesh_jobs")}
    assert "viewmesh_jobs_by_owner_state" in found


def test_tables_of_another_form_are_refused_at_the_start(store):
    run(store, "ALTER TABLE viewmesh_jobs DROP COLUMN webhook")
    with pytest.raises(OptionError, match=r"viewmesh_jobs\.webhook") as raised:
        store.create()
    assert "args.database" in raised.value.hint


def test_to_accept_a_job_looks_at_no_job_that_is_over(store):
    """An owner may have a hundred thousand of them, and nobody else's job is accepted meanwhile."""
    asked = []

    def explained(connection, cursor, statement, parameters, context, many):
        if statement.startswith("SELECT count"):
            cursor.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)
            asked.extend(row[-1] for row in cursor.fetchall())

    sa.event.listen(store.engine, "before_cursor_execute", explained)
    store.accept(NewJob(new_id(), "ann", "reconstruction", "nvdiffrec", {}, {}, "h"), lambda *a: None, quota=Quota(9))
    (plan,) = asked
    assert "owner=? AND state=?" in plan
