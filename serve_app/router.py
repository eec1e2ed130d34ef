"""Router: the ingress. Stateless: what it knows is in the job database and the artifact store, so N replicas agree."""

import asyncio
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray import serve

from deployments.artifacts import ArtifactStore
from serve_app.asgi import Edge
from serve_app.auth import KeyRing, refuse_to_be_open
from serve_app.durable import Workflows
from serve_app.events import EventHub
from serve_app.jobs import JobStore
from serve_app.probes import Probes
from serve_app.replicas import Replicas
from serve_app.settings import AppArgs, RouterConfig

THREADS = 32


class Service:
    """What the routes work with: one per Router replica."""

    def __init__(self, args: AppArgs, conductor: Any) -> None:
        self.args = args
        self.config = RouterConfig()
        self.conductor = conductor
        self.keys = KeyRing(args.auth.keys_file)
        self.store = JobStore(args.database_url(), pool_size=10)
        self.store.create()
        self.artifacts = ArtifactStore(args.artifacts_url())
        self.workflows = Workflows(self.store.engine)
        self.store.on_end = self.workflows.deliver
        self.replicas = Replicas(self._held)
        self.probes = Probes({"database": self.store.ping, "artifacts": self.artifacts.check})
        self.hub = EventHub(self.store, lambda: self.config.poll_s)
        self.accepting = asyncio.Lock()  # the database takes one at a time: the others wait here, without a connection
        self.telling: set[asyncio.Task[None]] = set()  # the Conductor of cancellations

    def asgi(self, *, echo_request_id: bool = True) -> Edge:
        from serve_app.routes import application

        return Edge(
            application(self),
            self.keys.caller,
            lambda: self.config,
            local_only=self.keys.open and not self.args.auth.open,
            echo_request_id=echo_request_id,
        )

    async def _held(self) -> dict[str, Any]:
        return await self.conductor.held.remote()

    async def await_schema(self, seconds: float = 600.0) -> None:
        """Returns once the Conductor has made DBOS's tables: before that no job can be accepted."""
        until = time.monotonic() + seconds
        while True:
            try:
                await asyncio.to_thread(self.workflows.over, ["-"])
                return
            except Exception:
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(0.2)

    async def close(self) -> None:
        await self.hub.close()
        self.probes.close()
        self.workflows.close()
        self.store.close()


@serve.deployment(
    name="Router",
    num_replicas=1,
    max_ongoing_requests=2500,  # event streams count; the edge does its own admission and answers in problem+json
    max_queued_requests=-1,
    graceful_shutdown_timeout_s=10,
    health_check_period_s=3,
    health_check_timeout_s=10,
    ray_actor_options={"num_cpus": 0.1},
)
@serve.ingress()
class Router:
    async def __init__(self, args: dict[str, Any], conductor: Any) -> None:
        settings = AppArgs(**args)
        refuse_to_be_open(settings.auth, _http_host())
        # Serve's would be five: a few uploads on their way to a slow store must not keep everybody's queries waiting.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, "router"))
        sys.setswitchinterval(0.0005)  # queries run in threads: the loop must not wait 5 ms for each of them
        self.service = await asyncio.to_thread(Service, settings, conductor)
        await self.service.await_schema()

    def reconfigure(self, config: dict[str, Any]) -> None:
        self.service.config = RouterConfig(**config)

    async def check_health(self) -> None:
        return None

    def __serve_build_asgi_app__(self) -> Edge:
        return self.service.asgi(echo_request_id=False)  # Serve adds the header itself, behind either of its proxies


def _http_host() -> str | None:
    """The address that Serve's proxies listen on; None outside a cluster."""
    from ray.serve import context

    try:
        client = context._get_global_client(raise_if_no_controller_running=False)
        return None if client is None else client.http_config.host
    except Exception:
        return "0.0.0.0"  # not known: take it for public
