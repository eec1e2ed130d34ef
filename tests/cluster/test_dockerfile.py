"""The Dockerfile, read as instructions: the laws that hadolint checks and what the service needs. Nothing is built."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from serve_app import config as configuration
from serve_app import ingress
from serve_app.settings import AppArgs
from viewmesh import runtime

ROOT = Path(__file__).resolve().parents[2]
KNOWN = "ARG CMD COPY ENTRYPOINT ENV EXPOSE FROM HEALTHCHECK RUN SHELL STOPSIGNAL USER VOLUME WORKDIR"


@dataclass(frozen=True)
class Instruction:
    name: str
    text: str
    stage: int  # -1 before the first FROM


def instructions(source: str) -> list[Instruction]:
    joined = re.sub(r"\\\n", " ", "\n".join(line for line in source.splitlines() if not line.lstrip().startswith("#")))
    found, stage = [], -1
    for line in filter(None, (line.strip() for line in joined.splitlines())):
        name, _, text = line.partition(" ")
        stage += name == "FROM"
        found.append(Instruction(name, re.sub(r"\s+", " ", text.strip()), stage))
    return found


ALL = instructions((ROOT / "Dockerfile").read_text())
LAST = max(i.stage for i in ALL)


def of(name: str, *, last: bool = False) -> list[str]:
    return [i.text for i in ALL if i.name == name and (not last or i.stage == LAST)]


def test_only_known_instructions() -> None:
    assert {i.name for i in ALL} <= set(KNOWN.split())


def test_stages_are_named_and_their_images_have_tags() -> None:
    defaults = dict(text.split("=", 1) for text in (i.text for i in ALL if i.name == "ARG" and i.stage == -1))
    for text in of("FROM"):
        image = re.sub(r"\$\{(\w+)\}", lambda found: defaults[found[1]], text.split()[0])
        assert re.fullmatch(r"[\w./-]+:[\w.-]+", image), image
        assert not image.endswith(":latest")
        assert text.split()[1] == "AS"
    assert "runtime" in defaults["BASE"]
    assert "cuda" in defaults["BASE"]
    assert len(of("FROM")) == 2


def test_apt_is_pinned_and_cleaned() -> None:
    installs = [text for text in of("RUN") if "apt-get install" in text]
    assert installs
    for text in installs:
        assert "--no-install-recommends" in text
        assert " -y " in text
        assert "apt-get update &&" in text
        assert text.endswith("rm -rf /var/lib/apt/lists/*")
        packages = text.split("--no-install-recommends")[1].split("&&")[0].split()
        assert all(re.fullmatch(r"[a-z0-9+.-]+=\S+", package) for package in packages), packages
    assert not any(re.search(r"\bapt (?!-get)|sudo|cd /", text) for text in of("RUN"))


def test_pip_is_pinned_by_the_constraints_and_keeps_no_cache() -> None:
    commands = [c for text in of("RUN") for c in re.split(r"&&|;", text) if re.search(r"\bpip install\b", c)]
    assert len(commands) == 4
    for command in commands:
        assert "--no-cache-dir" in command
        assert "-c constraints.txt" in command


def test_extras_and_copied_files_exist() -> None:
    assert of("ARG").count("NVDIFFRAST=0") == 1, "its licence is non-commercial: nobody gets it unasked"
    project = (ROOT / "pyproject.toml").read_text()
    extras = next(text for text in of("ARG") if text.startswith("EXTRAS=")).split("=")[1]
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras.split(","))
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for text in of("COPY"):
        if not text.startswith("--from"):
            for source in text.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert source in let_in or f"{source}/**" in let_in, f"{source} does not reach the builder"


def test_what_is_linked_to_is_copied_before_it_is_installed() -> None:
    """serve_app/serve_config.yaml is a link; setuptools leaves one out that leads nowhere."""
    steps = [i.text for i in ALL if i.name in ("COPY", "RUN")]
    copied = next(n for n, text in enumerate(steps) if "serve_config.yaml" in text.split()[:-1])
    assert copied < next(n for n, text in enumerate(steps) if '".[' in text)


def test_torch_of_the_constraints_is_found() -> None:
    assert re.search(r"^torch==\d+\.\d+\.\d+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def test_runs_as_a_user_without_rights() -> None:
    user = of("USER", last=True)[-1]
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user), "a number, so that runAsNonRoot can be checked"
    after = [i.name for i in ALL if i.stage == LAST][[i.name for i in ALL if i.stage == LAST].index("USER") :]
    assert "RUN" not in after
    assert "COPY" not in after
    assert all(path.startswith("/") for path in of("WORKDIR"))


@pytest.mark.parametrize("name", ["VIEWMESH_WEIGHTS", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "NUMBA_CACHE_DIR"])
def test_weights_and_caches_lie_on_volumes(name: str) -> None:
    environment = dict(pair.split("=", 1) for pair in " ".join(of("ENV", last=True)).split())
    volumes = json.loads(of("VOLUME")[0])
    assert any(environment[name].startswith(volume) for volume in volumes)
    assert environment["RAY_AUTH_MODE"] == "token"
    served = ingress.environment()
    served.pop("RAY_SERVE_HAPROXY_NBTHREAD", None)  # by the machine
    assert (served | runtime.ENVIRONMENT).items() <= environment.items()  # as `viewmesh serve` sets it


def test_commands_are_lists_and_serve_takes_their_options() -> None:
    from typer.testing import CliRunner

    from serve_app.command import app

    assert json.loads(of("ENTRYPOINT")[0]) == [], "`ray up` runs the image with `bash`"
    command = json.loads(of("CMD")[0])
    assert command[:4] == ["viewmesh", "serve", "--host", "0.0.0.0"]
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    assert all(word in shown for word in command if word.startswith("--"))
    assert "/livez" in of("HEALTHCHECK")[0]
    assert isinstance(json.loads(of("HEALTHCHECK")[0].split("CMD ")[1]), list)


def test_the_config_of_the_image_wants_keys() -> None:
    """What the `sed` of the Dockerfile does to serve_config.yaml, done here."""
    run = next(text for text in of("RUN") if "sed " in text)
    pattern, replacement = re.search(r"sed 's#(.+?)#(.+?)#'", run).groups()  # pyright: ignore
    edited = re.sub(
        pattern.replace(r"\(", "(").replace(r"\)", ")"),
        replacement,
        (ROOT / "serve_config.yaml").read_text(),
        flags=re.MULTILINE,
    )
    value = yaml.safe_load(edited)
    assert configuration.check(value) == []
    auth = AppArgs(**value["applications"][0]["args"]).auth
    assert str(auth.keys_file) == "/etc/viewmesh/keys/keys.yaml"
    assert not auth.open
