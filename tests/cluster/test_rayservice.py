"""cluster/rayservice.yaml: KubeRay's own fields, the graph of serve_config.yaml, and what the service relies on."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from serve_app import config as configuration
from serve_app.settings import AppArgs

# What may differ from serve_config.yaml, and the value it then has.
EDITS = {
    "proxy_location": "EveryNode",
    "http_options.host": "0.0.0.0",
    "args.data": "/data",
    "args.database": "postgresql:///viewmesh",
    "args.artifacts": "s3://viewmesh/jobs",
    "args.device": "cuda",
    "args.models": ["nvdiffrec"],
    "args.auth.keys_file": "/etc/viewmesh/keys/keys.yaml",
    "Router.num_replicas": 2,
    "Router.max_replicas_per_node": 1,
    "Nvdiffrec.autoscaling_config.min_replicas": 0,
}


@pytest.fixture(scope="module")
def objects(cluster: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((cluster / "rayservice.yaml").read_text()))


@pytest.fixture(scope="module")
def service(objects: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = (o for o in objects if o["kind"] == "RayService")
    return found


@pytest.fixture(scope="module")
def ray(service: dict[str, Any]) -> dict[str, Any]:
    return service["spec"]["rayClusterConfig"]


@pytest.fixture(scope="module")
def graph(service: dict[str, Any]) -> dict[str, Any]:
    return yaml.safe_load(service["spec"]["serveConfigV2"])


def flat(value: Any, at: str = "") -> dict[str, Any]:
    """Leaves by dotted path; deployments by their names, the one application without a prefix."""
    if isinstance(value, dict) and value:
        return {k: v for key, item in value.items() for k, v in flat(item, f"{at}.{key}" if at else key).items()}
    return {at: value}


def flat_config(config: dict[str, Any]) -> dict[str, Any]:
    (application,) = config["applications"]
    top = {key: value for key, value in config.items() if key != "applications"}
    inner = {key: value for key, value in application.items() if key != "deployments"}
    deployments = {d["name"]: {k: v for k, v in d.items() if k != "name"} for d in application["deployments"]}
    return flat({**top, **inner, **deployments})


def containers(ray: dict[str, Any]) -> dict[str, dict[str, Any]]:
    groups = {"head": ray["headGroupSpec"], **{group["groupName"]: group for group in ray["workerGroupSpecs"]}}
    return {name: group["template"]["spec"]["containers"][0] for name, group in groups.items()}


def test_fields_are_kuberays(service: dict[str, Any]) -> None:
    schema = json.loads((Path(__file__).parent / "kuberay_rayservice_v1.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    assert [f"{list(e.path)}: {e.message}" for e in validator.iter_errors(service["spec"])] == []
    misspelt = {**service["spec"], "serveConfigV3": ""}
    assert not validator.is_valid(misspelt), "the schema is closed"


def test_the_graph_is_that_of_serve_config(graph: dict[str, Any], serve_config: dict[str, Any]) -> None:
    here, there = flat_config(graph), flat_config(serve_config)
    differing = {key: here.get(key) for key in here.keys() | there.keys() if here.get(key) != there.get(key)}
    assert differing == EDITS


def test_config_check_finds_nothing(graph: dict[str, Any]) -> None:
    assert configuration.check(graph) == []


def test_the_other_serve_config_differs_in_places_and_keys_only(cluster: Path, serve_config: dict[str, Any]) -> None:
    config = yaml.safe_load((cluster / "serve_config.yaml").read_text())
    here, there = flat_config(config), flat_config(serve_config)
    differing = {key: here.get(key) for key in here.keys() | there.keys() if here.get(key) != there.get(key)}
    assert differing == {k: v for k, v in EDITS.items() if k.startswith(("http_options", "args"))}
    assert configuration.check(config) == []


def test_keys_that_people_are_told_of_exist(cluster: Path) -> None:
    """In comments, alerts and pages."""
    known = {f"args.{key}" for key in (*AppArgs.model_fields, *flat(AppArgs().model_dump()))}
    known |= {f"user_config.{key}" for model in configuration.OWN_CONFIG.values() for key in model.model_fields}
    known |= {f"user_config.{key}" for keys in configuration.WORKER_CONFIG.values() for key in keys}
    files = [cluster.parent / "serve_config.yaml", cluster.parent / "README.md", *cluster.glob("*.*")]
    told = {key for file in files for key in re.findall(r"\b(?:args|user_config)(?:\.[a-z_]+)+", file.read_text())}
    assert {"args.models", "user_config.slots"} <= told <= known


@pytest.mark.parametrize("name", ["serve_config.yaml", "cluster/serve_config.yaml", "cluster/rayservice.yaml"])
def test_what_is_commented_out_passes_the_check_when_it_is_not(
    name: str, cluster: Path, serve_config: dict[str, Any]
) -> None:
    text = (cluster.parent / name).read_text()
    (block,) = re.findall(r"^ *# - name: Trellis.*\n(?:^ *#.*\n)+", text, re.MULTILINE)
    (worker,) = yaml.safe_load(re.sub(r"^ *# ?", "", block, flags=re.MULTILINE))
    (application,) = copy.deepcopy(serve_config)["applications"]
    application["args"]["models"] = ["nvdiffrec", *worker["user_config"]["models"]]
    application["deployments"].append(worker)
    assert configuration.check({"applications": [application]}) == []


def test_no_secret_is_in_the_config(graph: dict[str, Any]) -> None:
    """The places are in the config, the credentials in the environment, from Secrets: libpq's and AWS's variables."""
    import sqlalchemy as sa

    args = AppArgs(**graph["applications"][0]["args"])
    url = sa.make_url(args.database_url())
    assert (url.host, url.username, url.password) == (None, None, None), "a host here would win over PGHOST"
    assert url.database, "DBOS wants a name"
    assert args.artifacts_url().startswith("s3://")
    assert args.auth.keys_file is not None
    assert not args.auth.open


def test_the_store_takes_its_endpoint_from_the_environment(
    graph: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec = pytest.importorskip("fsspec")
    pytest.importorskip("s3fs")
    for name, value in {"ENDPOINT_URL": "http://minio:9000", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    args = AppArgs(**graph["applications"][0]["args"])
    fs, _ = fsspec.core.url_to_fs(args.artifacts_url(), skip_instance_cache=True)
    fs.connect()
    assert fs.s3.meta.endpoint_url == "http://minio:9000"


def test_kuberay_makes_the_service_of_the_heads_ports(ray: dict[str, Any], graph: dict[str, Any]) -> None:
    """Of the port named `serve`, which it finds on the head although the head gets no traffic; without one, of none.
    Only a head that names no port at all gets KubeRay's own. (BuildServeService and getServicePorts.)"""
    for container in containers(ray).values():
        named = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert named["serve"] == graph["http_options"]["port"]
        assert "metrics" in named


