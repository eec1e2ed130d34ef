"""`viewmesh doctor --address`: what it says about clusters that are well, and that are not."""

import copy
import json

import httpx
import pytest
from typer.testing import CliRunner

from serve_app import cluster_doctor
from serve_app.command import app

DASHBOARD = "http://10.0.0.1:8265"


def deployment(name, status="HEALTHY", wanted=1, states=("RUNNING",), message=""):
    replicas = [
        {"state": state, "node_ip": "10.0.0.2", "log_file_path": f"/serve/replica_{name}_{i}.log"}
        for i, state in enumerate(states)
    ]
    return {
        "name": name,
        "status": status,
        "message": message,
        "target_num_replicas": wanted,
        "replicas": replicas,
        "recent_dead_replicas": [],
    }


class Cluster:
    """A dashboard and a service, as Ray 2.60 and viewmesh answer; tests change what they say."""

    def __init__(self):
        names = ("Router", "Conductor", "Preprocessor", "Nvdiffrec", "Exporter")
        self.deployments = {name: deployment(name) for name in names}
        self.token = "right"
        self.status = {
            "http_options": {"host": "0.0.0.0", "port": 8000},
            "proxies": {"n1": {"node_ip": "10.0.0.1", "status": "HEALTHY"}},
            "applications": {
                "viewmesh": {"name": "viewmesh", "status": "RUNNING", "message": "", "deployments": self.deployments}
            },
        }
        gpu = {"CPU": 16.0, "GPU": 4.0, "memory": 64 * 2**30}
        self.nodes = [
            {"node_ip": "10.0.0.1", "state": "ALIVE", "is_head_node": True, "resources_total": {"CPU": 4.0}},
            {"node_ip": "10.0.0.2", "state": "ALIVE", "is_head_node": False, "resources_total": gpu},
        ]
        self.ready = (200, {"status": "ok", "checks": {"database": "ok", "artifacts": "ok", "conductor": "ok"}})
        model = {"name": "nvdiffrec", "ready": True, "reason": "", "hint": ""}
        missing = {
            "name": "trellis",
            "ready": False,
            "reason": "No weights.",
            "hint": "viewmesh weights download trellis",
        }
        self.models = (200, {"models": [model, missing]})
        self.asked = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(str(request.url))
        if request.url.port == 8265:
            if request.headers.get("authorization") != f"Bearer {self.token}":
                return httpx.Response(401)
            if request.url.path == "/api/serve/applications/":
                return httpx.Response(200, json=self.status)
            return httpx.Response(200, json={"data": {"result": {"result": self.nodes}}})
        status, body = self.ready if request.url.path == "/readyz" else self.models
        return httpx.Response(status, json=body)

    def examine(self, address: str | None = DASHBOARD, url: str | None = None):
        http = httpx.Client(transport=httpx.MockTransport(self))
        found = cluster_doctor.examine(address, url, http=http)
        assert all(f.remedy for f in found if f.state == "problem")
        return {f.what: f for f in found}


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    return Cluster()


def problems(found):
    return [what for what, finding in found.items() if finding.state == "problem"]


def test_a_cluster_that_is_well(cluster):
    found = cluster.examine()
    assert problems(found) == []
    assert found["nodes"].detail == "2 alive with 4 GPUs"
    assert found["node 10.0.0.2"].detail == "worker, 16 CPUs, 4 GPUs, 64 GiB"
    assert found["deployment Nvdiffrec"].detail == "healthy, 1 of 1 replicas running"
    assert found["service"].detail.startswith("http://10.0.0.1:8000 is ready")
    assert (found["model nvdiffrec"].state, found["model trellis"].state) == ("ok", "optional")
    assert found["model trellis"].remedy == "viewmesh weights download trellis"


