"""The artifact store's promise: whole files or none, their sha256 checked, clear errors when there is no room."""

import errno
import os
import sys
import tempfile
import threading
from pathlib import Path

import fsspec
import pytest

from deployments.artifacts import ArtifactStore, Corrupt, Ref, StoreError, StoreFull, fresh, hash_file
from viewmesh.errors import OptionError


@pytest.fixture(params=["file", "memory"])
def store(request, tmp_path) -> ArtifactStore:
    if request.param == "memory":  # stands for every store that is not a local folder
        fsspec.filesystem("memory").store.clear()
        return ArtifactStore("memory://bucket/prefix")
    return ArtifactStore(f"file://{tmp_path}/store")


def source(folder: Path, data: bytes = b"12345") -> Path:
    file = folder / "source"
    file.write_bytes(data)
    return file


def test_what_is_put_is_fetched(store, tmp_path):
    ref = store.put(source(tmp_path), "jobs/a/mesh.glb")
    assert ref == Ref("jobs/a/mesh.glb", hash_file(tmp_path / "source"), 5)
    assert store.fetch(ref.json(), tmp_path / "out").read_bytes() == b"12345"
    assert store.exists(ref.key)
    assert b"".join(store.read(ref.key)) == b"12345"
    assert b"".join(store.read(ref.key, 1, 4, chunk=2)) == b"234"


def test_putting_again_replaces_and_moving_takes_the_file(store, tmp_path):
    store.put(source(tmp_path), "k/a")
    ref = store.put(source(tmp_path, b"new"), "k/a", move=True)
    assert store.fetch(ref, tmp_path / "out").read_bytes() == b"new"
    assert not (tmp_path / "source").exists()


def test_a_damaged_file_is_never_handed_out(store, tmp_path):
    ref = store.put(source(tmp_path), "k/a")
    with store.fs.open(store.path("k/a"), "wb") as file:
        file.write(b"1234X")
    with pytest.raises(Corrupt):
        store.fetch(ref, tmp_path / "out")


def test_removing_takes_folders_and_does_not_mind_what_is_gone(store, tmp_path):
    for key in ("jobs/a/1", "jobs/a/b/2"):
        store.put(source(tmp_path), key)
    store.remove("jobs/a")
    store.remove("jobs/a")
    assert not store.exists("jobs/a/b/2")


def test_a_missing_file_is_a_store_error(store, tmp_path):
    with pytest.raises(StoreError):
        store.fetch(Ref("k/none", "0" * 64, 1), tmp_path / "out")


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x"])
def test_keys_stay_below_the_root(store, key):
    with pytest.raises(ValueError, match="not a key"):
        store.path(key)


def test_a_write_that_breaks_off_leaves_no_key(tmp_path, monkeypatch):
    store = ArtifactStore(f"file://{tmp_path}/store")
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(StoreFull) as raised:
        store.put(source(tmp_path), "k/a")
    assert "no space left" in str(raised.value)
    assert raised.value.hint
    assert not store.exists("k/a")


def test_a_store_that_is_away_leaves_no_temporary_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = ArtifactStore("memory://bucket/away")
    monkeypatch.setattr(store.fs, "put_file", lambda *a: (_ for _ in ()).throw(OSError("away")))
    with pytest.raises(StoreError):
        store.put_bytes(b"12345", "k/a")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("at_once", [1, 8])
def test_what_is_missing_of_many_files(store, at_once):
    store.object_store = at_once > 1
    for i in range(8):
        store.put_bytes(b"x", f"k/{i}")
    together, exists = threading.Barrier(at_once), store.exists

    def slowly(key: str) -> bool:
        together.wait(20)  # an object store's answers take their time: they are waited for together
        return exists(key)

    store.exists = slowly
    assert store.missing([f"k/{i}" for i in (0, 1, 9, 2, 3, 8, 4, 5)]) == ["k/9", "k/8"]


def test_a_file_that_cannot_be_removed_keeps_no_other(store):
    for name in "abc":
        store.put_bytes(b"x", f"k/{name}")
    remove = store._remove_file

    def refusing(key: str) -> None:
        if key == "k/a":
            raise StoreError("no")
        remove(key)

    store._remove_file = refusing
    with pytest.raises(StoreError, match="no"):
        store.remove_files(["k/a", "k/b", "k/gone", "k/c"])
    assert store.missing(["k/a", "k/b", "k/c"]) == ["k/b", "k/c"]


def test_fresh_keys_never_meet():
    assert fresh("jobs/a", "x") != fresh("jobs/a", "x")


def test_older_than_lists_only_what_is_old(tmp_path):
    store = ArtifactStore(f"file://{tmp_path}/store")
    store.put(source(tmp_path), "tmp/new")
    store.put(source(tmp_path), "tmp/old")
    os.utime(store.path("tmp/old"), (1, 1))
    assert store.older_than("tmp", 3600) == ["tmp/old"]
    assert store.older_than("none", 1) == []


def test_a_package_that_is_missing_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)  # remembers imports
    with pytest.raises(OptionError, match=r"pip install 'viewmesh\[s3\]'"):
        ArtifactStore("s3://key:secret@bucket/prefix")
    with pytest.raises(OptionError, match="nope://") as raised:
        ArtifactStore("nope://secret/prefix")
    assert "secret" not in str(raised.value)


def test_what_is_created_in_place_is_committed_with_the_sha256_its_writer_gives(store, tmp_path):
    def write(path: Path) -> str:
        path.write_bytes(b"12345")
        return "its own"

    assert store.create(write, "k/a") == Ref("k/a", "its own", 5)
    assert store.create(lambda path: path.write_bytes(b"12345") and None, "k/b").sha256 == hash_file(source(tmp_path))


def test_a_writer_that_fails_commits_nothing_and_keeps_its_error(store, tmp_path):
    def fails(error: Exception):
        def write(path: Path) -> None:
            path.write_bytes(b"123")
            raise error

        return write

    with pytest.raises(StoreFull):
        store.create(fails(OSError(errno.ENOSPC, "full")), "k/a")
    with pytest.raises(RuntimeError, match="CUDA error"):  # the device's trouble, not the store's
        store.create(fails(RuntimeError("CUDA error")), "k/a")
    assert not store.exists("k/a")
    assert store.spool().parent.exists()
    assert not list(tmp_path.glob("store/tmp/*"))
