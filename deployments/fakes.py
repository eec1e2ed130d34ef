"""Engines that need no model: they take time, report progress, fail on demand, and leave a valid tiny result.

For tests, benchmarks and a dry run of a cluster. What a job does is in its first view: a view whose bytes are JSON is a
`Script` instead of a picture.
"""

import hashlib
import json
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from viewmesh.errors import EmptyReconstruction, InputError, InvalidMesh, MissingModel, OutOfMemory, PoseError
from viewmesh.progress import check

PREVIEW_STEPS = 40


class Script(BaseModel):
    """What a fake job shall do. `fail` is an error code, raised in the stage `at` once half of it is done."""

    model_config = ConfigDict(extra="forbid")

    prepare_s: float = 0.0
    optimise_s: float = 0.2
    finish_s: float = 0.0
    export_s: float = 0.0
    steps: int = PREVIEW_STEPS
    fail: str = ""
    at: str = "optimise"
    times: int = 1_000_000  # fails so often, counted in `scratch`; then it works
    scratch: str = ""  # a folder where the fakes leave marks that a test can read


ERRORS = {
    "invalid_input": lambda: InputError("is 3 × 2 pixels; at least 16 × 16 are needed", file="views/view_00.png"),
    "unposed_views": lambda: PoseError("2 of 6 views could not be posed", unposed=("a.png", "b.png"), hint="Add views"),
    "model_missing": lambda: MissingModel("The weights are not here.", hint="viewmesh weights download trellis"),
    "out_of_memory": lambda: OutOfMemory("The fake", needed=40 * 2**30, free=8 * 2**30, device="cuda:0", hint="Less"),
    "empty_reconstruction": lambda: EmptyReconstruction("The masks agree on no volume.", hint="Check the masks."),
    "invalid_mesh": lambda: InvalidMesh("The mesh has vertices that are not finite."),
    "device_lost": lambda: RuntimeError("CUDA error: an illegal memory access was encountered"),
    "internal_error": lambda: ZeroDivisionError("a secret that no user may see"),
}


class FakePreparer:
    def __init__(self, **defaults: Any) -> None:
        self.defaults = Script(**defaults)

    def prepare(self, source: Path, options: dict, out: Path, progress: Any, cancelled: Any) -> dict[str, Any]:
        views, first = _views_of(source)
        if not views:
            raise InputError("has no views", file=source.name, hint="Put 1 to 64 pictures into views/.")
        script = _script(first, self.defaults)
        _work(script, "prepare", script.prepare_s, 4, progress, cancelled)
        out.write_text(script.model_dump_json())
        return {"views": len(views), "camera_source": "canonical6", "mask_source": "alpha", "warnings": []}

    def pose(self, source: Path, options: dict, out: Path, progress: Any, cancelled: Any) -> dict[str, Any]:
        return {"reason": "Fake views have no other cameras."}


class FakeSession:
    look_again = False

    def __init__(self, script: Script, step: int = 0) -> None:
        self.script, self.step, self.steps = script, step, script.steps

    @property
    def done(self) -> bool:
        return self.step >= self.steps

    def advance(self, seconds: float, progress: Any, cancelled: Any) -> dict[str, float]:
        until = time.monotonic() + seconds
        metrics: dict[str, float] = {}
        while not self.done and (not metrics or time.monotonic() < until):
            check(cancelled)
            time.sleep(self.script.optimise_s / self.steps)
            self.step += 1
            _mark(self.script, "step", str(self.step))
            if self.script.at == "optimise" and self.step * 2 >= self.steps:
                _maybe_fail(self.script)
            metrics = {"loss": 1.0 / self.step, "psnr": 20.0 + 10.0 * self.step / self.steps}
            progress("optimise", self.step, self.steps, **metrics)
        return metrics

    def checkpoint(self) -> Callable[[Path], None]:
        text = json.dumps({"step": self.step, "script": self.script.model_dump()})

        def write(out: Path) -> None:
            out.write_text(text)

        return write

    def go_on(self, enough: Any, progress: Any, cancelled: Any) -> None:
        while not self.done and not enough():
            self.advance(0.0, progress, cancelled)

    def preview(self, out: Path) -> bool:
        out.write_bytes(tiny_png())
        return True

    def finish(self, out: Path, progress: Any, cancelled: Any, initial: Path | None = None) -> dict[str, Any]:
        _work(self.script, "finish", self.script.finish_s, 4, progress, cancelled)
        out.write_text(self.script.model_dump_json())
        return {"psnr": 30.0}


