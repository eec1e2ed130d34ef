"""cluster/README.md: what it names is there."""

import re
from pathlib import Path

import pytest

from viewmesh.weights.manifest import WEIGHT_SETS


@pytest.fixture(scope="module")
def text(cluster: Path) -> str:
    return (cluster / "README.md").read_text()


def test_files_that_it_names_exist_and_the_other_way_round(text: str, cluster: Path) -> None:
    for name in re.findall(r"cluster/([\w-]+\.(?:ya?ml|json))", text):
        assert (cluster / name).is_file(), name
    for file in cluster.iterdir():
        if file.is_file() and file.name not in ("README.md", ".gitignore", ".env"):
            assert f"`{file.name}`" in text, f"{file.name} is not explained"


def test_build_arguments_exist(text: str) -> None:
    known = re.findall(r"^ARG (\w+)", (Path(__file__).resolve().parents[2] / "Dockerfile").read_text(), re.MULTILINE)
    assert set(re.findall(r"--build-arg (\w+)=", text)) <= set(known)


def test_secrets_and_claims_are_those_of_the_manifest(text: str, cluster: Path) -> None:
    manifest = (cluster / "rayservice.yaml").read_text()
    secrets = set(re.findall(r"secret generic ([\w-]+)", text))
    wanted = set(
        re.findall(r"secretRef: \{name: ([\w-]+)|secretName: ([\w-]+)|secretKeyRef: \{name: ([\w-]+)", manifest)
    )
    assert secrets == {name for names in wanted for name in names if name}
    for claim in re.findall(r"claimName: ([\w-]+)", manifest):
        assert f"`{claim}`" in text


def test_variables_of_the_compose_file_are_made(text: str, cluster: Path) -> None:
    wanted = set(re.findall(r"\$\{(\w+):\?", (cluster / "compose.yaml").read_text()))
    command = re.search(r"printf (.*?) > cluster/\.env", text, re.DOTALL)
    assert command
    assert wanted == set(re.findall(r"\b([A-Z_]{6,})\b", command[1]))


def test_commands_exist(text: str) -> None:
    from typer.testing import CliRunner

    from serve_app.command import app

    for words in set(re.findall(r"viewmesh ((?:config|weights) \w+)", text)):
        assert CliRunner().invoke(app, [*words.split(), "--help"]).exit_code == 0, words


def test_downloads_name_a_model_and_lift_what_the_image_forbids(text: str) -> None:
    told = re.findall(r"([^\n`]*)viewmesh weights download( \w+)?", text)
    assert len(told) == 2
    assert all("HF_HUB_OFFLINE=0 " in before and model.strip() in WEIGHT_SETS for before, model in told)


def test_memory_is_what_the_readme_measured(text: str, cluster: Path) -> None:
    """Of the preset in the row, and of the rasteriser if it names one: of both the larger."""
    readme = (cluster.parent / "README.md").read_text()
    rows = re.findall(r"^\| `nvdiffrec` (\w+)(, with nvdiffrast)? \| ([\d.]+) GB", text, re.MULTILINE)
    assert [preset for preset, *_ in rows] == ["preview", "standard"]
    for preset, nvdiffrast, told in rows:
        machine = "one H200, nvdiffrast" if nvdiffrast else "one H200, .*?"
        measured = re.findall(rf"\| {preset}, {machine} \|.*\| ([\d.]+) GB of GPU", readme)
        assert float(told) == max(map(float, measured)), preset


def test_it_says_what_was_not_run(text: str) -> None:
    assert "not built in CI" in text