def test_a_deployment_that_cannot_start_says_why_and_where_its_log_is(cluster):
    trace = (
        "The deployment failed to start 3 times.\nTraceback (most recent call last):\n  x\nOutOfMemory: 16 GiB needed"
    )
    broken = deployment("Trellis", "DEPLOY_FAILED", states=("STARTING",), message=trace)
    cluster.deployments["Trellis"] = broken
    cluster.status["applications"]["viewmesh"]["status"] = "DEPLOY_FAILED"
    found = cluster.examine()
    assert problems(found) == ["application viewmesh", "deployment Trellis"]
    said = found["deployment Trellis"]
    assert "0 of 1 replicas running (starting): The deployment failed to start 3 times." in said.detail
    assert said.detail.endswith("OutOfMemory: 16 GiB needed")
    assert "Traceback" not in said.detail
    assert "/serve/replica_Trellis_0.log" in said.remedy


@pytest.mark.parametrize(
    ("given", "state"),
    [
        ({"status": "UPSCALING", "wanted": 2}, "optional"),
        ({"status": "UPDATING", "states": ("STARTING",)}, "problem"),
        ({"status": "UNHEALTHY"}, "problem"),
        ({"wanted": 0, "states": ()}, "ok"),
    ],
)
def test_replicas_wanted_and_running(cluster, given, state):
    cluster.deployments["Nvdiffrec"] = deployment("Nvdiffrec", **given)
    assert cluster.examine()["deployment Nvdiffrec"].state == state


def test_nothing_deployed_no_node_and_a_sick_proxy(cluster):
    cluster.status["proxies"]["n1"]["status"] = "UNHEALTHY"
    for node in cluster.nodes:
        node.update(state="DEAD", state_message="Terminated: node crashed")
    whole = copy.deepcopy(cluster.status)
    cluster.status["applications"] = {}
    found = cluster.examine()
    assert problems(found) == ["nodes", "application", "proxy 10.0.0.1"]
    assert "0 alive with 0 GPUs, 2 gone (Terminated: node crashed)" in found["nodes"].detail
    assert "service" not in found
    cluster.status = whole
    assert "service" in cluster.examine()


def test_the_token(cluster, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    assert "refuses the token" in cluster.examine()["Ray dashboard"].detail
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert "wants a token" in cluster.examine()["Ray dashboard"].detail
    (tmp_path / "token").write_text("right\n")
    assert problems(cluster.examine()) == []


def test_the_token_goes_to_the_dashboard_only(cluster, monkeypatch):
    monkeypatch.setattr(cluster_doctor, "token", lambda: "right")
    seen = []
    cluster.examine()
    http = httpx.Client(transport=httpx.MockTransport(lambda r: seen.append(r.headers) or cluster(r)))
    cluster_doctor.examine(None, "http://10.0.0.9:8000", key="k", http=http)
    assert [headers["authorization"] for headers in seen] == ["Bearer k", "Bearer k"]


def test_a_service_that_is_not_ready_wants_a_key_or_is_another(cluster):
    cluster.ready = (503, {"status": "unavailable", "checks": {"database": "ok", "conductor": "TimeoutError"}})
    cluster.models = (401, {})
    found = cluster.examine(None, "http://10.0.0.1:8000/")
    assert found["service"].detail == "http://10.0.0.1:8000 is not ready: conductor: TimeoutError"
    assert (found["models"].state, found["models"].remedy) == ("optional", "Give it with --key.")
    cluster.ready = (404, {"detail": "no such page"})
    assert "not as viewmesh does" in cluster.examine(None, "http://10.0.0.1:8000")["service"].detail
    cluster.ready, cluster.models = (200, {"status": "ok", "checks": {}}), (200, {"models": []})
    assert problems(cluster.examine(None, "http://10.0.0.1:8000")) == ["models"]


def test_the_command_ends_with_one_sentence_and_an_exit_code():
    result = CliRunner().invoke(app, ["doctor", "--address", "http://127.0.0.1:1"])
    assert result.exit_code == 1
    assert result.stderr.startswith("viewmesh: Ray dashboard: http://127.0.0.1:1 cannot be reached")
    assert len(result.stderr.splitlines()) == 1
    assert "kubectl port-forward" in result.stdout
    told = CliRunner().invoke(app, ["doctor", "--url", "http://127.0.0.1:1", "--json"])
    assert [finding["state"] for finding in json.loads(told.stdout)] == ["problem"]
