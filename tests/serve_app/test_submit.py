"""`viewmesh submit` and `fetch` against services that are away, elsewhere, busy or gone in the middle."""

import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deployments.fakes import tiny_png
from serve_app import cli, client
from serve_app.command import app
from serve_app.ingress import free_port

JOB = "0123"
MESH = b"a mesh"
ARTIFACT = {
    "name": "mesh.glb",
    "url": f"/v1/reconstructions/{JOB}/artifacts/mesh.glb",
    "bytes": len(MESH),
    "sha256": hashlib.sha256(MESH).hexdigest(),
    "media_type": "model/gltf-binary",
}


class Service:
    """Answers as the service does, from a script: what each look at the job finds, then what its events are."""

    def __init__(self, port: int = 0) -> None:
        self.asked: list[tuple[str, str]] = []
        self.looks: list[dict[str, Any]] = []
        self.events: list[tuple[str, dict[str, Any]]] = [("done", {"state": "succeeded"})]
        self.end: dict[str, Any] = {"state": "succeeded", "artifacts": [ARTIFACT], "report": {"faces": 4}}
        self.gone = threading.Event()  # it hangs up on everybody
        service = self

        class Handler(BaseHTTPRequestHandler):
            def handle(self) -> None:
                if not service.gone.is_set():
                    super().handle()

            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                service.asked.append(("POST", self.path))
                state = "cancelled" if self.path.endswith("/cancel") else "queued"
                self.json({"state": state})

            def do_GET(self) -> None:
                service.asked.append(("GET", self.path))
                if self.path.endswith("/events"):
                    self.stream()
                elif self.path == ARTIFACT["url"]:
                    self.answer(MESH, "model/gltf-binary")
                else:
                    self.json(service.looks.pop(0) if service.looks else service.end)

            def json(self, value: dict[str, Any]) -> None:
                job = {"id": JOB, "kind": "reconstruction", "model": "nvdiffrec", "created_at": "", "options": {}}
                self.answer(json.dumps({**job, **value}).encode(), "application/json")

            def answer(self, body: bytes, media_type: str) -> None:
                self.send_response(200)
                self.send_header("content-type", media_type)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def stream(self) -> None:
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.end_headers()
                for number, (kind, data) in enumerate(service.events, 1):
                    if kind == "gone":
                        service.gone.set()
                        return
                    self.wfile.write(f"id: {number}\nevent: {kind}\ndata: {json.dumps(data)}\n\n".encode())

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    yield made
    made.close()


@pytest.fixture
def views(tmp_path: Path) -> Path:
    folder = tmp_path / "capture"
    folder.mkdir()
    (folder / "view_00.png").write_bytes(tiny_png())
    return folder


