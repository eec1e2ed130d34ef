"""What a running cluster looks like from outside: the Ray dashboard, Serve's deployments, the nodes, the service's own
answers. Looks over HTTP; changes nothing.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from viewmesh.doctor import Finding

TIMEOUT_S = 10.0
LONGEST = 300  # characters of somebody else's message
BROKEN = ("UNHEALTHY", "DEPLOY_FAILED", "UNAVAILABLE")


class _Unusable(Exception):
    """An answer that nothing can be learnt from: (what is wrong, what would be right)."""


def examine(
    address: str | None, url: str | None = None, *, key: str | None = None, http: httpx.Client | None = None
) -> list[Finding]:
    """address: of the Ray dashboard. url: of the service; found through the dashboard if None. key: an API key."""
    with http or httpx.Client(timeout=TIMEOUT_S, follow_redirects=True) as client:
        found: list[Finding] = []
        if address is not None:
            address = address.rstrip("/")
            try:
                applications = _ask(client, f"{address}/api/serve/applications/")
                nodes = _ask(client, f"{address}/api/v0/nodes?limit=1000&detail=true")
            except _Unusable as error:
                return [Finding("Ray dashboard", "problem", f"{address} {error.args[0]}", error.args[1])]
            found.append(Finding("Ray dashboard", "ok", address))
            found += _nodes(nodes["data"]["result"]["result"])
            found += _applications(applications)
            url = url or _service_url(address, applications)
        if url is not None:
            found += _service(client, url.rstrip("/"), key)
    return found


# --- the dashboard ---------------------------------------------------------------------------------------------------


def token() -> str | None:
    """Where Ray itself looks for it: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token."""
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return given.strip()
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return file.read_text().strip() or None
    except OSError:
        return None


def _ask(client: httpx.Client, url: str) -> Any:
    found = token()
    headers = {"authorization": f"Bearer {found}"} if found else {}
    try:
        answer = client.get(url, headers=headers)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise _Unusable(
            f"cannot be reached ({error or type(error).__name__}).",
            "Start the cluster, or forward its port: kubectl port-forward service/NAME-head-svc 8265.",
        ) from error
    if answer.status_code in (401, 403):
        wrong = "refuses the token of this machine." if found else "wants a token, and there is none on this machine."
        raise _Unusable(wrong, "Put what `ray get-auth-token` prints there into RAY_AUTH_TOKEN or ~/.ray/auth_token.")
    try:
        if not answer.is_success:
            raise ValueError(answer.status_code)
        return answer.json()
    except ValueError as error:
        raise _Unusable(
            f"answers {answer.status_code} without the status of a cluster.",
            "Give the address of the Ray dashboard, such as http://127.0.0.1:8265; --url is the service's.",
        ) from error


def _nodes(nodes: list[dict[str, Any]]) -> Iterator[Finding]:
    alive = [node for node in nodes if node["state"] == "ALIVE"]
    for node in alive:
        has = node.get("resources_total") or {}
        role = "head" if node.get("is_head_node") else "worker"
        gpus = f", {has['GPU']:g} GPUs" if has.get("GPU") else ""
        memory = f", {has.get('memory', 0) / 2**30:.0f} GiB"
        yield Finding(f"node {node['node_ip']}", "ok", f"{role}, {has.get('CPU', 0):g} CPUs{gpus}{memory}")
    dead = [node for node in nodes if node["state"] != "ALIVE"]
    gpus = sum((node.get("resources_total") or {}).get("GPU", 0) for node in alive)
    gone = f", {len(dead)} gone ({_short(dead[-1].get('state_message') or 'no reason given')})" if dead else ""
    remedy = "" if alive else "Start the head node."
    yield Finding("nodes", "ok" if alive else "problem", f"{len(alive)} alive with {gpus:g} GPUs{gone}", remedy)


def _applications(status: dict[str, Any]) -> Iterator[Finding]:
    if not status.get("applications"):
        yield Finding("application", "problem", "none is deployed", "serve deploy serve_config.yaml")
    for node_ip, proxy in sorted((p["node_ip"], p) for p in status.get("proxies", {}).values()):
        state = "ok" if proxy["status"] == "HEALTHY" else "problem"
        yield Finding(f"proxy {node_ip}", state, proxy["status"].lower(), "" if state == "ok" else _log(proxy))
    for name, application in status.get("applications", {}).items():
        good = application["status"] == "RUNNING"
        changing = application["status"] in ("DEPLOYING", "DELETING")
        detail = application["status"].lower() + _because(application, good)
        remedy = "" if good else "Look at its deployments." if application.get("deployments") else "serve status"
        yield Finding(f"application {name}", "ok" if good else "optional" if changing else "problem", detail, remedy)
        for deployment in application.get("deployments", {}).values():
            yield _deployment(deployment)


def _deployment(deployment: dict[str, Any]) -> Finding:
    wanted = deployment["target_num_replicas"]
    running = [replica for replica in deployment["replicas"] if replica["state"] == "RUNNING"]
    others = [replica["state"].lower() for replica in deployment["replicas"] if replica["state"] != "RUNNING"]
    broken = deployment["status"] in BROKEN or (wanted > 0 and not running)
    state = "problem" if broken else "optional" if len(running) < wanted else "ok"
    more = f" ({', '.join(sorted(others))})" if others else ""
    detail = f"{deployment['status'].lower()}, {len(running)} of {wanted} replicas running{more}"
    last = next(iter(deployment["replicas"] or deployment.get("recent_dead_replicas") or []), {})
    remedy = _log(last) if state == "problem" else ""
    return Finding(f"deployment {deployment['name']}", state, detail + _because(deployment, state == "ok"), remedy)


def _because(thing: dict[str, Any], good: bool) -> str:
    message = "" if good else thing.get("message") or ""
    return f": {_short(message)}" if message else ""


def _short(message: str) -> str:
    """The first line and the last, which of a traceback say most."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    text = " … ".join(dict.fromkeys((lines[0], lines[-1]))) if lines else ""
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _log(of: dict[str, Any]) -> str:
    path = of.get("log_file_path")
    return f"Its log: logs{path} in the Ray session of node {of['node_ip']}." if path else "serve status"


