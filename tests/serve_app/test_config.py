"""serve_config.yaml: every key is known, and the shipped file fits any machine."""

import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from deployments.trellis import Trellis
from serve_app import cli, config
from serve_app.app import build
from serve_app.ingress import free_port
from serve_app.settings import AppArgs, ConductorConfig

FILE = Path(__file__).parents[2] / "serve_config.yaml"


@pytest.fixture
def shipped():
    return config.load(FILE)


def application(value):
    return value["applications"][0]


def deployment(value, name):
    return next(d for d in application(value)["deployments"] if d["name"] == name)


def test_the_shipped_file_is_clean_and_complete(shipped):
    assert config.check(shipped) == []
    assert [d["name"] for d in application(shipped)["deployments"]] == list(config.DEPLOYMENTS)
    assert set(application(shipped)["args"]) == set(AppArgs.model_fields)
    for entry in application(shipped)["deployments"]:
        wanted = {"max_ongoing_requests", "graceful_shutdown_timeout_s", "health_check_period_s", "ray_actor_options"}
        assert wanted <= set(entry), entry["name"]


def test_the_shipped_file_is_in_the_wheel():
    """`viewmesh serve` finds it beside its code; setuptools takes package data through links, and only patterns."""
    beside = Path(cli.__file__).parent / FILE.name
    assert cli.DEFAULT_CONFIG == beside.resolve() == FILE
    with (FILE.parent / "pyproject.toml").open("rb") as project:
        shipped = tomllib.load(project)["tool"]["setuptools"]["package-data"]
    assert beside.name in shipped["serve_app"]


def test_the_shipped_arguments_are_the_defaults(shipped):
    given = AppArgs.model_validate(application(shipped)["args"]).model_dump()
    assert given == AppArgs().model_dump()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c.update(htp_options={}), "htp_options: unknown key (did you mean 'http_options'?)"),
        (lambda c: deployment(c, "Router").update(max_ongoing_request=3), "max_ongoing_request: unknown key"),
        (lambda c: deployment(c, "Nvdiffrec")["autoscaling_config"].update(max_replica=1), "max_replica: unknown key"),
        (lambda c: deployment(c, "Nvdiffrec")["ray_actor_options"].update(gpus=1), "gpus: unknown key"),
        (lambda c: deployment(c, "Exporter").update(name="Exportr"), "did you mean 'Exporter'?"),
        (lambda c: application(c)["args"].update(datta="x"), "args.datta"),
        (lambda c: application(c)["args"]["auth"].update(opn=True), "args.auth.opn"),
        (lambda c: deployment(c, "Router")["user_config"]["limits"].update(file_byte=1), "limits.file_byte"),
        (lambda c: deployment(c, "Nvdiffrec")["user_config"].update(slice=1), "did you mean 'slice_s'?"),
        (lambda c: deployment(c, "Conductor")["user_config"]["slots"].update(trelis=1), "user_config.slots.trelis"),
        (lambda c: deployment(c, "Router").update(num_replicas=-1), "num_replicas"),
        (lambda c: application(c).update(import_path=3), "import_path"),
        (
            lambda c: deployment(c, "Preprocessor")["autoscaling_config"].update(min_replicas=9),
            "deployments.2.autoscaling_config: Value error, max_replicas (8)",
        ),
    ],
)
def test_each_mistake_is_named(shipped, change, sentence):
    change(shipped)
    assert any(sentence in found for found in config.check(shipped)), config.check(shipped)


def test_without_a_gpu_the_optimiser_runs_on_the_cpu(shipped, tmp_path):
    fitted = config.adapted(shipped, cpus=2, gpus=0, data=tmp_path, port=9000)
    assert deployment(fitted, "Nvdiffrec")["ray_actor_options"] == {"num_gpus": 0, "num_cpus": 1}
    assert deployment(fitted, "Nvdiffrec")["autoscaling_config"]["max_replicas"] == 1
    assert fitted["http_options"]["port"] == 9000
    assert config.check(fitted) == []
    asked = sum(d["ray_actor_options"].get("num_cpus", 1) for d in application(fitted)["deployments"])
    assert asked <= 2


@pytest.mark.parametrize("cpus", [1, 2, 16])
@pytest.mark.parametrize("gpus", [0, 2])
def test_what_a_smaller_machine_cannot_hold_is_lowered_as_a_whole(shipped, cpus, gpus):
    for name in ("Preprocessor", "Nvdiffrec", "Exporter"):
        deployment(shipped, name)["autoscaling_config"].update(min_replicas=3, initial_replicas=4)
    fitted = config.adapted(shipped, cpus=cpus, gpus=gpus)
    assert config.check(fitted) == []
    for name in ("Preprocessor", "Exporter"):
        assert deployment(fitted, name)["autoscaling_config"]["min_replicas"] == min(3, max(1, cpus // 2))


def test_a_service_that_ends_by_itself_ends_the_command_with_its_last_words(tmp_path, monkeypatch):
    def start(file, data, **given):
        (data / "serve.log").write_text("no memory left")
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])

    monkeypatch.setattr(cli, "start", start)
    monkeypatch.setattr(cli, "await_ready", lambda *args: None)
    monkeypatch.setattr(signal, "signal", lambda *args: None)  # the test's own
    result = serve("--data", tmp_path, "--port", free_port())
    assert result.exit_code != 0
    assert "exit 7" in result.stderr
    assert "no memory left" in result.stderr


def serve(*words):
    command = typer.Typer()
    command.command()(cli.serve)
    return CliRunner().invoke(command, [str(word) for word in words])


@pytest.fixture
def unstarted(monkeypatch):
    def start(*_, **__):
        raise AssertionError("started")

    monkeypatch.setattr(cli, "start", start)


