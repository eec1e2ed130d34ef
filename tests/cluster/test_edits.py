"""What an edit of serve_config.yaml costs, deployed while a job runs. EDITS is the table of cluster/README.md."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from simulated_cluster import until

from serve_app import config as configuration
from serve_app.testing import RayService, deployment

ALL = frozenset({"Router", "Conductor", "Preprocessor", "Nvdiffrec", "Exporter"})
SLICE_STEPS = 10


@dataclass(frozen=True)
class Edit:
    """A row: what is edited, what replicas do, what a running job does; and a change with what it must lead to.

    restarts: deployments whose replicas are others afterwards. refused: the old version goes on serving.
    """

    what: str
    replicas: str
    jobs: str
    change: Callable[[dict], Any]
    restarts: frozenset[str] = field(default_factory=frozenset)
    refused: bool = False
    undo: Callable[[dict], Any] | None = None


def application(config: dict) -> dict:
    return config["applications"][0]


def of(name: str, **values: Any) -> Callable[[dict], None]:
    return lambda config: deployment(config, name).update(values)


def inside(name: str, key: str, **values: Any) -> Callable[[dict], None]:
    return lambda config: deployment(config, name).setdefault(key, {}).update(values)


EDITS = (
    Edit("`user_config`", "stay, and are told", "nothing", inside("Nvdiffrec", "user_config", slice_s=0.9)),
    Edit(
        "`user_config.slots`",
        "stay, and are told",
        "nothing",
        inside("Conductor", "user_config", slots={"nvdiffrec": 2}),
    ),
    Edit(
        "`autoscaling_config`",
        "stay",
        "nothing, unless fewer replicas are wanted: then at most one slice",
        inside("Nvdiffrec", "autoscaling_config", max_replicas=2),
    ),
    Edit("`max_ongoing_requests`", "stay", "nothing", of("Exporter", max_ongoing_requests=3)),
    Edit("`max_queued_requests`", "stay", "nothing", of("Exporter", max_queued_requests=100)),
    Edit(
        "`graceful_shutdown_timeout_s`, `health_check_…`",
        "stay",
        "nothing",
        of("Nvdiffrec", graceful_shutdown_timeout_s=50, health_check_period_s=4, health_check_timeout_s=20),
    ),
    Edit(
        "`ray_actor_options`",
        "of this deployment: restarted",
        "go on from their checkpoints: at most one slice",
        inside("Nvdiffrec", "ray_actor_options", num_cpus=0.1),
        restarts=frozenset({"Nvdiffrec"}),
    ),
    Edit(
        "`args`",
        "all: restarted",
        "go on from their checkpoints: at most one slice",
        lambda config: application(config)["args"].update(retention_s=7200),
        restarts=ALL,
    ),
    Edit(
        "wrong `args`",
        "the deploy fails, the old version goes on serving",
        "nothing",
        lambda config: application(config)["args"].update(nonsense=1),
        refused=True,
        undo=lambda config: application(config)["args"].pop("nonsense"),
    ),
    Edit(
        "wrong `import_path`, unknown deployment",
        "the deploy fails, the old version goes on serving",
        "nothing",
        lambda config: application(config).update(import_path="serve_app.app:biuld"),
        refused=True,
        undo=lambda config: application(config).update(import_path="serve_app.app:build"),
    ),
    Edit(
        "misspelt key",
        "stay: Ray ignores it, `viewmesh config check` finds it",
        "nothing",
        of("Exporter", max_ongoing_request=9),
        undo=lambda config: deployment(config, "Exporter").pop("max_ongoing_request"),
    ),
    Edit(
        "`http_options`",
        "stay: not applied while Serve runs, Serve's log says so",
        "nothing",
        lambda config: config["http_options"].update(port=config["http_options"]["port"] + 1),
    ),
)
BY_HAND = ("image, Ray's version, pods",)  # rows of the table that no test here can try


def rows(text: str) -> dict[str, tuple[str, str]]:
    section = text.split("## What an edit costs", 1)[1].split("\n## ", 1)[0]
    found = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", section, re.MULTILINE)
    return {what: (replicas, jobs) for what, replicas, jobs in found if what not in ("edit", "---")}


def test_the_table_is_the_tests(cluster: Path) -> None:
    found = rows((cluster / "README.md").read_text())
    for what in BY_HAND:
        found.pop(what)
    assert found == {edit.what: (edit.replicas, edit.jobs) for edit in EDITS}


def test_the_head_of_serve_config_says_the_same() -> None:
    text = (Path(__file__).resolve().parents[2] / "serve_config.yaml").read_text()
    head = re.sub(r",\n# +", ", ", text.split("\n\n", 1)[0])
    nothing, one, everything = (
        re.search(rf"^# +(.+?)  +{words}", head, re.MULTILINE)
        for words in ("nothing: ", "the deployment's replicas", "all replicas")
    )
    assert nothing
    assert one
    assert everything
    for edit in EDITS:
        (key, *_) = re.findall(r"`(\w+)", edit.what) or [""]
        if key and not edit.refused and key in text and key != "http_options":
            line = everything if edit.restarts == ALL else one if edit.restarts else nothing
            named = [
                word.rstrip("_") for word in re.findall(r"\w+", line[1])
            ]  # graceful_shutdown_… names what begins so
            assert any(key.startswith(word) for word in named), f"{key} does not stand in its line: {line[0]}"


# --- what happens ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    def change(config: dict) -> None:
        deployment(config, "Nvdiffrec")["ray_actor_options"] = {"num_cpus": 0, "num_gpus": 0}

    with RayService(tmp_path_factory.mktemp("edits"), change) as running:
        yield running


def replicas(service: RayService) -> dict[str, set[int]]:
    """Process ids; not from Serve's status, which lists no deployment after a deploy that failed."""
    return {name: set(service.pids(name)) for name in ALL}


