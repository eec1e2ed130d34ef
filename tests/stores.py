"""Where jobs and their files may lie: SQLite and a folder; a real PostgreSQL and an S3 server, started here."""

import contextlib
import functools
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from serve_app.ingress import free_port

BUCKET = "viewmesh-test"


@dataclass(frozen=True)
class Stores:
    """A database and an artifact store of one test's own, as the application's arguments name them."""

    name: str
    args: dict[str, Any]


@functools.cache
def postgres_programs() -> Path | None:
    """The folder of initdb and postgres: Debian keeps them off the PATH."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: float(p.parts[-3]))
    found = debian[-1] if debian else shutil.which("postgres")
    return None if found is None else Path(found).parent


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL of our own on a free port; its URL without a database. Skips where none is installed."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="viewmesh-pg-"))  # not below pytest's, which only its user may enter
    other: dict[str, Any] = {}
    if os.geteuid() == 0:  # as whom PostgreSQL refuses to run
        shutil.chown(folder, "nobody")
        other = {"user": "nobody", "group": folder.stat().st_gid, "extra_groups": []}
    port = free_port()
    initdb = [programs / "initdb", "-D", folder / "data", "-U", "viewmesh", "-A", "trust", "--no-sync"]
    subprocess.run([*initdb, "--no-locale", "-E", "UTF8"], check=True, capture_output=True, cwd=folder, **other)
    command = [programs / "postgres", "-D", folder / "data", "-k", folder, "-h", "127.0.0.1", "-p", str(port)]
    settings = {"fsync": "off", "max_connections": "200", "max_wal_size": "256MB"}
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen([*command, *options], stdout=log, stderr=log, cwd=folder, **other)
    try:
        ready = [programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
        for _ in range(200):
            if subprocess.run(ready, check=False).returncode == 0:
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(0.1)
                raise RuntimeError((folder / "log").read_text())
        yield f"postgresql://viewmesh@127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGINT)  # which does not wait for clients to leave
        server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def new_database(server: str) -> str:
    """The URL of a new, empty database."""
    import psycopg

    name = f"jobs_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{server}/{name}"


@contextlib.contextmanager
def s3() -> Iterator[str]:
    """An S3 server in this process, which AWS's own variables name; the URL of a bucket in it."""
    server_module = pytest.importorskip("moto.server", reason="moto is not installed: pip install 'moto[s3]' flask")
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = server_module.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    told = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        import boto3

        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield f"s3://{BUCKET}"
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        server.stop()


def stores_of(kind: str, servers: pytest.FixtureRequest) -> Stores:
    """`local` or `cloud`; the servers of `cloud` start when they are first asked for."""
    if kind == "local":
        return Stores(kind, {})
    database = new_database(servers.getfixturevalue("postgres_server"))
    return Stores(
        kind, {"database": database, "artifacts": f"{servers.getfixturevalue('s3_bucket')}/{uuid.uuid4().hex[:12]}"}
    )
