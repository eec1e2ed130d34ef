"""START HERE: a Reconstruction into the files that users take away.

Everything is made and checked in memory, then written whole, report.json last: a folder with a report is complete, and
of what an earlier report there lists nothing is left that is not the new one's.
Files are +y up in the scale of the input's cameras; report.json says how they lie in the cameras' world.
"""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from viewmesh.errors import OptionError
from viewmesh.export.check import check_file
from viewmesh.export.files import write_whole
from viewmesh.export.glb import glb_bytes
from viewmesh.export.hdr import environment_bytes
from viewmesh.export.images import Maps
from viewmesh.export.obj import obj_files
from viewmesh.export.plain import ply_bytes, stl_bytes
from viewmesh.export.preview import previews
from viewmesh.export.report import report_of
from viewmesh.export.result import Reconstruction
from viewmesh.export.splats import gaussian_ply_bytes
from viewmesh.export.store import reconstruction_bytes
from viewmesh.export.usdz import usdz_bytes
from viewmesh.geometry.gaussians import Gaussians
from viewmesh.geometry.mesh import TexturedMesh
from viewmesh.options import GAUSSIAN_PLY
from viewmesh.progress import Progress, silent

FORMATS = ("glb", "obj", "ply", "stl", "usdz", GAUSSIAN_PLY)
STORED = "reconstruction.safetensors"


def export(
    result: Reconstruction,
    folder: Path,
    formats: Sequence[str] = ("glb", "obj", "ply"),
    *,
    pictures: bool = True,
    progress: Progress = silent,
) -> dict[str, Path]:
    """Writes the formats, environment.hdr where a light was estimated, thumbnail.png, turntable.mp4, report.json and
    reconstruction.safetensors (for `reexport`) into folder; returns their paths by name.

    Raises InvalidMesh for a mesh or a written file that is not sound, OptionError for an unknown format, WriteError
    when the disk is full. pictures=False leaves out thumbnail and turntable.
    """
    unknown = [f for f in formats if f not in FORMATS]
    if unknown:
        raise OptionError(f"There is no format {unknown[0]}.", hint=f"One of {', '.join(FORMATS)}.")
    if GAUSSIAN_PLY in formats and result.gaussians is None:
        raise OptionError(
            f"The format {GAUSSIAN_PLY} needs Gaussians, and this result of {result.model} has none.",
            hint=f"Ask trellis or reconviagen for {GAUSSIAN_PLY} when the reconstruction is made.",
        )
    began = time.monotonic()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    output = result.output.validate()
    maps = Maps(output.material)
    written: dict[str, Path] = {}
    steps = len(formats) + 3

    def put(files: dict[str, bytes]) -> None:
        if not written:
            _take_away_earlier(folder)
        written.update({name: write_whole(folder / name, data) for name, data in files.items()})

    for step, kind in enumerate(formats, 1):
        progress("export", step, steps)
        files = encode(output, kind, result.output_gaussians, maps)
        check_file("gaussians.ply" if kind == GAUSSIAN_PLY else f"mesh.{kind}", files, output)
        put(files)
    progress("export", steps - 2, steps)
    if output.environment is not None:
        put({"environment.hdr": environment_bytes(output.environment)})
    put({STORED: reconstruction_bytes(result, maps)})
    progress("export", steps - 1, steps)
    if pictures:
        put(result.previews or previews(output))
    report = report_of(result, output, [*written, "report.json"])
    seconds = {**report.seconds, "export": round(time.monotonic() - began, 3)}
    put({"report.json": report.model_copy(update={"seconds": seconds}).model_dump_json(indent=2).encode()})
    progress("export", steps, steps)
    return written


def _take_away_earlier(folder: Path) -> None:
    """Removes the report of an earlier export into the folder, and the files that it lists. The stored result stays
    until another one takes its place: from it alone all others can be made again."""
    report = folder / "report.json"
    names = _listed(report)
    report.unlink(missing_ok=True)
    for name in names - {STORED}:
        if os.path.isfile(folder / name):
            (folder / name).unlink()


def _listed(report: Path) -> set[str]:
    """The names in a report's list of files that are plain: of files beside it. None where it is damaged."""
    try:
        files = json.loads(report.read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()
    return {n for n in files if isinstance(n, str) and Path(n).name == n} if isinstance(files, list) else set()


def encode(
    output: TexturedMesh, kind: str, gaussians: Gaussians | None = None, maps: Maps | None = None
) -> dict[str, bytes]:
    """The files of one format, by name, of a mesh on the CPU in the frame that files are in. maps: of its material, if
    they are there already."""
    if kind == GAUSSIAN_PLY and gaussians is not None:
        return {"gaussians.ply": gaussian_ply_bytes(gaussians)}
    if kind in ("ply", "stl"):
        return {f"mesh.{kind}": (ply_bytes if kind == "ply" else stl_bytes)(output)}
    maps = maps or Maps(output.material)
    if kind == "obj":
        return obj_files(output, maps)
    writer = {"glb": glb_bytes, "usdz": usdz_bytes}[kind]
    return {f"mesh.{kind}": writer(output, maps)}
