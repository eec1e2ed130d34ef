"""A real Prometheus, with our scrape config and rules, beside the running service: the dashboard's series are there.

Everything has happened once before it asks: a success, a failure, a lost replica, a failed health check. What then is
missing is in LATER, with the reason; cluster/README.md says the same.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from simulated_cluster import until
from test_monitoring import queries, series
from tools import tool

from serve_app.ingress import free_port
from serve_app.testing import RayService, deployment

PROMETHEUS = tool("prometheus")

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(240),
    pytest.mark.skipif(PROMETHEUS is None, reason="needs Prometheus: apt install prometheus"),
]

LATER = {  # series that a healthy service on this machine does not have
    "ray_node_gram_used": "nodes with a GPU",
    "ray_node_gpus_utilization": "nodes with a GPU",
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RayService, int]]:
    """The service on a head whose agent's port is known, as `ray start --metrics-export-port` does it."""
    from ray.cluster_utils import Cluster

    port = free_port()
    ports = {"metrics_export_port": port, "include_dashboard": True, "dashboard_port": free_port()}
    head = {"num_cpus": 2, "object_store_memory": 150 * 2**20, **ports}
    cluster = Cluster(initialize_head=True, head_node_args=head)

    def change(config: dict) -> None:
        config["applications"][0]["args"]["fake"] = {"optimise_s": 0.5, "gpu_bytes": 8 * 2**30}
        deployment(config, "Nvdiffrec")["ray_actor_options"] = {"num_cpus": 0, "num_gpus": 0}

    try:
        with RayService(tmp_path_factory.mktemp("metrics"), change, address=cluster.address) as running:
            yield running, port
    finally:
        cluster.shutdown()


@pytest.fixture(scope="module")
def prometheus(
    service: tuple[RayService, int], cluster: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Any]]:
    """Our prometheus.yml, with this machine's ports and a second between scrapes; asked by its HTTP API."""
    running, agent = service
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    text = (cluster / "prometheus.yml").read_text()
    text = text.replace("service:8000", f"127.0.0.1:{running.port}").replace("service:8080", f"127.0.0.1:{agent}")
    config = yaml.safe_load(text)
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(cluster / "alerts.yml", folder)
    command = [str(PROMETHEUS), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with open(folder / "log", "w") as log:
        child = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)

    def ask(path: str, **query: str) -> Any:
        answer = httpx.get(f"http://127.0.0.1:{port}/api/v1/{path}", params=query).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def ready() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    try:
        until(ready, 20, "Prometheus is ready")
        yield ask
    finally:
        child.terminate()
        child.wait(20)


@pytest.fixture(scope="module")
def history(service: tuple[RayService, int], prometheus: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the panels show: one job that succeeds, one that fails, one whose replica dies, one whose device is lost."""
    running, folder = service[0], tmp_path_factory.mktemp("jobs")
    with running.client() as client:
        running.assert_whole(client, running.submit(client, folder))
        assert client.wait(running.submit(client, folder, fail="internal_error")).state == "failed"
        resumed = running.submit(client, folder, optimise_s=5, steps=50)
        running.await_step(client, resumed, 20)
        replicas = running.status()["deployments"]["Nvdiffrec"]["replicas"]
        subprocess.run(["kill", "-9", str(replicas[0]["pid"])], check=True)
        running.assert_whole(client, resumed)
        assert client.get(resumed).resumes >= 1
        lost = running.submit(client, folder, optimise_s=1, fail="device_lost", times=1, scratch=str(folder))
        running.assert_whole(client, lost)


def missing(prometheus: Any, names: set[str]) -> set[str]:
    known = set(prometheus("label/__name__/values"))
    return names - known


def test_targets_are_up_and_rules_are_healthy(prometheus: Any, cluster: Path) -> None:
    def up() -> bool:
        targets = prometheus("targets")["activeTargets"]
        return len(targets) == 2 and all(target["health"] == "up" for target in targets)

    until(up, 20, "both targets are up")
    rules = [rule for group in prometheus("rules")["groups"] for rule in group["rules"]]
    until(lambda: all(r["health"] == "ok" for g in prometheus("rules")["groups"] for r in g["rules"]), 20, "rules")
    wanted = yaml.safe_load((cluster / "alerts.yml").read_text())["groups"][0]["rules"]
    assert {rule["name"] for rule in rules} == {rule["alert"] for rule in wanted}

    def down() -> list[Any]:
        return [a for a in prometheus("alerts")["alerts"] if a["labels"]["alertname"] == "ViewmeshDown"]

    until(lambda: not down(), 20, "the service counts as up")  # before the first scrape it does not


@pytest.mark.usefixtures("history")
def test_every_series_of_the_dashboard_and_the_alerts_is_scraped(prometheus: Any, cluster: Path) -> None:
    dashboard = json.loads((cluster / "grafana-dashboard.json").read_text())
    alerts = yaml.safe_load((cluster / "alerts.yml").read_text())
    used = set().union(*(series(query) for query in queries(dashboard, alerts)))
    wanted = used - LATER.keys()
    # Ray's agent hands series on every 10 s.
    until(lambda: not missing(prometheus, wanted), 45, f"series: {sorted(missing(prometheus, wanted))}")
    assert missing(prometheus, set(LATER)) in (set(), set(LATER)), "all of a GPU's series or none"


@pytest.mark.usefixtures("history")
def test_every_panel_has_something_to_show(prometheus: Any, cluster: Path) -> None:
    panels = json.loads((cluster / "grafana-dashboard.json").read_text())["panels"]
    asked = {
        (panel["title"], target["expr"]): target["expr"].replace("$__rate_interval", "1m").replace("$deployment", ".*")
        for panel in panels
        for target in panel.get("targets", [])
        if not series(target["expr"]) & LATER.keys()
    }

    def empty() -> list[str]:
        return [str(key) for key, query in asked.items() if not prometheus("query", query=query)["result"]]

    until(lambda: not empty(), 45, "; ".join(empty()))
    (failures,) = (query for (title, _), query in asked.items() if title == "Failures by code")
    codes = {found["metric"]["code"] for found in prometheus("query", query=failures)["result"]}
    assert codes == {"internal_error"}


@pytest.mark.usefixtures("history")
def test_labels_that_the_dashboard_filters_by_have_values(prometheus: Any, cluster: Path) -> None:
    dashboard = json.loads((cluster / "grafana-dashboard.json").read_text())
    for variable in dashboard["templating"]["list"]:
        found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
        assert found, variable["query"]
        values = prometheus(f"label/{found[2]}/values", **{"match[]": found[1]})
        assert {"Router", "Conductor", "Nvdiffrec"} <= set(values)


def test_what_comes_later_is_documented(cluster: Path) -> None:
    text = (cluster / "README.md").read_text()
    for name, where in LATER.items():
        assert f"`{name}`" in text, f"{name} is only on {where}"
