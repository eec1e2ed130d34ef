"""The OpenAPI document: valid, and what the service does is what it says."""

import asyncio
import socket
import sys
from pathlib import Path

import pytest
import uvicorn
from in_process import Running

from serve_app.router import Service
from serve_app.settings import RouterConfig

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_the_document_names_every_route_and_problem(running: Running):
    document = (await running.http.get("/openapi.json")).json()
    assert document["openapi"].startswith("3.1")
    routes = {(method, path) for path, methods in document["paths"].items() for method in methods}
    job = "/v1/reconstructions/{job_id}"
    assert routes == {
        ("post", "/v1/reconstructions"), ("get", "/v1/reconstructions"), ("get", job), ("delete", job),
        ("post", f"{job}/cancel"), ("post", f"{job}/exports"), ("get", f"{job}/events"),
        ("get", f"{job}/artifacts/{{name}}"), ("head", f"{job}/artifacts/{{name}}"), ("get", "/v1/models"),
        ("get", "/livez"), ("head", "/livez"), ("get", "/readyz"), ("head", "/readyz"), ("get", "/metrics"),
    }  # fmt: skip
    answers = document["paths"][job]["get"]["responses"]
    assert list(answers["404"]["content"]) == ["application/problem+json"]
    taken = {
        (method, path.removeprefix("/v1/reconstructions").removeprefix("/{job_id}")): {
            parameter["name"] for parameter in operation.get("parameters", [])
        }
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert taken["post", ""] == {"Idempotency-Key", "Prefer", "options"}
    assert taken["post", "/exports"] == {"job_id", "Idempotency-Key", "Prefer"}
    assert taken["get", "/events"] == {"job_id", "Last-Event-ID", "last_event_id"}
    assert taken["get", "/artifacts/{name}"] == {"job_id", "name", "Range", "If-None-Match", "If-Range"}
    assert taken["head", "/artifacts/{name}"] == {"job_id", "name", "If-None-Match"}


async def test_schemathesis_finds_nothing(running: Running, tmp_path):
    """Real HTTP to a second Router on the same database, so that it is seen from outside."""
    service = Service(running.service.args, running.conductor)
    service.config = RouterConfig.model_validate({"limits": {"wait_s": 1}})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(service.asgi(), port=port, log_level="warning", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    # One worker: it parses source, and Python 3.11's ast.parse now and then fails in two threads at once.
    command = [
        str(Path(sys.executable).parent / "schemathesis"), "run", f"http://127.0.0.1:{port}/openapi.json",
        "--phases", "examples,coverage,fuzzing,stateful", "--max-examples", "12", "--seed", "1", "--workers", "1",
        "--generation-database", "none", "--exclude-checks", "positive_data_acceptance",
        "--suppress-health-check", "all", "--continue-on-failure",
    ]  # fmt: skip
    try:
        child = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, cwd=tmp_path
        )
        output, _ = await asyncio.wait_for(child.communicate(), 200)
    finally:
        server.should_exit = True
        await serving
        await service.close()
    assert child.returncode == 0, output.decode()[-12000:]
