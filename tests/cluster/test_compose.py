"""cluster/compose.yaml against the Compose Specification's schema, and against what the service asks for."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml


@pytest.fixture(scope="module")
def compose(cluster: Path) -> dict[str, Any]:
    return yaml.safe_load((cluster / "compose.yaml").read_text())


def test_schema(compose: dict[str, Any]) -> None:
    schema = json.loads((Path(__file__).parent / "compose-spec.json").read_text())
    validator = jsonschema.Draft7Validator(schema)
    assert [f"{list(e.path)}: {e.message}" for e in validator.iter_errors(compose)] == []
    assert not validator.is_valid({**compose, "services": {"a": {"imagee": "b"}}}), "the schema is closed"


def test_images_are_pinned(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert re.search(r":[\w.-]*\d[\w.-]*$", service["image"]), name


def test_only_the_service_is_reachable_from_elsewhere(compose: dict[str, Any]) -> None:
    ports = {name: service.get("ports", []) for name, service in compose["services"].items()}
    public = {name: [p for p in given if not p.startswith("127.0.0.1:")] for name, given in ports.items()}
    assert {name: p for name, p in public.items() if p} == {"service": ["8000:8000"]}
    assert compose["networks"]["store"]["internal"] is True
    for name in ("postgres", "minio"):
        assert compose["services"][name]["networks"] == ["store"]


def test_no_password_is_written_down(compose: dict[str, Any], cluster: Path) -> None:
    for service in compose["services"].values():
        for key, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET_ACCESS|TOKEN|MC_HOST", key):
                assert re.search(r"\$\{[A-Z_]+:\?", value), f"{key} must be refused when it is not set"
    ignored = (cluster / ".gitignore").read_text().split()
    assert ".env" in ignored
    assert "keys/" in ignored


def test_names_that_refer_to_something_do(compose: dict[str, Any], cluster: Path) -> None:
    for service in compose["services"].values():
        assert set(service.get("networks", [])) <= compose["networks"].keys()
        assert set(service.get("depends_on", [])) <= compose["services"].keys()
        assert {c["source"] for c in service.get("configs", [])} <= compose["configs"].keys()
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if not source.startswith("./"):
                assert source in compose["volumes"]
            elif source != "./keys":  # made by whoever deploys
                assert (cluster / source).is_file()


def test_the_service_finds_its_database_store_keys_and_gpus(compose: dict[str, Any], cluster: Path) -> None:
    service, services = compose["services"]["service"], compose["services"]
    environment = service["environment"]
    args = yaml.safe_load((cluster / "serve_config.yaml").read_text())["applications"][0]["args"]
    assert environment["PGHOST"] in services
    assert environment["PGUSER"] == services["postgres"]["environment"]["POSTGRES_USER"]
    assert args["database"] == f"postgresql:///{services['postgres']['environment']['POSTGRES_DB']}"
    assert environment["PGPASSWORD"] == services["postgres"]["environment"]["POSTGRES_PASSWORD"]
    assert re.fullmatch(r"http://minio:\d+", environment["AWS_ENDPOINT_URL"])
    assert environment["AWS_ACCESS_KEY_ID"] == services["minio"]["environment"]["MINIO_ROOT_USER"]
    assert environment["AWS_SECRET_ACCESS_KEY"] == services["minio"]["environment"]["MINIO_ROOT_PASSWORD"]
    assert services["bucket"]["command"][-1].split("/")[1] == args["artifacts"].split("/")[2]
    mounted = {volume.split(":")[1] for volume in service["volumes"]}
    assert str(Path(args["auth"]["keys_file"]).parent) in mounted
    assert {"/weights", "/cache", args["data"], "/etc/viewmesh/serve_config.yaml"} <= mounted
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def test_ray_runs_as_the_service_and_the_scraper_expect(compose: dict[str, Any]) -> None:
    service = compose["services"]["service"]
    command = service["command"][-1]
    assert "--metrics-export-port=8080" in command
    assert "exec serve run --address auto /etc/viewmesh/serve_config.yaml" in command
    assert service["environment"]["RAY_AUTH_MODE"] == "token"
    assert service["stop_signal"] == "SIGINT"
    assert "/readyz" in " ".join(service["healthcheck"]["test"])


def test_grafana_is_provisioned(compose: dict[str, Any], cluster: Path) -> None:
    dashboard = json.loads((cluster / "grafana-dashboard.json").read_text())
    (source,) = yaml.safe_load(compose["configs"]["grafana-datasource"]["content"])["datasources"]
    assert source["uid"] == dashboard["panels"][1]["datasource"]["uid"]
    assert source["url"].split("//")[1].split(":")[0] in compose["services"]
    (provider,) = yaml.safe_load(compose["configs"]["grafana-dashboards"]["content"])["providers"]
    mounts = [volume.split(":")[1] for volume in compose["services"]["grafana"]["volumes"]]
    assert any(mount.startswith(provider["options"]["path"]) for mount in mounts)
