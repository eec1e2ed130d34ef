"""Weights: what is there, resumable downloads, and files that are not what they should be. No network."""

import hashlib
import http.server
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from viewmesh.errors import InputError, MissingModel
from viewmesh.weights import cli, manifest
from viewmesh.weights.download import RemoteFile, download, fetch_address
from viewmesh.weights.manifest import WEIGHT_SETS, WeightFile, WeightSet, sets_for
from viewmesh.weights.store import list_weights, local_folder, presence, read_lock, verify, weights_root

CONTENT = {"pipeline.json": b"{}", "ckpts/a.safetensors": b"a" * 1000}
SMALL = WeightSet(
    "small",
    "someone/small",
    None,
    (WeightFile("pipeline.json"), WeightFile("ckpts/a.safetensors", 1000)),
    "MIT",
    True,
    ("trellis",),
)


class FakeHub:
    """A hub in memory; `content` may be changed under a pinned revision, as a dishonest publisher could."""

    def __init__(self, content: dict[str, bytes]) -> None:
        self.content, self.fetched, self.asked = dict(content), [], []

    def files(self, repository, revision):
        self.asked.append(revision)
        files = {p: RemoteFile(len(c), hashlib.sha256(c).hexdigest()) for p, c in self.content.items()}
        return revision or "c0ffee", files

    def fetch(self, repository, path, commit, folder):
        self.fetched.append(path)
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(self.content[path])