def test_head_does_no_work(ray: dict[str, Any], service: dict[str, Any]) -> None:
    start = ray["headGroupSpec"]["rayStartParams"]
    assert (start["num-cpus"], start["num-gpus"]) == ("0", "0")
    assert "nvidia.com/gpu" not in containers(ray)["head"]["resources"]["limits"]
    assert service["spec"]["excludeHeadPodFromServeSvc"] is True


def test_gpus_scale_from_zero_and_suffice(ray: dict[str, Any], graph: dict[str, Any]) -> None:
    groups = {group["groupName"]: group for group in ray["workerGroupSpecs"]}
    gpu = groups["gpu"]
    assert (gpu["replicas"], gpu["minReplicas"]) == (0, 0)
    assert ray["enableInTreeAutoscaling"] is True
    wanted = sum(
        d["autoscaling_config"]["max_replicas"] * d["ray_actor_options"]["num_gpus"]
        for d in graph["applications"][0]["deployments"]
        if d["ray_actor_options"].get("num_gpus")
    )
    assert gpu["maxReplicas"] * int(gpu["rayStartParams"]["num-gpus"]) >= wanted
    optimiser = next(d for d in graph["applications"][0]["deployments"] if d["name"] == "Nvdiffrec")
    takes = optimiser["ray_actor_options"].get("num_cpus", 1)  # Serve's default where only num_gpus is said
    assert int(gpu["rayStartParams"]["num-cpus"]) == takes
    limits = containers(ray)["gpu"]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == gpu["rayStartParams"]["num-gpus"]


