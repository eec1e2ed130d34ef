"""A whole service in the test's process: the real graph in Ray's local testing mode, fake engines, real DBOS."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from ray import serve

from deployments.fakes import fake_view
from serve_app.router import Service
from serve_app.settings import AppArgs, RouterConfig


class Running:
    """A running service and a client of it."""

    def __init__(self, service: Service, conductor: Any, data: Path) -> None:
        self.service, self.conductor, self.data = service, conductor, data
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(service.asgi(), raise_app_exceptions=False), base_url="http://test"
        )

    async def submit(self, *, wait: float | None = 20, headers: dict[str, str] | None = None, **script: Any) -> Any:
        """Submits a fake job; with a wait the answer is the finished job."""
        given = {**(headers or {}), **({"prefer": f"wait={wait:g}"} if wait is not None else {})}
        fields = {"options": json.dumps(script.pop("options", {}))}
        if "webhook_url" in script:
            fields["webhook_url"] = script.pop("webhook_url")
        return await self.http.post("/v1/reconstructions", files=views(**script), data=fields, headers=given)

    async def events(self, job_id: str, after: int | None = None) -> list[tuple[int, str, dict]]:
        headers = {} if after is None else {"last-event-id": str(after)}
        text = (await self.http.get(f"/v1/reconstructions/{job_id}/events", headers=headers)).text
        found = []
        for block in text.split("\n\n"):
            fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
            if "data" in fields:
                found.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
        return found

    async def until(self, job_id: str, *states: str, seconds: float = 20) -> dict[str, Any]:
        for _ in range(int(seconds / 0.05)):
            job = (await self.http.get(f"/v1/reconstructions/{job_id}")).json()
            if job["state"] in states:
                return job
            await asyncio.sleep(0.05)
        raise AssertionError(f"{job_id} did not become {states}: {job}")


def views(count: int = 3, **script: Any) -> list[tuple[str, tuple[str, bytes]]]:
    return [("views", (f"view_{i:02d}.png", fake_view(i, **(script if i == 0 else {})))) for i in range(count)]


@asynccontextmanager
async def running_service(data: Path, slots: dict[str, int] | None = None, **args: Any) -> AsyncIterator[Running]:
    import os

    settings = AppArgs(data=data, **{"fake": {"optimise_s": 0.1}, **args})
    before = os.environ.get("RAY_AUTH_MODE")
    application = graph(settings)
    conductor = await asyncio.to_thread(lambda: serve.run(application, _local_testing_mode=True))
    await conductor.reconfigure.remote({"slots": slots or {}})
    await models_loaded(conductor)
    service = Service(settings, conductor)
    service.config = RouterConfig.model_validate({"poll_s": 0.03, "heartbeat_s": 0.5, "limits": {"wait_s": 30}})
    await service.await_schema()
    try:
        running = Running(service, conductor, data)
        async with running.http:
            yield running
    finally:
        await conductor.close.remote()
        await service.close()
        assert os.environ.get("RAY_AUTH_MODE") == before


async def models_loaded(conductor: Any) -> None:
    """A replica of Serve's is ready once it is configured; local testing mode does not wait for that."""
    for _ in range(400):
        said = await conductor.held.remote()
        if not any("does not hold" in state.get("reason", "") for state in said.values()):
            return
        await asyncio.sleep(0.05)
    raise AssertionError(said)


def graph(settings: AppArgs) -> Any:
    """build(args) without the Router: local testing mode has no ingress."""
    from serve_app.app import build_conductor

    return build_conductor(settings)
