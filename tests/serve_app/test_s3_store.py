"""The artifact store on an S3 server: what differs from a folder."""

import uuid
from pathlib import Path

import pytest

from deployments.artifacts import REMOTE_CHUNK, ArtifactStore, Corrupt, StoreError


@pytest.fixture
def store(s3_bucket):
    return ArtifactStore(f"{s3_bucket}/{uuid.uuid4().hex}")


def source(folder: Path, data: bytes) -> Path:
    file = folder / uuid.uuid4().hex
    file.write_bytes(data)
    return file


def test_files_come_back_and_go_with_their_folder(store, tmp_path):
    ref = store.put(source(tmp_path, b"12345"), "jobs/a/mesh.glb", move=True)
    other = store.put_bytes(b"other", "jobs/ab/mesh.glb")
    assert store.fetch(ref, tmp_path / "out").read_bytes() == b"12345"
    assert not list(tmp_path.glob("????????*"))  # moved
    store.remove("jobs/a")
    store.remove("jobs/a")
    assert not store.exists(ref.key)
    assert store.exists(other.key)


def test_many_files_are_looked_for_and_removed(store):
    for i in range(30):
        store.put_bytes(b"x", f"k/{i}")
    assert store.missing([f"k/{i}" for i in range(28, 33)]) == ["k/30", "k/31", "k/32"]
    store.remove_files([f"k/{i}" for i in range(1, 33)])
    assert store.older_than("k", -5) == ["k/0"]


def test_nothing_is_left_beside_what_was_put(store, tmp_path):
    store.put(source(tmp_path, b"12345"), "k/a")
    store.check()
    assert store.older_than("tmp", -5) == []
    assert store.older_than("k", -5) == ["k/a"]


def test_another_ones_writes_are_seen_at_once(store, tmp_path):
    other = ArtifactStore(store.url, client_kwargs={"region_name": "us-east-1"})  # a client of its own
    assert other.fs is not store.fs
    assert store.older_than("jobs", -5) == []
    assert not store.exists("jobs/a/x")
    other.put_bytes(b"1", "jobs/a/x")
    assert store.exists("jobs/a/x")
    assert store.older_than("jobs", -5) == ["jobs/a"]
    other.remove("jobs/a")
    assert not store.exists("jobs/a/x")


def test_a_part_of_a_file_is_all_that_is_read(store, monkeypatch):
    import s3fs.core

    data = bytes(range(256)) * (REMOTE_CHUNK // 256) + b"tail"
    store.put_bytes(data, "k/big")
    asked = []
    assert b"".join(store.read("k/big")) == data
    monkeypatch.setattr("s3fs.core._fetch_range", counting(asked, s3fs.core._fetch_range))
    assert b"".join(store.read("k/big", 1000, 1008)) == data[1000:1008]
    assert b"".join(store.read("k/big", len(data) - 3)) == data[-3:]
    assert asked[0] == (1000, 1008)
    assert [start for start, _ in asked] == [1000, len(data) - 3]


def counting(asked, fetch):
    def counted(fs, bucket, key, version_id, start, end, **more):
        asked.append((start, end))
        return fetch(fs, bucket, key, version_id, start, end, **more)

    return counted


def test_damage_absence_and_a_missing_bucket_have_words(store, tmp_path):
    ref = store.put_bytes(b"12345", "k/a")
    store.fs.pipe_file(store.path("k/a"), b"1234X")
    with pytest.raises(Corrupt):
        store.fetch(ref, tmp_path / "out")
    store.remove("k/a")
    with pytest.raises(StoreError, match="read k/a"):
        store.fetch(ref, tmp_path / "out")
    with pytest.raises(StoreError, match="bucket does not exist"):
        ArtifactStore("s3://no-such-bucket/x").check()