def test_cpu_group_holds_the_least_of_the_graph(ray: dict[str, Any], graph: dict[str, Any]) -> None:
    cpu = next(group for group in ray["workerGroupSpecs"] if group["groupName"] == "cpu")
    per_pod = int(containers(ray)["cpu"]["resources"]["requests"]["cpu"])

    def cpus(key: str) -> float:
        return sum(
            d.get("autoscaling_config", {}).get(key, d.get("num_replicas", 1)) * d["ray_actor_options"]["num_cpus"]
            for d in graph["applications"][0]["deployments"]
            if "num_gpus" not in d["ray_actor_options"]
        )

    assert cpu["minReplicas"] * per_pod >= cpus("min_replicas")
    assert cpu["maxReplicas"] * per_pod >= cpus("max_replicas")


def test_versions_and_authentication(ray: dict[str, Any], pinned: dict[str, str]) -> None:
    assert ray["rayVersion"] == pinned["ray"]
    assert ray["authOptions"]["mode"] == "token"
    assert "redisPassword" in ray["gcsFaultToleranceOptions"]


def test_every_pod_is_bound_probed_and_unprivileged(ray: dict[str, Any]) -> None:
    for group in [ray["headGroupSpec"], *ray["workerGroupSpecs"]]:
        spec = group["template"]["spec"]
        container = spec["containers"][0]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert {"livenessProbe", "readinessProbe"} <= container.keys()
        assert {"requests", "limits"} <= container["resources"].keys()
        assert not container["image"].endswith(":latest")
        mounts, volumes = {m["name"] for m in container["volumeMounts"]}, {v["name"] for v in spec["volumes"]}
        assert mounts == volumes
        assert {r["secretRef"]["name"] for r in container["envFrom"]} == {"viewmesh-database", "viewmesh-store"}
        assert (
            ray["autoscalerOptions"]["securityContext"] == container["securityContext"]
        )  # KubeRay adds it to the head
    assert "/-/healthz" in json.dumps(containers(ray)["gpu"]["readinessProbe"])


def test_pods_leave_later_than_a_slice(ray: dict[str, Any], graph: dict[str, Any]) -> None:
    optimiser = next(d for d in graph["applications"][0]["deployments"] if d["name"] == "Nvdiffrec")
    assert optimiser["graceful_shutdown_timeout_s"] > optimiser["user_config"]["slice_s"]
    for group in ray["workerGroupSpecs"]:
        spec = group["template"]["spec"]
        assert spec["terminationGracePeriodSeconds"] > optimiser["graceful_shutdown_timeout_s"]


def test_only_port_8000_is_for_everybody(objects: list[dict[str, Any]], ray: dict[str, Any]) -> None:
    policies = {o["metadata"]["name"]: o["spec"] for o in objects if o["kind"] == "NetworkPolicy"}
    public = [rule for policy in policies.values() for rule in policy["ingress"] if not rule.get("from")]
    assert public == [{"ports": [{"protocol": "TCP", "port": 8000}]}]
    selected = policies["viewmesh"]["podSelector"]["matchLabels"]
    for group in [ray["headGroupSpec"], *ray["workerGroupSpecs"]]:
        assert selected.items() <= group["template"]["metadata"]["labels"].items()


def test_budget_selects_the_cpu_pods(objects: list[dict[str, Any]], ray: dict[str, Any]) -> None:
    (budget,) = (o["spec"] for o in objects if o["kind"] == "PodDisruptionBudget")
    cpu = next(group for group in ray["workerGroupSpecs"] if group["groupName"] == "cpu")
    assert budget["selector"]["matchLabels"].items() <= cpu["template"]["metadata"]["labels"].items()
    assert budget["minAvailable"] < cpu["minReplicas"], "or nothing could ever be drained"


def test_redis_is_where_the_cluster_looks(objects: list[dict[str, Any]], ray: dict[str, Any]) -> None:
    (service,) = (o for o in objects if o["kind"] == "Service")
    (state,) = (o for o in objects if o["kind"] == "StatefulSet")
    address = f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert ray["gcsFaultToleranceOptions"]["redisAddress"] == address
    assert service["spec"]["selector"] == state["spec"]["template"]["metadata"]["labels"]
    secret = ray["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]
    assert state["spec"]["template"]["spec"]["containers"][0]["env"][0]["valueFrom"]["secretKeyRef"] == secret
