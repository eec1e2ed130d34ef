"""The `viewmesh` command from outside: files, exit codes, JSON, Ctrl-C and --resume, on tiny views."""

import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
import pytest
import synthetic_views as synthetic
import torch
import typer.main
from PIL import Image
from tiny_command import shrink
from typer.testing import CliRunner

from serve_app.command import app
from viewmesh import __version__, reconstruct, runtime
from viewmesh.cli import Bar
from viewmesh.command_options import wishes
from viewmesh.errors import Cancelled, EmptyReconstruction, MissingModel
from viewmesh.nvdiffrec import memory, problem
from viewmesh.nvdiffrec.repeatable import repeatable
from viewmesh.options import ViewRules

TESTS = Path(__file__).resolve().parent
SIZE, FOCAL = 64, 96.0
Result = Any  # typer may bring a click of its own, so its Result has no name here


def viewmesh(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def told(result: Result, code: int) -> str:
    """What a refused command said on standard error after its progress; nothing on standard output, no traceback."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    return result.stderr[result.stderr.index("viewmesh: ") :] if "viewmesh: " in result.stderr else result.stderr


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch.setattr)


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("capture")
    synthetic.write_views(folder, synthetic.around(12), size=(SIZE, SIZE), f=FOCAL)
    return folder


@pytest.fixture(scope="module")
def made(capture: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Result]]:
    """The folder of one reconstruction that nobody stopped, and what the command answered."""
    out = tmp_path_factory.mktemp("made") / "deeper" / "out"
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        yield out, viewmesh("reconstruct", capture, "-o", out, "--json")


# what it makes


def test_reconstruct_writes_every_file_and_its_report(made: tuple[Path, Result], capture: Path):
    out, result = made
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report == json.loads((out / "report.json").read_text())
    files = {p.name for p in out.iterdir()}
    assert files == set(report["files"])
    assert files >= {"mesh.glb", "mesh.obj", "mesh.mtl", "texture.png", "mesh.ply", "environment.hdr", "thumbnail.png"}
    assert not (out / ".resume").exists()
    assert (report["version"], report["model"], report["preset"], report["seed"]) == (
        __version__, "nvdiffrec", "preview", 0,
    )  # fmt: skip
    assert report["input_views"] == 12
    assert 100 < report["faces"] <= 400
    assert report["quality"]["mask_iou"] > 0.93
    assert report["quality"]["psnr_db"] > 20
    assert list(report["seconds"]) == ["prepare", "optimise", "export"]


def test_the_words_of_a_run_that_prints_no_json(tiny: None, capture: Path, tmp_path: Path):
    given = ["--formats", "stl", "--target-faces", 200, "--refine", "--steps", 5]
    result = viewmesh("reconstruct", capture, "-o", tmp_path, *given)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    for name in ("refine", "steps"):
        assert f"note: The option {name} has no effect with nvdiffrec.\n" in result.stderr
    assert "cfg" not in result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert f"{report['faces']} faces" in result.stderr
    assert report["faces"] <= 200
    assert not (tmp_path / "mesh.glb").exists()


def test_render_agrees_with_the_input_views(made: tuple[Path, Result], capture: Path, tmp_path: Path):
    out, _ = made
    result = viewmesh("render", out, "--cameras", capture / "cameras.json", "-o", tmp_path)
    assert result.exit_code == 0, result.output
    assert "12 views" in result.stderr
    unit = json.loads((tmp_path / "depth.json").read_text())["depth_unit_scale"]
    for n, pose in enumerate(synthetic.around(12)):
        rgba, z = synthetic.render(pose, FOCAL, SIZE, SIZE)
        picture = Image.open(tmp_path / f"view_{n:03d}.png")
        assert (picture.mode, picture.size) == ("RGBA", (SIZE, SIZE))
        ours, theirs = np.asarray(picture)[..., 3] > 127, rgba[..., 3] > 127
        assert (ours & theirs).sum() / (ours | theirs).sum() > 0.9
        stored = cv2.imread(str(tmp_path / f"depth_{n:03d}.png"), cv2.IMREAD_UNCHANGED)
        assert stored is not None
        assert stored.dtype == np.uint16
        depth = stored * unit
        both = (depth > 0) & (z > 0)
        assert both.sum() > 0.85 * (z > 0).sum()
        assert np.median(np.abs(depth - z)[both]) < 0.03


def test_six_views_of_the_sample_reconstruct(tiny: None, tmp_path: Path):
    from viewmesh.sample.capture import write_sample

    write_sample(tmp_path / "sample", size=64, samples=1, parts=("six",))
    folder = next(p.parent for p in (tmp_path / "sample").rglob("views") if p.is_dir())
    result = viewmesh("reconstruct", folder, "-o", tmp_path / "out", "--rig", "canonical6", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["quality"]["mask_iou"] > 0.8


def test_the_version():
    result = viewmesh("--version")
    assert (result.exit_code, result.stdout) == (0, f"viewmesh {__version__}\n")


def test_the_sample_says_what_to_do_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "viewmesh.sample.capture.write_sample", lambda folder, **_: (folder / "six").mkdir(parents=True)
    )
    result = viewmesh("sample", tmp_path / "my capture")
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"wrote {tmp_path / 'my capture'}; next: viewmesh reconstruct ")
    source = shlex.split(last)[shlex.split(last).index("reconstruct") + 1]
    assert Path(source).is_dir()


def test_a_stage_that_is_over_has_a_full_bar_and_a_clock_that_stands(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, as far as rich knows
    with Bar() as bar:
        for stage, step in (("shape", 10), ("shape", 400), ("clean", 400), ("texture", 403)):
            bar(stage, step, 653)
        *over, last = bar._bars.tasks
        elapsed = [task.elapsed for task in over]
        time.sleep(0.02)
        assert [task.description for task in over] == ["shape", "clean"]
        assert all(task.finished for task in over)
        assert [task.elapsed for task in over] == elapsed
        assert not last.finished
        bar("texture", 653, 653)
        assert last.finished


def test_doctor():
    found = json.loads(viewmesh("doctor", "--json").stdout)
    assert {"Python", "torch", "CPU", "numba", "xatlas", "Disk"} <= {f["what"] for f in found}
    assert {f["state"] for f in found} <= {"ok", "optional", "problem"}
    assert all(f["remedy"] for f in found if f["state"] == "problem")
    result = viewmesh("doctor")
    assert result.exit_code == int(any(f["state"] == "problem" for f in found))
    assert all(f"{f['what']}: " in result.stdout for f in found)


# what it imports


@pytest.mark.parametrize(
    "words", [["--help"], ["reconstruct", "--help"], ["serve", "--help"], ["weights", "list", "--help"]]
)
def test_help_is_instant(words: list[str]):
    script = f"""
import sys
from serve_app.command import main
sys.argv = {["viewmesh", *words]}
try:
    main()
except SystemExit as end:
    assert not end.code
heavy = {{"torch", "ray", "numba", "scipy", "cv2", "fastapi", "dbos"}} & sys.modules.keys()
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "viewmesh" in done.stdout


THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="the kernel has no huge pages to give")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_help_promises_what_a_seed_keeps(device: str):
    told_of = inspect.signature(wishes).parameters["seed"].annotation.__metadata__[0].help
    with repeatable(torch.device(device)):
        exact = torch.are_deterministic_algorithms_enabled()
    promise = {"cpu": "same result on a CPU", "cuda": "same result on a GPU"}[device]
    assert exact == (promise in told_of)
    assert "same device" not in told_of