class FakeOptimiser:
    """`warm_s`: how long the constructor takes, like the loading of weights. `load_s`: a checkpoint's. `gpu_bytes`: the
    memory of a device that it says it has, half of it in use."""

    def __init__(self, warm_s: float = 0.0, load_s: float = 0.0, gpu_bytes: int = 0, **defaults: Any) -> None:
        time.sleep(warm_s)
        self.load_s, self.gpu_bytes = load_s, gpu_bytes
        self.defaults = Script(**defaults)

    def start(self, views: Path, options: dict, initial: Path | None, *, smaller: bool) -> FakeSession:
        script = Script.model_validate_json(views.read_text())
        _mark(script, "start", "smaller" if smaller else "full")
        return FakeSession(script)

    def load(self, views: Path, options: dict, checkpoint: Path, *, smaller: bool) -> FakeSession:
        time.sleep(self.load_s)
        saved = json.loads(checkpoint.read_text())
        script = Script(**saved["script"])
        _mark(script, "load", str(saved["step"]))
        return FakeSession(script, saved["step"])

    def release(self) -> None:
        return None

    def memory(self) -> dict[str, int]:
        half = self.gpu_bytes // 2
        return {"used": half, "free": half, "total": self.gpu_bytes} if half else {}


class FakeWriter:
    def __init__(self, **defaults: Any) -> None:
        self.defaults = Script(**defaults)

    def export(
        self, result: Path, views: Path | None, folder: Path, options: dict, facts: dict, progress: Any, cancelled: Any
    ) -> dict[str, Any]:
        script = Script.model_validate_json(result.read_text())
        _work(script, "export", script.export_s, 4, progress, cancelled)
        for form in options["formats"]:
            (folder / f"mesh.{form}").write_bytes(tiny_glb() if form == "glb" else f"# a fake {form}\n".encode())
        (folder / "thumbnail.png").write_bytes(tiny_png())
        report = {**facts, "faces": 4, "watertight": True, "model": options["model"], "seed": options["seed"]}
        (folder / "report.json").write_text(json.dumps(report))
        return report


def _views_of(source: Path) -> tuple[list[str], bytes]:
    if source.is_file():
        try:
            with zipfile.ZipFile(source) as opened:
                names = sorted(name for name in opened.namelist() if "views/" in name and not name.endswith("/"))
                return names, opened.read(names[0]) if names else b""
        except zipfile.BadZipFile as error:
            raise InputError(
                "is not a zip file", file=source.name, hint="Send a zip, or the files one by one."
            ) from error
    files = sorted((source / "views").glob("*"))
    return [file.name for file in files], files[0].read_bytes() if files else b""


def _script(first: bytes, defaults: Script) -> Script:
    if not first.lstrip().startswith(b"{"):
        return defaults
    try:
        return Script(**{**defaults.model_dump(), **json.loads(first)})
    except (ValidationError, ValueError, TypeError) as error:
        raise InputError("is not a script for the fake engines", file="views/view_00.png") from error


def _work(script: Script, stage: str, seconds: float, steps: int, progress: Any, cancelled: Any) -> None:
    _mark(script, stage, "begin")
    for step in range(1, steps + 1):
        for _ in range(max(1, int(seconds / steps / 0.1))):
            check(cancelled)
            time.sleep(min(0.1, seconds / steps))
        if script.at == stage and step * 2 >= steps:
            _maybe_fail(script)
        progress(stage, step, steps)


def _maybe_fail(script: Script) -> None:
    if not script.fail:
        return
    if script.scratch:
        marks = Path(script.scratch) / "failures"
        count = len(marks.read_text()) if marks.exists() else 0
        if count >= script.times:
            return
        _append(marks, "x")
    raise ERRORS[script.fail]()


def _mark(script: Script, name: str, text: str) -> None:
    if script.scratch:
        _append(Path(script.scratch) / name, f"{time.time():.3f} {text}\n")


def _append(file: Path, text: str) -> None:
    with open(file, "a") as opened:
        opened.write(text)


def tiny_png() -> bytes:
    """A 2 × 2 grey picture."""
    rows = b"".join(b"\x00" + b"\x80\x80\x80" * 2 for _ in range(2))
    header = struct.pack(">IIBBBBB", 2, 2, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def tiny_glb() -> bytes:
    """A tetrahedron."""
    points = [(0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]
    faces = [0, 2, 1, 0, 1, 3, 0, 3, 2, 1, 2, 3]
    data = b"".join(struct.pack("<3f", *point) for point in points) + struct.pack("<12H", *faces)
    document = {
        "asset": {"version": "2.0", "generator": "viewmesh fake"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1}]}],
        "buffers": [{"byteLength": len(data)}],
        "bufferViews": [
            {"buffer": 0, "byteOffset": 0, "byteLength": 48, "target": 34962},
            {"buffer": 0, "byteOffset": 48, "byteLength": 24, "target": 34963},
        ],
        "accessors": [
            {"bufferView": 0, "componentType": 5126, "count": 4, "type": "VEC3", "min": [0, 0, 0], "max": [1, 1, 1]},
            {"bufferView": 1, "componentType": 5123, "count": 12, "type": "SCALAR"},
        ],
    }
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    head = struct.pack("<4sII", b"glTF", 2, 12 + 8 + len(text) + 8 + len(data))
    return head + struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(data), b"BIN\0") + data


def fake_view(number: int = 0, **script: Any) -> bytes:
    """The bytes of a fake view: the script, and something that makes each view another file."""
    if number == 0:
        return json.dumps(script).encode()
    return hashlib.sha256(str(number).encode()).digest()