@pytest.fixture(autouse=True)
def empty_store(tmp_path, monkeypatch):
    monkeypatch.setenv("VIEWMESH_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setitem(WEIGHT_SETS, "small", SMALL)
    return tmp_path


def test_nothing_is_there_at_first():
    assert all(not p.complete for p in list_weights())
    assert local_folder("small") is None
    assert local_folder("someone/unknown") is None
    assert local_folder("no such thing") is None


def test_a_download_is_complete_locked_and_found():
    hub = FakeHub(CONTENT)
    folder = download(SMALL, hub)
    assert folder == weights_root() / "small"
    assert presence(SMALL).complete
    lock = read_lock(folder)
    assert lock is not None
    assert lock.revision == "c0ffee"
    assert lock.files["ckpts/a.safetensors"] == (1000, hashlib.sha256(b"a" * 1000).hexdigest())
    assert local_folder("small") == local_folder("someone/small") == folder
    assert [c.verdict for c in verify(SMALL)] == ["ok", "ok"]
    download(SMALL, hub)
    assert hub.fetched == list(CONTENT)  # the second time does nothing


def test_an_interrupted_download_goes_on_with_the_missing_file():
    hub = FakeHub(CONTENT)

    def broken(repository, path, commit, folder):
        if path.endswith("safetensors"):
            raise ConnectionError("the line went dead")
        FakeHub.fetch(hub, repository, path, commit, folder)

    hub.fetch = broken
    with pytest.raises(MissingModel, match="the line went dead") as error:
        download(SMALL, hub)
    assert error.value.hint.endswith("viewmesh weights download small")
    assert presence(SMALL).missing == ("ckpts/a.safetensors",)
    del hub.fetch
    download(SMALL, hub)
    assert hub.fetched == ["pipeline.json", "ckpts/a.safetensors"]
    assert presence(SMALL).complete


def test_a_repaired_set_must_be_what_was_locked():
    hub = FakeHub(CONTENT)
    folder = download(SMALL, hub)
    (folder / "ckpts/a.safetensors").unlink()
    hub.content["ckpts/a.safetensors"] = b"b" * 1000
    with pytest.raises(InputError, match="expected 1000 and"):
        download(SMALL, hub)
    assert hub.asked[-1] == "c0ffee"  # the locked revision, not the newest
    assert not (folder / "ckpts/a.safetensors").exists()


def test_a_sha256_in_the_manifest_wins_over_what_the_hub_says():
    pinned = replace(SMALL, files=(WeightFile("pipeline.json", None, hashlib.sha256(b"other").hexdigest()),))
    with pytest.raises(InputError, match="it was removed"):
        download(pinned, FakeHub(CONTENT))


def test_verify_finds_a_changed_byte_and_a_short_file():
    folder = download(SMALL, FakeHub(CONTENT))
    (folder / "ckpts/a.safetensors").write_bytes(b"a" * 999 + b"x")
    assert "expected" in [c.verdict for c in verify(SMALL)][1]
    (folder / "ckpts/a.safetensors").write_bytes(b"a" * 10)
    assert [c.verdict for c in verify(SMALL)][1] == "10 bytes, expected 1000"
    (folder / "ckpts/a.safetensors").unlink()
    assert [c.verdict for c in verify(SMALL)][1] == "missing"


def test_verifying_where_nothing_is_says_so():
    result = CliRunner().invoke(cli.app, ["verify"])
    assert result.exit_code == 0
    assert result.stdout == f"No weights are in {weights_root()}; viewmesh weights download trellis gets some.\n"


def test_a_folder_copied_by_hand_works_and_says_that_only_sizes_were_compared():
    for path, content in CONTENT.items():
        target = weights_root() / "small" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    assert local_folder("small") is not None
    assert {c.verdict for c in verify(SMALL)} == {"size only"}


def test_offline_is_respected_with_a_sentence(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub = FakeHub(CONTENT)
    with pytest.raises(MissingModel, match="HF_HUB_OFFLINE is set") as error:
        download(SMALL, hub)
    assert hub.asked == []
    assignment, _, command = error.value.hint.partition(" ")
    assert command == "viewmesh weights download small"
    monkeypatch.setenv(*assignment.split("="))
    assert download(SMALL, hub) == weights_root() / "small"


def test_a_file_that_the_revision_lacks_is_named():
    with pytest.raises(InputError, match=r"someone/small: has no file ckpts/a\.safetensors at revision c0ffee"):
        download(SMALL, FakeHub({"pipeline.json": b"{}"}))


class RangeHandler(http.server.BaseHTTPRequestHandler):
    body = bytes(range(256)) * 40
    ranges = True
    cut_after: int | None = None
    seen: list[str | None] = []  # noqa: RUF012

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.seen.append(wanted)
        start = int(wanted.split("=")[1].rstrip("-")) if wanted and self.ranges else 0
        if start >= len(self.body):
            self.send_error(416)
            return
        self.send_response(206 if wanted and self.ranges else 200)
        self.send_header("Content-Length", str(len(self.body) - start))
        self.end_headers()
        self.wfile.write(self.body[start : self.cut_after])

    def log_message(self, format, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(RangeHandler, "seen", [])
    monkeypatch.setattr(RangeHandler, "ranges", True)
    monkeypatch.setattr(RangeHandler, "cut_after", None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), RangeHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/file"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("ranges", [True, False])  # a server that resumes, and one that starts over
def test_a_plain_download_resumes(server, tmp_path, monkeypatch, ranges):
    path = tmp_path / "file"
    monkeypatch.setattr(RangeHandler, "cut_after", 3000)
    with pytest.raises(Exception, match=r"3000|incomplete|IncompleteRead"):
        fetch_address(server, path)
    assert not path.exists()
    monkeypatch.setattr(RangeHandler, "cut_after", None)
    monkeypatch.setattr(RangeHandler, "ranges", ranges)
    fetch_address(server, path)
    assert path.read_bytes() == RangeHandler.body
    assert RangeHandler.seen == [None, "bytes=3000-"]


def test_a_whole_partial_file_is_taken(server, tmp_path):
    (tmp_path / "file.incomplete").write_bytes(RangeHandler.body)
    fetch_address(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == RangeHandler.body


def test_the_manifest_knows_what_each_model_needs():
    assert [s.name for s in sets_for("reconviagen")] == ["dinov2", "reconviagen", "vggt-object"]
    assert {s.name for s in sets_for("trellis")} >= {"trellis", "dinov2"}
    assert sets_for("microsoft/TRELLIS-image-large") == (manifest.TRELLIS,)
    assert sets_for("nothing") == ()
    assert manifest.TRELLIS.known_bytes == 2_835_472_312
    assert not any(Path(f.path).is_absolute() or ".." in f.path for s in WEIGHT_SETS.values() for f in s.files)


def test_the_commands_list_refuse_and_verify():
    run = CliRunner().invoke
    listed = run(cli.app, ["list"])
    assert listed.exit_code == 0
    assert "vggt-object" in listed.output
    assert run(cli.app, ["download", "nothing"]).exit_code == 2
    download(SMALL, FakeHub(CONTENT))
    assert run(cli.app, ["verify"]).exit_code == 0
    (weights_root() / "small" / "pipeline.json").write_bytes(b"[]")
    assert run(cli.app, ["verify", "small"]).exit_code == 1


def test_a_failed_download_ends_with_the_sentence(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = CliRunner().invoke(cli.app, ["download", "small"])
    assert result.exit_code == 1
    assert "HF_HUB_OFFLINE" in result.output
