"""The service on a real Ray with real HTTP, as `viewmesh serve` starts it."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from deployments.fakes import fake_view

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def service(ray_service):
    return ray_service


@pytest.fixture
def client(service):
    with service.client() as made:
        yield made


def test_a_job_from_submit_to_files(service, client, tmp_path):
    job_id = service.submit(client, tmp_path, {"formats": ["glb", "ply"]}, optimise_s=2.5)
    told = list(client.events(job_id))
    service.assert_whole(client, job_id, told)
    files = client.download(job_id, tmp_path / "out")
    assert files["mesh.glb"].read_bytes()[:4] == b"glTF"
    assert "resumed" not in str(told)
    assert client.get(job_id).resumes == 0  # every slice found its session warm


def test_the_command_shows_progress_and_leaves_the_mesh(service, client, tmp_path):
    import typer

    from serve_app import cli

    app = typer.Typer()
    app.command()(cli.submit)
    views = tmp_path / "capture" / "views"
    views.mkdir(parents=True)
    (views / "view_00.png").write_bytes(fake_view())
    result = CliRunner().invoke(app, [str(views.parent), "-o", str(tmp_path / "out"), "--url", service.url])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "mesh.glb").exists()
    (views / "view_00.png").write_bytes(fake_view(fail="empty_reconstruction"))
    failed = CliRunner().invoke(app, [str(views.parent), "-o", str(tmp_path / "out2"), "--url", service.url])
    assert failed.exit_code == 1
    assert "masks agree on no volume" in failed.output


def test_cancelling_stops_the_work_within_two_seconds(service, client, tmp_path):
    job_id = service.submit(client, tmp_path, optimise_s=60, steps=600, scratch=str(tmp_path))
    service.await_step(client, job_id)
    assert client.cancel(job_id).state == "cancelled"
    time.sleep(2.0)
    steps = (tmp_path / "step").read_text()
    time.sleep(0.5)
    assert (tmp_path / "step").read_text() == steps


def test_many_jobs_at_once_all_end_whole(service, client, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda i: service.submit(client, tmp_path, {"seed": i}, optimise_s=0.1), range(12)))
    for job_id in ids:
        service.assert_whole(client, job_id)


def test_the_dashboard_wants_its_token(service):
    assert httpx.get(f"{service.dashboard()}/api/serve/applications/").status_code == 401
    assert service.status()["status"] == "RUNNING"
    assert {"Router", "Conductor", "Preprocessor", "Nvdiffrec", "Exporter"} == set(service.status()["deployments"])


def test_the_doctor_finds_it_well(service):
    from serve_app.command import app

    result = CliRunner().invoke(app, ["doctor", "--address", service.dashboard()])
    assert result.exit_code == 0, result.output
    for name in ("Router", "Conductor", "Preprocessor", "Nvdiffrec", "Exporter"):
        assert f"deployment {name}: healthy, 1 of 1 replicas running" in result.stdout
    assert f"service: {service.url} is ready" in result.stdout
    assert "nodes: 1 alive" in result.stdout
    refused = CliRunner().invoke(app, ["doctor", "--address", service.dashboard()], env={"RAY_AUTH_TOKEN": "wrong"})
    assert refused.exit_code == 1
    assert "refuses the token" in refused.stderr


def test_request_ids_and_problems_through_the_proxy(service):
    answer = httpx.get(f"{service.url}/v1/nope", headers={"x-request-id": "abc-1"})
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["request_id"] == "abc-1"
    assert answer.headers.get_list("x-request-id") == ["abc-1"]
    assert httpx.put(f"{service.url}/v1/reconstructions").status_code == 405
    assert httpx.head(f"{service.url}/readyz").status_code == 200
    big = httpx.post(f"{service.url}/v1/reconstructions/x/exports", content=b"x" * 2**21)
    assert (big.status_code, big.json()["code"]) == (413, "too_large")


def test_a_caller_cannot_set_the_time_limit_of_serve(service):
    script = fake_view(0, optimise_s=3)
    headers = {"prefer": "wait=2", "x-request-timeout-seconds": "0.3", "x-request-disconnect-disabled": "?1"}
    answer = httpx.post(
        f"{service.url}/v1/reconstructions", files=[("views", ("view_00.png", script))], headers=headers, timeout=30
    )
    assert answer.status_code == 202, answer.text
    assert answer.headers["preference-applied"] == "wait=2"


def test_models_are_ready_once_their_replica_runs(service):
    (served,) = [model for model in httpx.get(f"{service.url}/v1/models").json()["models"] if model["ready"]]
    assert (served["name"], served["reason"]) == ("nvdiffrec", "")


def test_replicas_log_json_with_the_ids_of_job_and_request(service, client, tmp_path):
    job_id = service.submit(client, tmp_path, optimise_s=0.1)
    service.assert_whole(client, job_id)
    session = next(
        part.split("=", 1)[1]
        for _, name in service.processes()
        for part in name.split()
        if part.startswith("--session_dir=")
    )
    for deployment, message in {"Conductor": "export done in", "Exporter": "a call of export: done"}.items():
        (file,) = Path(session).glob(f"logs/serve/replica_viewmesh_{deployment}_*.log")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert {line["deployment"] for line in lines if "deployment" in line} == {f"viewmesh_{deployment}"}
        told = [line for line in lines if line.get("reconstruction_id") == job_id]
        assert any(line["message"].startswith(message) for line in told)
        assert deployment == "Conductor" or all(line["request_id"] for line in told)