def _service_url(address: str, status: dict[str, Any]) -> str | None:
    """Where the proxies listen: on the dashboard's own machine unless they name another."""
    http = status.get("http_options") or {}
    if not http.get("port") or not status.get("applications"):
        return None
    host = http.get("host") or ""
    if host in ("", "0.0.0.0", "::", "127.0.0.1", "localhost", "::1"):
        host = urlsplit(address).hostname or "127.0.0.1"
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{http['port']}{(http.get('root_path') or '').rstrip('/')}"


# --- the service -----------------------------------------------------------------------------------------------------


def _service(client: httpx.Client, url: str, key: str | None) -> Iterator[Finding]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        ready = client.get(f"{url}/readyz", headers=headers)
        models = client.get(f"{url}/v1/models", headers=headers)
        checks = dict(ready.json()["checks"])
    except (httpx.TransportError, httpx.InvalidURL) as error:
        wrong = f"{url} cannot be reached ({error or type(error).__name__})."
        yield Finding("service", "problem", wrong, "Name it with --url if it listens elsewhere.")
        return
    except (ValueError, KeyError, TypeError):
        wrong = f"{url}/readyz answers {ready.status_code}, but not as viewmesh does."
        yield Finding("service", "problem", wrong, "Name the service with --url.")
        return
    bad = [f"{name}: {said}" for name, said in checks.items() if said != "ok"]
    if ready.is_success:
        yield Finding("service", "ok", f"{url} is ready ({', '.join(checks)})")
    else:
        yield Finding("service", "problem", f"{url} is not ready: {'; '.join(bad)}", "Look at what the check names.")
    if models.status_code == 401:
        yield Finding("models", "optional", "not asked: the service wants an API key", "Give it with --key.")
    elif models.is_success:
        yield from _models(models.json())


def _models(found: dict[str, Any]) -> Iterator[Finding]:
    for model in found["models"]:
        state = "ok" if model["ready"] else "optional"
        yield Finding(f"model {model['name']}", state, "ready" if model["ready"] else model["reason"], model["hint"])
    if not any(model["ready"] for model in found["models"]):
        yield Finding("models", "problem", "none is ready", "viewmesh weights list")
