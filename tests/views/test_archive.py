"""The zip reader against hostile archives, and the stored view set bit for bit."""

import contextlib
import io
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import synthetic_views as synthetic
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from viewmesh.errors import InputError, ViewmeshError
from viewmesh.geometry.camera import canonical6
from viewmesh.options import ViewRules
from viewmesh.views.archive import load_viewset, save_viewset, unpack
from viewmesh.views.limits import MIB, Limits
from viewmesh.views.load import load_views, survey
from viewmesh.views.viewset import ViewSet


def packed(*entries: tuple[str | zipfile.ZipInfo, bytes], kind: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", kind) as archive:
        for name, data in entries:
            archive.writestr(name, data, compress_type=kind)
    return stream.getvalue()


def link() -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("views/view_00.png")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def encrypted() -> bytes:
    data = bytearray(packed(("a.png", b"x")))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.index(signature) + offset
        data[at] |= 1
    return bytes(data)


def lying(size: int) -> bytes:
    """An archive whose directory declares `size` bytes for an entry that holds more."""
    data = bytearray(packed(("views/a.png", b"\1" * 5000), kind=zipfile.ZIP_STORED))
    at = data.index(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<I", size)
    return bytes(data)


# name: archive, limits, the file named, the remedy
CASES: dict[str, tuple[Callable[[], bytes], Limits, str, str]] = {
    "slip": (lambda: packed(("../evil.png", b"x")), Limits(), "../evil.png", "relative to the view set's folder"),
    "slip inside": (lambda: packed(("a/../../b.png", b"x")), Limits(), "a/../../b.png", "relative to"),
    "slip backwards": (lambda: packed(("..\\evil.png", b"x")), Limits(), "../evil.png", "relative to"),
    "absolute": (lambda: packed(("/etc/x.png", b"x")), Limits(), "/etc/x.png", "relative to"),
    "drive": (lambda: packed(("C:\\x.png", b"x")), Limits(), "C:/x.png", "relative to"),
    "control": (lambda: packed(("a\nb.png", b"x")), Limits(), "a?b.png", "relative to"),
    "link": (lambda: packed((link(), b"/etc/passwd")), Limits(), "views/view_00.png", "put the file itself"),
    "twice": (lambda: packed(("A.png", b"x"), ("a.PNG", b"y")), Limits(), "a.PNG", "keep one of the two"),
    "file and folder": (lambda: packed(("a.png", b"x"), ("a.png/b.png", b"y")), Limits(), "a.png", "keep one"),
    "folder and file": (lambda: packed(("a.png/b.png", b"x"), ("a.png", b"y")), Limits(), "a.png", "keep one"),
    "encrypted": (encrypted, Limits(), "a.png", "without a password"),
    "nested": (lambda: packed(("in.zip", b"x")), Limits(), "in.zip", "unpack it first"),
    "deep": (lambda: packed(("a/" * 20 + "b.png", b"x")), Limits(), "a/a/a/", "shorten it"),
    "long": (lambda: packed(("x" * 300 + ".png", b"x")), Limits(), "xxx", "shorten it"),
    "ratio": (lambda: packed(("a.png", bytes(3 * MIB))), Limits(), "a.png", "ordinary PNG"),
    "entries": (lambda: packed(*((f"{i}.png", b"x") for i in range(9))), Limits(zip_entries=8), "set.zip", "pack only"),
    "file": (lambda: packed(("a.png", bytes(99))), Limits(file_bytes=9), "a.png", "save it smaller"),
    "total": (lambda: packed(("a.png", bytes(9)), ("b.png", bytes(9))), Limits(total_bytes=9), "set.zip", "fewer or"),
    "archive": (lambda: packed(("a.png", bytes(9))), Limits(zip_bytes=9), "set.zip", "fewer or smaller"),
    "not a zip": (lambda: b"hello", Limits(), "set.zip", "pack it again"),
    "truncated": (lambda: packed(("a.png", bytes(999)))[:-40], Limits(), "set.zip", "pack it again"),
    "damaged": (lambda: packed(("a.png", b"hello"), kind=0).replace(b"hello", b"hullo"), Limits(), "set.zip", "again"),
    "lying": (lambda: lying(10), Limits(), "set.zip", "pack it again"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(tmp_path, case):
    make, limits, file, remedy = CASES[case]
    (tmp_path / "set.zip").write_bytes(make())
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(InputError) as caught:
        unpack(tmp_path / "set.zip", target, limits)
    assert file in caught.value.file
    assert remedy in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} == {"set.zip", "out"}  # nothing outside the folder


def test_only_images_and_json_are_unpacked(tmp_path):
    (tmp_path / "set.zip").write_bytes(
        packed(("views/a.png", b"1"), ("cameras.json", b"2"), ("run.sh", b"3"), ("__MACOSX/views/a.png", b"4"))
    )
    target = tmp_path / "out"
    target.mkdir()
    unpack(tmp_path / "set.zip", target, Limits())
    assert {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()} == {"views/a.png", "cameras.json"}


def test_what_is_refused_for_its_name_is_unpacked_empty(tmp_path):
    """However large it is, and however much of it there is."""
    entries = [(f"my object/depth/{i}.npy", bytes(9 * MIB)) for i in range(3)]
    (tmp_path / "set.zip").write_bytes(packed(("my object/views/a.png", b"1"), *entries, ("cloud.npy", b"2")))
    target = tmp_path / "out"
    target.mkdir()
    unpack(tmp_path / "set.zip", target, Limits(file_bytes=MIB, total_bytes=MIB))
    sizes = {str(p.relative_to(target)): p.stat().st_size for p in target.rglob("*") if p.is_file()}
    assert sizes == {"my object/views/a.png": 1} | {name: 0 for name, _ in entries}
    with pytest.raises(InputError, match=r"^depth/\d\.npy: .* convert it to a 16-bit PNG"):
        survey(tmp_path / "set.zip", ViewRules())


@pytest.fixture(scope="module")
def good_zip(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("zip")
    synthetic.write_views(folder / "set", synthetic.around(4), size=(32, 24), f=40.0)
    files = sorted(p for p in (folder / "set").rglob("*") if p.is_file())
    return packed(*((str(p.relative_to(folder / "set")), p.read_bytes()) for p in files))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_archives_load_or_are_refused(tmp_path, good_zip, data):
    """Any bytes: a ViewSet or a ViewmeshError, never another exception."""
    raw = bytearray(good_zip)
    for _ in range(data.draw(st.integers(0, 6))):
        at = data.draw(st.integers(0, len(raw) - 1) | st.integers(len(raw) - 600, len(raw) - 1))
        raw[at] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.just(len(raw)) | st.integers(0, len(raw)))]
    (tmp_path / "set.zip").write_bytes(bytes(raw))
    with contextlib.suppress(ViewmeshError):
        assert isinstance(load_views(tmp_path / "set.zip", ViewRules(), workdir=tmp_path / "work"), ViewSet)
    assert {p.name for p in tmp_path.iterdir()} <= {"set.zip", "work"}


def test_a_stored_view_set_is_the_same_value(tmp_path):
    generator = torch.Generator().manual_seed(0)
    views = ViewSet(
        names=("views/b.png", "views/ä.png"),
        images=torch.randint(0, 256, (2, 5, 7, 4), dtype=torch.uint8, generator=generator),
        cameras=canonical6(5, 7)[[1, 4]],
        depths=torch.rand(2, 5, 7, generator=generator),
        known=torch.rand(2, 5, 7, generator=generator) > 0.5,
        world_from_scene=torch.rand(4, 4, dtype=torch.float64, generator=generator),
        camera_source="canonical6",
        mask_source="alpha",
        warnings=("one", "two"),
    )
    save_viewset(views, tmp_path / "views.safetensors")
    loaded = load_viewset(tmp_path / "views.safetensors")
    for name in ("names", "camera_source", "mask_source", "warnings"):
        assert getattr(loaded, name) == getattr(views, name)
    for name in ("images", "depths", "known", "world_from_scene"):
        assert torch.equal(getattr(loaded, name), getattr(views, name))
    assert loaded.cameras is not None
    assert views.cameras is not None
    for name in ("world_from_camera", "fx", "fy", "cx", "cy"):
        assert torch.equal(getattr(loaded.cameras, name), getattr(views.cameras, name))
    assert (loaded.cameras.height, loaded.cameras.width) == (5, 7)

    bare = ViewSet(names=("a",), images=views.images[:1], cameras=None)
    save_viewset(bare, tmp_path / "bare.safetensors")
    loaded = load_viewset(tmp_path / "bare.safetensors")
    assert loaded.cameras is None
    assert loaded.depths is None
    assert loaded.known is None
    assert loaded.camera_source is None


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff" * 64])
def test_another_file_is_not_a_stored_view_set(tmp_path: Path, data: bytes):
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=r"x\.safetensors: .*prepare the views again"):
        load_viewset(tmp_path / "x.safetensors")