def deployed(service: RayService, change: Callable[[dict], Any]) -> str:
    """Deploys; the status that it came to."""
    before = service.status()["last_deployed_time_s"]
    service.deploy(change)

    def over() -> str:
        now = service.status()
        fresh = now["last_deployed_time_s"] > before
        return now["status"] if fresh and now["status"] in ("RUNNING", "DEPLOY_FAILED") else ""

    return until(over, 90, "the deploy is over")


@pytest.mark.ray
@pytest.mark.scale
@pytest.mark.timeout(300)
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: re.sub(r"\W+", "-", edit.what).strip("-"))
def test_an_edit_while_a_job_runs(service: RayService, edit: Edit, tmp_path: Path) -> None:
    try:
        observe(service, edit, tmp_path)
    finally:
        if edit.undo is not None:
            assert deployed(service, edit.undo) == "RUNNING"


def observe(service: RayService, edit: Edit, folder: Path) -> None:
    with service.client() as client:
        job_id = service.submit(client, folder, optimise_s=15, steps=150, scratch=str(folder))
        service.await_step(client, job_id, 15)
        follower = service.follow(client, job_id)
        before = replicas(service)
        status = deployed(service, edit.change)
        assert status == ("DEPLOY_FAILED" if edit.refused else "RUNNING"), service.status()["message"]
        after = replicas(service)
        changed = {name for name in ALL if not before[name] & after[name]}
        assert changed == edit.restarts
        assert httpx.get(f"{service.url}/livez").status_code == 200  # on the port it had
        service.assert_whole(client, job_id, follower.all(150))
        resumed = client.get(job_id).resumes
        steps = [line.split()[1] for line in (folder / "step").read_text().splitlines()]
        assert len(steps) - len(set(steps)) <= SLICE_STEPS + 1
        if "Nvdiffrec" not in edit.restarts:
            why = re.findall(r".*(?:lost its worker|lease|could not be called).*", service.log())[-3:]
            assert (resumed, len(steps)) == (0, 150), f"the job was touched: {why}"
        else:
            assert resumed >= 1


@pytest.mark.parametrize("edit", [edit for edit in EDITS if edit.undo], ids=lambda edit: edit.what)
def test_config_check_finds_what_ray_would_not_take(edit: Edit) -> None:
    config = yaml.safe_load((Path(__file__).resolve().parents[2] / "serve_config.yaml").read_text())
    edit.change(config)
    found = configuration.check(config)
    if not found:
        from viewmesh.errors import OptionError

        with pytest.raises(OptionError, match="biuld"):
            configuration.import_target(config)


@pytest.mark.ray
@pytest.mark.scale
def test_http_options_are_said_to_be_ignored(service: RayService) -> None:
    session = next(
        part.split("=", 1)[1] for _, name in service.processes() for part in name.split() if "--session_dir=" in part
    )
    logs = [file.read_text(errors="replace") for file in Path(session).glob("logs/**/*") if file.is_file()]
    assert any(re.search(r"HTTP config differs[^\n]*port[^\n]*ignored", text) for text in logs)