def test_large_tensors_come_in_few_page_faults():
    script = """
import resource, sys
from serve_app.command import main
sys.argv = ["viewmesh", "--help"]
try:
    main()
except SystemExit:
    pass
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)  # 16,384 pages of 4 KiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout.split()[-1]) < 4096


# what it refuses


def test_no_such_source(tmp_path: Path):
    assert "does not exist" in told(viewmesh("reconstruct", tmp_path / "absent", "-o", tmp_path / "out"), 2)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file(capture: Path, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    assert "file" in told(viewmesh("reconstruct", capture, "-o", tmp_path / "file"), 2)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("command", ["reconstruct", "submit", "render", "sample", "serve"])
@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/none"])
def test_an_output_folder_that_cannot_be_is_one_sentence(
    command: str, folder: str, made: tuple, capture: Path, tmp_path: Path
):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / folder  # an absolute one stays as it is
    words = {
        "reconstruct": [capture, "-o", out], "submit": [capture, "-o", out, "--url", "http://127.0.0.1:1"],
        "render": [made[0], "--cameras", capture / "cameras.json", "-o", out], "sample": [out],
        "serve": ["--data", out],
    }  # fmt: skip
    result = viewmesh(command, *words[command])
    assert result.exit_code in (1, 2), result.output
    assert isinstance(result.exception, SystemExit)
    said = " ".join(result.stderr.replace("│", " ").split())
    assert any(why in said for why in ("is a file", "Not a directory", "No such file"))
    assert "No service" not in said  # it was found out before
    assert (tmp_path / "file").read_text() == "mine"


def test_bad_input_is_one_sentence_and_a_hint(tmp_path: Path):
    synthetic.write_views(tmp_path / "bad", synthetic.around(4))
    (tmp_path / "bad" / "views" / "view_02.png").write_bytes(b"no picture")
    words = told(viewmesh("reconstruct", tmp_path / "bad", "-o", tmp_path / "out"), 2)
    assert words.startswith("viewmesh: views/view_02.png: ")
    assert "Traceback" not in words


@pytest.mark.parametrize("command", ["reconstruct", "submit"])
@pytest.mark.parametrize("name", ["view_00.png", "notes.txt"])
def test_a_source_that_is_neither_a_folder_nor_a_zip(command: str, name: str, capture: Path, tmp_path: Path):
    source = tmp_path / name
    source.write_bytes(b"" if name == "notes.txt" else (capture / "views" / name).read_bytes())
    words = told(viewmesh(command, source, "-o", tmp_path / "out"), 2)
    assert words == f"viewmesh: {name}: this is no zip; give a folder of pictures or a zip.\n"


def test_blanks_between_formats_are_no_part_of_them():
    assert wishes(formats="glb, obj ,ply")["formats"] == ("glb", "obj", "ply")


def test_the_help_of_an_option_names_all_that_it_takes():
    texts = {p.name: p.help for p in typer.main.get_command(app).commands["reconstruct"].params}  # type: ignore
    for field in ("cameras", "mask"):
        for value in get_args(ViewRules.model_fields[field].annotation):
            assert value in re.split(r"[ ,.]+", texts[field])


@pytest.mark.parametrize(
    ("option", "value"),
    [("--preset", "fast"), ("--formats", "glb,doc"), ("--formats", ""), ("--texture-size", "1000"),
     ("--target-faces", "3"), ("--seed", "-1"), ("--model", "other"), ("--mask", "magic"), ("--up", "w"),
     ("--device", "nonsense"), ("--device", "cuda:99"), ("--weights", str(TESTS)), ("--weights", f"set={TESTS}"),
     ("--weights", "trellis="), ("--weights", f"trellis={TESTS / 'none'}")],
)  # fmt: skip
def test_a_bad_option_names_itself(option: str, value: str, capture: Path, tmp_path: Path):
    words = told(viewmesh("reconstruct", capture, "-o", tmp_path / "out", option, value), 2)
    assert option in words or option.strip("-") in words.split(":")[1] or "no device" in words
    assert not any(leak in words for leak in ("Traceback", "Input should", "Value error", ".0", "views."))
    assert not (tmp_path / "out").exists()


def test_a_model_whose_weights_are_missing(capture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VIEWMESH_WEIGHTS", str(tmp_path / "none"))
    words = told(viewmesh("reconstruct", capture, "-o", tmp_path / "out", "--model", "trellis"), 3)
    assert "viewmesh weights download trellis" in words


@pytest.mark.parametrize(
    ("model", "given", "places"),
    [("auto", ["trellis=a", "dinov2=b=c"], {"trellis": "a", "dinov2": "b=c"}),
     ("trellis", ["a"], {"trellis": "a"}), ("trellis", ["b=c"], {"trellis": "b=c"}),
     ("reconviagen", ["a", "vggt-object=b=c"], {"reconviagen": "a", "vggt-object": "b=c"})],
)  # fmt: skip
def test_folders_of_weights(
    model: str, given: list[str], places: dict, capture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def run(*_: object, weights: dict, **__: object) -> None:
        raise MissingModel(str(weights))

    monkeypatch.chdir(tmp_path)
    for name in ("a", "b=c"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("viewmesh.reconstruct.reconstruct", run)
    options = [word for folder in given for word in ("--weights", folder)]
    words = told(viewmesh("reconstruct", capture, "-o", tmp_path / "out", "--model", model, *options), 3)
    assert words == f"viewmesh: { {name: Path(folder) for name, folder in places.items()} }\n"


def test_out_of_memory_gives_both_figures(tiny: None, capture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "memory_free", lambda device: 2**28)
    words = told(viewmesh("reconstruct", capture, "-o", tmp_path, "--device", "cpu"), 4)
    assert "GiB on cpu, 0.2 GiB are free" in words
    assert "smaller preset" in words


def test_nothing_to_mesh(tiny: None, capture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def empty(views: object, **_: object) -> None:
        raise EmptyReconstruction("The masks agree on no volume.", hint="Check the masks.")

    monkeypatch.setattr(problem, "initial_field", empty)
    words = told(viewmesh("reconstruct", capture, "-o", tmp_path), 5)
    assert words == "viewmesh: The masks agree on no volume.\n  Check the masks.\n"


def test_render_of_what_is_no_result(capture: Path, tmp_path: Path):
    words = told(viewmesh("render", tmp_path, "--cameras", capture / "cameras.json", "-o", tmp_path / "out"), 2)
    assert "reconstruction.safetensors" in words


# stopping and going on

DRIVER = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
import torch
torch.set_num_threads({{threads}})
from tiny_command import shrink
shrink(setattr)
from viewmesh import reconstruct
reconstruct.SLICE_S = reconstruct.CHECKPOINT_EVERY_S = 0.0  # a checkpoint after every step
from serve_app.command import main
sys.argv = {{words}}
main()
"""