def test_a_taken_port_is_refused_before_anything_starts(tmp_path, unstarted):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host in ("127.0.0.1", "localhost"):
            result = serve("--data", tmp_path, "--port", port, "--host", host)
            assert result.exit_code == 2
            assert result.stderr == f"viewmesh: Port {port} of {host} is taken; choose another with --port.\n"
    assert isinstance(serve("--data", tmp_path, "--port", port).exception, AssertionError)  # it is free now


@pytest.mark.parametrize("port", ["0", "65536", "-1"])
def test_a_port_that_cannot_be_is_refused(tmp_path, unstarted, port):
    result = serve("--data", tmp_path, "--port", port)
    assert result.exit_code == 2
    assert "Invalid value for '--port'" in result.stderr


def test_a_configs_port_that_cannot_be_is_refused(shipped, tmp_path, unstarted):
    shipped["http_options"]["port"] = 99999
    file = tmp_path / "far.yaml"
    file.write_text(yaml.safe_dump(shipped))
    result = serve("--config", file, "--data", tmp_path)
    assert result.exit_code == 2
    assert "99999" in result.stderr


@pytest.mark.parametrize(
    ("host", "said"), [("0.0.0.0", "no API keys"), ("192.0.2.1", "no API keys"), ("127.0.0.1.invalid", "--host")]
)
def test_an_address_that_the_service_would_refuse_is_refused_at_once(tmp_path, unstarted, host, said):
    result = serve("--data", tmp_path, "--port", free_port(), "--host", host)
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_public_address_with_keys_may_start(shipped, tmp_path, unstarted):
    application(shipped)["args"]["auth"]["open"] = True
    file = tmp_path / "open.yaml"
    file.write_text(yaml.safe_dump(shipped))
    result = serve("--config", file, "--data", tmp_path, "--port", free_port(), "--host", "0.0.0.0")
    assert isinstance(result.exception, AssertionError)


@pytest.mark.parametrize(("cpus", "gpus", "count"), [(2, 0, 2), (16, 1, 4), (64, 4, 4), (2, 4, 1)])
def test_workers_beside_gpus_compute_with_a_quarter_of_their_share(cpus, gpus, count):
    assert set(cli.threads(cpus, gpus).values()) == {str(count)}


@pytest.mark.parametrize(("gpus", "slots"), [(8, 8), (1, 1), (0, 1)])
def test_no_jobs_take_turns_on_the_replicas_that_there_are(shipped, gpus, slots):
    fitted = config.adapted(shipped, cpus=16, gpus=gpus)
    assert deployment(fitted, "Conductor")["user_config"]["slots"] == {"nvdiffrec": slots}
    application(shipped)["deployments"] = [deployment(shipped, "Nvdiffrec")]
    fitted = config.adapted(shipped, cpus=16, gpus=gpus)
    assert deployment(fitted, "Conductor")["user_config"]["slots"] == {"nvdiffrec": slots}
    assert config.check(fitted) == []


def test_the_usual_seats_of_a_generative_model_are_what_one_replica_works_on():
    conductor = ConductorConfig.model_validate({"slots": {"reconviagen": 3}})
    assert conductor.slots_of("trellis") == Trellis.max_ongoing_requests == 18
    assert conductor.slots_of("reconviagen") == 3
    assert conductor.slots_of("nvdiffrec") == 4


def test_what_the_config_names_stays_and_what_the_command_names_wins(shipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.yaml"
    shipped["http_options"]["port"] = 9001
    application(shipped)["args"].update(data="mine", database="postgresql://db/viewmesh", artifacts="s3://bucket/here")
    file.write_text(yaml.safe_dump(shipped))

    def fitted(data=None, **given):
        written = cli.write_adapted(file, data, **given)
        value = config.load(written)
        assert application(value)["args"]["data"] == str(written.parent.absolute())
        assert application(value)["args"]["database"] == "postgresql://db/viewmesh"
        assert application(value)["args"]["artifacts"] == "s3://bucket/here"
        return written.parent.absolute(), cli.listening_at(written)

    assert fitted() == (tmp_path / "mine", "http://127.0.0.1:9001")
    assert fitted(Path("other"), port=9002, host="0.0.0.0") == (tmp_path / "other", "http://127.0.0.1:9002")
    application(shipped)["args"] = {}
    assert config.data_folder(shipped) == Path("data")
    args = AppArgs.model_validate(application(config.adapted(shipped, cpus=2, gpus=0, data=tmp_path / "x"))["args"])
    assert args.database_url() == f"sqlite:///{tmp_path}/x/jobs.sqlite"


def test_the_command_says_what_is_wrong(tmp_path):
    from serve_app.cli import config as command

    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump({"applications": [], "htp_options": {}}))
    result = CliRunner().invoke(command, ["check", str(bad)])
    assert result.exit_code == 2
    assert "htp_options" in result.stderr
    assert CliRunner().invoke(command, ["check", str(FILE)]).exit_code == 0
    (tmp_path / "no.yaml").write_text("{")
    assert CliRunner().invoke(command, ["check", str(tmp_path / "no.yaml")]).exit_code == 2


def test_the_graph_is_built_without_heavy_imports():
    program = (
        "import sys; from serve_app.app import build; from serve_app.settings import AppArgs; build(AppArgs());"
        "assert not {'torch', 'numba', 'viewmesh.nvdiffrec.fit'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=FILE.parent)


def test_unknown_arguments_are_refused():
    with pytest.raises(ValueError, match="datta"):
        AppArgs.model_validate({"datta": 1})
    assert build(AppArgs(fake={})) is not None
