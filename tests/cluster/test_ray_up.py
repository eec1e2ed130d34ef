"""cluster/ray-up*.yaml against Ray's own schema of cluster files, and against what the service needs of a machine."""

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

FILES = ["ray-up.yaml", "ray-up-aws.yaml"]


def read(cluster: Path, file: str) -> dict[str, Any]:
    return yaml.safe_load((cluster / file).read_text())


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    import ray.autoscaler

    return json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


@pytest.mark.parametrize("file", FILES)
def test_schema(cluster: Path, schema: dict[str, Any], file: str) -> None:
    value = read(cluster, file)
    jsonschema.validate(value, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**value, "max_worker": 1}, schema)


@pytest.mark.parametrize("file", FILES)
def test_ray_accepts_it(cluster: Path, file: str) -> None:
    """What `ray up` does before it touches a machine: fills in the defaults and looks at the sums."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(read(cluster, file)))
    validate_config(prepared)
    kinds = prepared["available_node_types"]
    assert prepared["head_node_type"] in kinds
    if prepared["provider"]["type"] == "local":
        machines = prepared["provider"]["worker_ips"]
        assert [kind["min_workers"] for kind in kinds.values()] == [len(machines)]


@pytest.mark.parametrize("file", FILES)
def test_nothing_but_serve_is_public(cluster: Path, file: str) -> None:
    value = read(cluster, file)
    head = " ".join(value["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    assert any("--env-file" in option for option in value["docker"]["run_options"]), "token and credentials"
    assert not any(
        word in (cluster / file).read_text() for word in ("RAY_AUTH_TOKEN=", "PGPASSWORD=", "RAY_AUTH_MODE=disabled")
    )
    assert not value["docker"]["image"].endswith(":latest")


@pytest.mark.parametrize("file", FILES)
def test_workers_find_the_head_and_prometheus_finds_them(cluster: Path, file: str) -> None:
    value = read(cluster, file)
    for commands in (value["head_start_ray_commands"], value["worker_start_ray_commands"]):
        assert commands[0] == "ray stop"
        assert "--metrics-export-port=8080" in commands[1]
        assert "\n" not in commands[1].strip()
    assert "--address=$RAY_HEAD_IP:6379" in value["worker_start_ray_commands"][1]
    assert value["worker_start_ray_commands"][1].startswith("export OMP_NUM_THREADS=")  # `ray up` would say 1
    assert mounts(value["docker"]["run_options"]) == {"/etc/viewmesh/keys", "/weights", "/cache"}
    assert mounts(value["docker"]["head_run_options"]) == {"/tmp/ray"}
    prometheus = (cluster / "prometheus.yml").read_text()
    assert "/tmp/ray/prom_metrics_service_discovery.json" in prometheus


def mounts(options: list[str]) -> set[str]:
    return {option.split(":")[1] for option in options if option.startswith("-v ")}


@pytest.mark.parametrize("file", FILES)
def test_containers_of_gpu_machines_are_given_the_gpus(cluster: Path, file: str) -> None:
    """Ray adds --runtime=nvidia only where Docker was told of that runtime, and says nothing where it was not."""
    value = read(cluster, file)
    gpu = value.get("available_node_types", {}).get("gpu", value)
    assert "--gpus all" in gpu["docker"]["worker_run_options"]


def test_a_load_balancer_of_the_vpc_reaches_the_head_on_aws(cluster: Path) -> None:
    from ray.autoscaler._private.aws.config import _create_default_inbound_rules

    value = read(cluster, "ray-up-aws.yaml")
    rules = _create_default_inbound_rules(["sg-1"], value["provider"]["security_group"]["IpPermissions"])
    (open_to_addresses,) = (rule for rule in rules if rule.get("FromPort") == 8000)
    assert open_to_addresses["IpRanges"] == [{"CidrIp": "10.0.0.0/16"}]
    for kind in value["available_node_types"].values():
        assert kind["node_config"]["SubnetIds"], "or the default VPC's, whose machines get public addresses"


def test_gpus_on_aws_scale_from_zero(cluster: Path, serve_config: dict[str, Any]) -> None:
    value = read(cluster, "ray-up-aws.yaml")
    kinds = value["available_node_types"]
    assert kinds[value["head_node_type"]]["resources"]["CPU"] == 0
    assert kinds["gpu"]["min_workers"] == 0
    deployments = {d["name"]: d for d in serve_config["applications"][0]["deployments"]}
    optimiser = deployments["Nvdiffrec"]
    assert kinds["gpu"]["max_workers"] >= optimiser["autoscaling_config"]["max_replicas"]
    assert kinds["gpu"]["resources"] == {
        "CPU": optimiser["ray_actor_options"].get("num_cpus", 1),  # Serve's default where only num_gpus is said
        "GPU": optimiser["ray_actor_options"]["num_gpus"],
    }
    least = sum(
        d.get("autoscaling_config", {}).get("min_replicas", d.get("num_replicas", 1))
        * d["ray_actor_options"]["num_cpus"]
        for d in deployments.values()
        if "num_gpus" not in d["ray_actor_options"]
    )
    assert kinds["cpu"]["min_workers"] * kinds["cpu"]["resources"]["CPU"] >= least
