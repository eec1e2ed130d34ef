"""Temporary files: what a killed process leaves is removed by the next one, what a living one works on is not."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from deployments import scratch
from viewmesh.errors import ViewmeshError

ROOT = Path(__file__).parents[2]
WORKING = """
from deployments import scratch
with scratch.workdir("prepare") as workdir:
    (workdir / "photo.png").write_bytes(b"photo")
    print(workdir, flush=True)
    input()
"""


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """As in a process that asks for its first temporary folder, below `tmp_path`."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def begun() -> Path:
        monkeypatch.setattr(scratch, "_ours", {})
        return scratch.folder()

    return begun


def test_what_a_killed_process_left_is_gone_and_what_a_living_one_has_stays(begin, tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", WORKING], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        photo = Path(child.stdout.readline().strip(), "photo.png")
        first = begin()
        assert photo.read_bytes() == b"photo"
        child.kill()
    second = begin()
    assert not photo.exists()
    assert sorted(second.parent.iterdir()) == sorted([first, second])
    assert second.parent.stat().st_mode & 0o077 == 0


def test_a_folder_that_somebody_cleaned_up_is_made_again(begin):
    begin().rmdir()
    with scratch.workdir("export") as workdir:
        assert workdir.is_relative_to(scratch.folder())
    assert not workdir.exists()


def test_a_folder_of_somebody_else_is_not_used(begin, tmp_path):
    parent = begin().parent
    parent.rename(tmp_path / "away")
    parent.symlink_to(tmp_path / "away")
    with pytest.raises(ViewmeshError, match="somebody else's"):
        begin()


def test_nothing_else_in_the_service_makes_temporary_files():
    files = [file for package in ("deployments", "serve_app") for file in (ROOT / package).rglob("*.py")]
    making = {file.name for file in files if "tempfile" in file.read_text()}
    assert making == {"scratch.py", "client.py"}  # the client runs where its user does
