"""For tests and benchmarks: the whole service on a real Ray, as `viewmesh serve` starts it; and ways to hurt it."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import yaml

from deployments.fakes import fake_view
from serve_app import cli
from serve_app.client import Client, Event
from serve_app.ingress import free_port
from viewmesh.options import Options


def deployment(config: dict, name: str) -> dict:
    return next(d for d in config["applications"][0]["deployments"] if d["name"] == name)


class RayService:
    """start(), stop(), and again: the data folder stays."""

    def __init__(
        self,
        data: Path,
        change: Callable[[dict], None] | None = None,
        env: dict[str, str] | None = None,
        address: str = "local",
    ) -> None:
        self.data, self.env, self.address = data, env or {}, address
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

        def changed(config: dict) -> None:
            config["applications"][0]["args"]["fake"] = {"optimise_s": 0.5}
            deployment(config, "Nvdiffrec")["user_config"]["slice_s"] = 1.0
            if change is not None:
                change(config)

        self.file = cli.write_adapted(cli.DEFAULT_CONFIG, data, port=self.port, change=changed)
        self.child: subprocess.Popen | None = None

    def start(self) -> "RayService":
        (self.data / "serve.log").write_text("")
        self.child = cli.start(self.file, self.data, env=self.env, address=self.address)
        cli.await_ready(self.url, self.child, self.data)
        return self

    def stop(self) -> None:
        if self.child is not None:
            cli.stop(self.child)
            self.child = None

    def __enter__(self) -> "RayService":
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def client(self) -> Client:
        return Client(self.url)

    # --- jobs ------------------------------------------------------------------------------------------------------

    def submit(self, client: Client, folder: Path, options: dict[str, Any] | None = None, **script: Any) -> str:
        views = folder / f"job-{time.monotonic_ns()}" / "views"
        views.mkdir(parents=True)
        for i in range(2):
            (views / f"view_{i:02d}.png").write_bytes(fake_view(i, **(script if i == 0 else {})))
        return client.submit(views.parent, Options.model_validate(options or {})).id

    def assert_whole(self, client: Client, job_id: str, events: list[Event] | None = None) -> None:
        """The job succeeded, its artifacts are what their sha256 says, its events have no gap and no repeat."""
        job = client.wait(job_id)
        assert job.state == "succeeded", job.error
        for artifact in job.artifacts:
            body = client.http.get(artifact.url).content
            assert hashlib.sha256(body).hexdigest() == artifact.sha256
        told = events if events is not None else list(client.events(job_id))
        assert [event.id for event in told] == list(range(1, len(told) + 1))
        assert [event.type for event in told].count("done") == 1
        percents = [event.data["percent"] for event in told if event.type == "progress"]
        assert percents == sorted(set(percents))

    def follow(self, client: Client, job_id: str) -> "Follower":
        return Follower(client, job_id)

    def await_step(self, client: Client, job_id: str, step: int = 1, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            job = client.get(job_id)
            if job.stage == "optimise" and job.step >= step:
                return
            assert job.state in ("queued", "running"), job
            time.sleep(0.1)
        raise AssertionError(f"{job_id} made no progress: {client.get(job_id)}")

    # --- harm ------------------------------------------------------------------------------------------------------

    def pids(self, deployment_name: str) -> list[int]:
        title = f"ray::ServeReplica:viewmesh:{deployment_name}"
        return [pid for pid, name in self.processes() if name.startswith(title)]

    def processes(self) -> list[tuple[int, str]]:
        """(pid, title) of everything that descends from the service."""
        assert self.child is not None
        parents, names = {}, {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                    names[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                except (OSError, ValueError):
                    continue
        found = []
        for pid, name in names.items():
            at = pid
            while at in parents and at != self.child.pid:
                at = parents[at]
            if at == self.child.pid:
                found.append((pid, name))
        return found

    def kill(self, deployment_name: str) -> int:
        (pid, *_) = self.pids(deployment_name)
        os.kill(pid, signal.SIGKILL)
        return pid

    def deploy(self, change: Callable[[dict], None]) -> None:
        """`serve deploy` of the changed config, with the token that Ray wants."""
        config = yaml.safe_load(self.file.read_text())
        change(config)
        self.file.write_text(yaml.safe_dump(config, sort_keys=False))
        serve = [sys.executable, "-c", "from ray.serve.scripts import cli; cli()"]  # also where its script is elsewhere
        command = [*serve, "deploy", "-a", self.dashboard(), str(self.file)]
        subprocess.run(
            command, check=True, capture_output=True, timeout=60, env={**os.environ, "RAY_AUTH_MODE": "token"}
        )

    def dashboard(self) -> str:
        found = re.search(r"dashboard at\D*?(https?://)?(127\.0\.0\.1:\d+)", self.log())
        assert found, self.log()[-500:]
        return f"http://{found.group(2)}"

    def status(self) -> dict[str, Any]:
        token = (Path.home() / ".ray" / "auth_token").read_text().strip()
        answer = httpx.get(f"{self.dashboard()}/api/serve/applications/", headers={"authorization": f"Bearer {token}"})
        return answer.raise_for_status().json()["applications"]["viewmesh"]

    def await_running(self, seconds: float = 90) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.status()["status"] == "RUNNING":
                return
            time.sleep(0.5)
        raise AssertionError(self.status())

    def log(self) -> str:
        return re.sub(r"\x1b\[[0-9;]*m", "", (self.data / "serve.log").read_text(errors="replace"))


class Follower(threading.Thread):
    """Collects a job's events in the background."""

    def __init__(self, client: Client, job_id: str) -> None:
        super().__init__(daemon=True)
        self.client, self.job_id = client, job_id
        self.events: list[Event] = []
        self.start()

    def run(self) -> None:
        for event in self.client.events(self.job_id):
            self.events.append(event)

    def all(self, seconds: float = 90) -> list[Event]:
        self.join(seconds)
        assert not self.is_alive(), f"the stream of {self.job_id} did not end"
        return self.events