def viewmesh(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_nobody_at_the_address_is_said_after_a_few_seconds(views: Path, tmp_path: Path):
    url = f"http://127.0.0.1:{free_port()}"
    began = time.monotonic()
    result = viewmesh("submit", views, "-o", tmp_path / "out", "--url", url)
    assert time.monotonic() - began < 5
    assert result.exit_code == 1
    assert result.stderr.startswith(f"viewmesh: No service answers at {url}.\n")
    assert "viewmesh serve" in result.stderr
    assert "--url" in result.stderr


def test_a_service_that_comes_up_in_these_seconds_is_used():
    port, made = free_port(), []
    starting = threading.Timer(1.0, lambda: made.append(Service(port)))
    starting.start()
    with client.Client(f"http://127.0.0.1:{port}") as asking:
        assert asking.get(JOB).state == "succeeded"
    starting.join()
    made[0].close()


@pytest.mark.parametrize("url", ["localhost:8000", "127.0.0.1:8000", "ftp://host", "http://", "http://host:port", ""])
def test_what_is_no_url_is_refused_at_once(views: Path, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch):
    def connect(*_: object, **__: object) -> None:
        raise AssertionError("tried")

    monkeypatch.setattr(socket, "create_connection", connect)
    result = viewmesh("submit", views, "-o", tmp_path / "out", "--url", url)
    assert result.exit_code == 2
    assert "--url must begin with http:// or https://" in result.stderr
    assert not isinstance(result.exception, AssertionError)


def test_a_service_that_goes_away_is_one_sentence_with_the_job(
    views: Path, tmp_path: Path, service: Service, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(client, "RETRIES", 1)
    service.events = [("state", {"state": "running"}), ("gone", {})]
    result = viewmesh("submit", views, "-o", tmp_path / "out", "--url", service.url)
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 1
    said = result.stderr[result.stderr.index("viewmesh: ") :]
    assert said.startswith(
        f"viewmesh: The service at {service.url} no longer answers; job {JOB} goes on when it is back."
    )
    assert ("POST", f"/v1/reconstructions/{JOB}/cancel") not in service.asked


def test_a_page_of_something_else_is_not_printed(views: Path, tmp_path: Path, service: Service):
    service.server.RequestHandlerClass = SimpleHTTPRequestHandler  # knows no POST
    result = viewmesh("submit", views, "-o", tmp_path / "out", "--url", service.url)
    assert result.exit_code == 1
    assert "answered 501" in result.stderr
    assert "<" not in result.stderr


# what it shows


@pytest.fixture(params=["submit", "fetch"])
def command(request: pytest.FixtureRequest, views: Path, tmp_path: Path, service: Service) -> list[object]:
    """Both end alike, whoever sent the job."""
    given = {"submit": views, "fetch": JOB}[request.param]
    return [request.param, given, "-o", tmp_path / "out", "--url", service.url]


def test_the_place_in_the_queue_is_told_when_it_changes(
    command: list[object], service: Service, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cli, "LOOK_S", 0.01)
    service.looks = [{"state": "queued", "queue_position": place} for place in (2, 2, 1, 1, 0)]
    result = viewmesh(*command)
    assert result.exit_code == 0, result.output
    told = [line for line in result.stderr.splitlines() if line.startswith("queued")]
    assert told == ["queued, 2 before it", "queued, 1 before it", "queued, the next"]


def test_progress_notes_and_files(command: list[object], service: Service, tmp_path: Path):
    step = {"stage": "optimise", "step": 3, "steps": 40, "percent": 9.0, "eta_s": 2.0, "loss": 0.5}
    service.events = [("progress", step), ("done", {"state": "succeeded"})]
    service.end["report"] = {"faces": 4, "warnings": ["One view is dark.", "Another, too."]}
    result = viewmesh(*command)
    assert result.exit_code == 0, result.output
    *shown, first, second, last = result.stderr.splitlines()
    assert "optimise 3/40 loss 0.5" in shown
    assert (first, second) == ("note: One view is dark.", "note: Another, too.")
    assert last == f"{tmp_path / 'out' / 'mesh.glb'}: 4 faces"
    assert (tmp_path / "out" / "mesh.glb").read_bytes() == MESH


def test_ctrl_c_cancels_what_submit_sent_and_leaves_alone_what_fetch_waits_for(
    command: list[object], service: Service, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(client.Client, "events", interrupted)
    result = viewmesh(*command)
    assert result.exit_code == 130
    cancelled = ("POST", f"/v1/reconstructions/{JOB}/cancel") in service.asked
    assert cancelled == (command[0] == "submit")
    assert f"Job {JOB} {'cancelled' if cancelled else 'goes on'}." in result.stderr


def test_what_failed_says_why(command: list[object], service: Service, tmp_path: Path):
    service.end = {"state": "failed", "error": {"code": "invalid_input", "message": "Too dark.", "hint": "Light."}}
    result = viewmesh(*command)
    assert result.exit_code == 1
    assert result.stderr.endswith("viewmesh: Too dark.\n  Light.\n")
    assert not list((tmp_path / "out").iterdir())
