"""The dashboard and the alerts ask for series that exist: names from our code, and a listed few of Ray's."""

import ast
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[2]

# Ray's own series that we use, and where Ray defines them (without its prefix `ray_`).
RAYS = {
    "ray_serve_autoscaling_target_replicas": "serve/_private/deployment_state.py",
    "ray_serve_deployment_replica_healthy": "serve/_private/deployment_state.py",
    "ray_serve_health_check_failures_total": "serve/_private/deployment_state.py",
    "ray_serve_deployment_queued_queries": "serve/_private/router.py",
    "ray_serve_replica_processing_queries": "serve/_private/replica.py",
    "ray_node_gram_used": "dashboard/modules/reporter/reporter_agent.py",
    "ray_node_gpus_utilization": "dashboard/modules/reporter/reporter_agent.py",
}
PROMETHEUS = {"up"}
FUNCTIONS = {
    *("sum", "max", "min", "rate", "increase", "count", "histogram_quantile", "absent", "label_values"),
    *("by", "or", "and", "unless", "without", "on", "ignoring"),
}


def queries(dashboard: dict[str, Any], alerts: dict[str, Any]) -> list[str]:
    found = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    found += [variable["query"]["query"] for variable in dashboard["templating"]["list"]]
    return found + [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]


def series(query: str) -> set[str]:
    """The series that a query names: its words outside of braces, brackets, strings and label lists."""
    bare = re.sub(r'"[^"]*"', "", query)
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]", "", bare)
    bare = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", "", bare)
    bare = re.sub(r",\s*\w+\)$", ")", bare) if bare.startswith("label_values") else bare
    return set(re.findall(r"(?<![\w.$])[a-zA-Z_:][\w:]*", bare)) - FUNCTIONS


@pytest.fixture(scope="module")
def dashboard(cluster: Path) -> dict[str, Any]:
    return json.loads((cluster / "grafana-dashboard.json").read_text())


@pytest.fixture(scope="module")
def alerts(cluster: Path) -> dict[str, Any]:
    return yaml.safe_load((cluster / "alerts.yml").read_text())


@pytest.fixture(scope="module")
def of_the_router() -> dict[str, set[str]]:
    """Series and their labels, from the /metrics of a store that has seen something of everything."""
    from serve_app.metrics import exposition

    tallies = [
        ("jobs", "reconstruction|nvdiffrec|failed|internal_error", 1.0),
        ("job_seconds", "reconstruction|nvdiffrec", 9.0),
        ("stage_seconds", "prepare", 2.0),
        ("stage_count", "prepare", 1.0),
        ("resumes", "", 1.0),
    ]
    lease = SimpleNamespace(epoch=1, left_s=9.0)
    store: Any = SimpleNamespace(figures=lambda: {"active": [], "oldest": None, "tallies": tallies, "lease": lease})
    text = exposition(store, "text/plain")[0].decode()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.fixture(scope="module")
def of_the_replicas() -> set[str]:
    """As Ray exports what deployments/metrics.py makes: `ray_` in front, a histogram in three."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / "deployments/metrics.py").read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("metrics."):
            kind, name = ast.unparse(node.func).split(".")[1], f"ray_{ast.literal_eval(node.args[0])}"
            found |= {f"{name}_{end}" for end in ("bucket", "sum", "count")} if kind == "Histogram" else {name}
    assert found
    return found


def test_series_are_found_in_a_query() -> None:
    query = 'sum by (le, stage) (rate(a_b{x="c_d", y=~"e.*"}[5m])) / max(f:g) * 3600 + label_x'
    assert series(query) == {"a_b", "f:g", "label_x"}
    assert series('label_values(h{i="j"}, k)') == {"h"}


def test_every_series_exists(
    dashboard: dict[str, Any],
    alerts: dict[str, Any],
    of_the_router: dict[str, set[str]],
    of_the_replicas: set[str],
) -> None:
    used = set().union(*(series(query) for query in queries(dashboard, alerts)))
    assert used - of_the_router.keys() - of_the_replicas - RAYS.keys() - PROMETHEUS == set()
    assert RAYS.keys() <= used, "the list holds nothing that is not used"


def test_labels_of_the_routers_series_exist(
    dashboard: dict[str, Any], alerts: dict[str, Any], of_the_router: dict[str, set[str]]
) -> None:
    for query in queries(dashboard, alerts):
        for name, given in re.findall(r"\b(viewmesh_\w+)\{([^}]*)\}", query):
            assert set(re.findall(r'(\w+)\s*=~?"', given)) <= of_the_router[name], query


def test_all_that_we_count_is_shown(
    dashboard: dict[str, Any], of_the_router: dict[str, set[str]], of_the_replicas: set[str]
) -> None:
    used = set().union(*(series(query) for query in queries(dashboard, {"groups": []})))
    made = {name for name in of_the_router if not name.endswith("_created")} | of_the_replicas
    assert {name for name in made - used if not name.endswith(("_sum", "_count"))} == set()


def test_rays_series_are_where_the_list_says() -> None:
    import ray

    for name, file in RAYS.items():
        source = (Path(ray.__file__).parent / file).read_text()
        assert f'"{name.removeprefix("ray_")}"' in source, f"{name} is not in {file}: Ray has renamed it"


def test_codes_of_the_alerts_are_codes_of_ours(alerts: dict[str, Any]) -> None:
    source = "".join(f.read_text() for d in ("viewmesh", "deployments", "serve_app") for f in (ROOT / d).rglob("*.py"))
    for query in queries({"panels": [], "templating": {"list": []}}, alerts):
        for codes in re.findall(r'code=~?"([^"]*)"', query):
            for code in codes.split("|"):
                assert f'"{code}"' in source, code


def test_alerts_say_what_to_do(alerts: dict[str, Any]) -> None:
    names = [rule["alert"] for group in alerts["groups"] for rule in group["rules"]]
    assert len(set(names)) == len(names)
    for group in alerts["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("warning", "critical")
            assert {"summary", "description"} == rule["annotations"].keys()
            assert rule["expr"].count("(") == rule["expr"].count(")")
    text = json.dumps(alerts)
    assert set(re.findall(r"\bViewmesh\w+", text)) <= set(names), "an alert that is named exists"


def test_panels_do_not_overlap_and_have_units(dashboard: dict[str, Any]) -> None:
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert all(target["expr"] and target["refId"] for target in panel["targets"])


def test_scraper_reaches_both_ends(cluster: Path) -> None:
    config = yaml.safe_load((cluster / "prometheus.yml").read_text())
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    assert targets == {"viewmesh": ["service:8000"], "ray": ["service:8080"]}
    assert all((cluster / file).is_file() for file in config["rule_files"])
