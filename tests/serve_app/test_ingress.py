"""The ports that the ingress is given."""

import socket

from ray._private import ray_constants

from serve_app import ingress


def test_a_free_port_is_none_that_rays_agent_takes_a_moment_later(monkeypatch):
    assert ingress.RAY_AGENT_PORT == ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
    given = iter([ingress.RAY_AGENT_PORT, 40000])
    monkeypatch.setattr(socket.socket, "bind", lambda self, address: None)
    monkeypatch.setattr(socket.socket, "getsockname", lambda self: ("127.0.0.1", next(given)))
    assert ingress.free_port() == 40000