def test_ctrl_c_leaves_what_resume_goes_on_from(tiny: None, made: tuple[Path, Result], capture: Path, tmp_path: Path):
    out = tmp_path / "out"
    words = ["reconstruct", str(capture), "-o", str(out)]
    code = DRIVER.format(threads=torch.get_num_threads(), words=["viewmesh", *words])
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 90
        while not (out / ".resume" / "fit.safetensors").exists() and child.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        _, told_so = child.communicate(timeout=90)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 130, told_so
    assert "Stopping after this step" in told_so
    assert "--resume goes on from here" in told_so
    assert "Traceback" not in told_so
    assert not (out / "report.json").exists()
    (out / ".resume" / "seconds.json").write_text(json.dumps({"prepare": 2000.0, "optimise": 1000.0}))
    (out / ".resume" / "fit.safetensors.part").write_bytes(b"what a kill would leave")

    kept = json.loads((out / ".resume" / "seconds.json").read_text())
    assert list(kept) == ["prepare", "optimise"]
    assert all(seconds > 0 for seconds in kept.values())
    refused = told(viewmesh(*words, "--resume", "--seed", "1"), 2)
    assert "other options" in refused
    other = told(viewmesh("reconstruct", capture / "views", "-o", out, "--resume"), 2)
    assert "another input" in other

    result = viewmesh(*words, "--resume")
    assert result.exit_code == 0, result.output
    seconds = json.loads((out / "report.json").read_text())["seconds"]
    assert seconds["prepare"] > 2000
    assert 1000 < seconds["optimise"] < 1500
    undisturbed, _ = made
    for name in ("mesh.ply", "mesh.obj", "texture.png", "environment.hdr"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert not (out / ".resume").exists()


def test_what_a_new_run_loses_is_told(tiny: None, capture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    steps: list[int] = []

    def progress(stage: str, step: int, *_: object, **__: object) -> None:
        steps.extend([step] if stage == "shape" else [])

    monkeypatch.setattr(reconstruct, "SLICE_S", 0.0)
    with pytest.raises(Cancelled):
        reconstruct.reconstruct(capture, tmp_path / "out", progress=progress, cancelled=lambda: len(steps) >= 7)

    def run(*_: object, **__: object) -> None:
        raise EmptyReconstruction("It does not begin.")

    monkeypatch.setattr(reconstruct, "reconstruct", run)

    def note(folder: Path, *words: object) -> str:
        told = viewmesh("reconstruct", capture, "-o", folder, *words).stderr
        return told[: told.index("viewmesh: It does not begin.")]

    out = tmp_path / "out"
    anew = f"note: {out}: the stopped run starts anew; --resume would have gone on"
    assert note(out) == f"{anew} at step {steps[-1]}.\n"
    assert note(out, "--resume") == note(tmp_path / "other") == ""
    assert (
        note(out, "--seed", 1)
        == f"note: {out}: what a stopped run of another input or other options left there is removed.\n"
    )
    (out / ".resume" / "fit.safetensors").unlink()
    assert note(out) == f"{anew}.\n"


def test_nothing_to_resume(capture: Path, tmp_path: Path):
    words = told(viewmesh("reconstruct", capture, "-o", tmp_path / "out", "--resume"), 2)
    assert "nothing to resume" in words


def test_a_new_run_forgets_the_stopped_one(tiny: None, made: tuple[Path, Result], capture: Path, tmp_path: Path):
    (tmp_path / ".resume").mkdir()
    for name in ("fit.safetensors", "fit.safetensors.part", "views.safetensors", "options.json"):
        (tmp_path / ".resume" / name).write_bytes(b"of another day")
    result = viewmesh("reconstruct", capture, "-o", tmp_path, "--formats", "ply")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "mesh.ply").read_bytes() == (made[0] / "mesh.ply").read_bytes()


@pytest.mark.parametrize(
    ("own", "after"),
    [
        ({}, runtime.ENVIRONMENT),
        ({"THP_MEM_ALLOC_ENABLE": "0"}, {**runtime.ENVIRONMENT, "THP_MEM_ALLOC_ENABLE": "0"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"THP_MEM_ALLOC_ENABLE": "1", "OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_a_users_own_settings_of_the_process_stay(monkeypatch, own, after):
    monkeypatch.setattr(os, "environ", dict(own))
    runtime.prepare()
    assert os.environ == after
