"""The commands that need no service: reconstruct, render, sample, doctor. Heavy imports happen inside the commands."""

import json
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from viewmesh import __version__
from viewmesh.command_options import takes_options
from viewmesh.errors import (
    Cancelled,
    EmptyReconstruction,
    InputError,
    InvalidMesh,
    MissingModel,
    OptionError,
    OutOfMemory,
    ViewmeshError,
)

app = typer.Typer(
    name="viewmesh",
    help="Photos of an object in, a textured PBR mesh out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

if TYPE_CHECKING:
    from viewmesh.doctor import Finding
    from viewmesh.options import Options

LINE_EVERY_S = 10.0

# the process's exit code by what went wrong; 130 is what a shell gives a program stopped by Ctrl-C
EXIT_CODES: dict[type[ViewmeshError], int] = {
    InputError: 2,
    OptionError: 2,
    MissingModel: 3,
    OutOfMemory: 4,
    EmptyReconstruction: 5,
    InvalidMesh: 5,
    Cancelled: 130,
}


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """One sentence and a hint on standard error instead of a traceback, and the exit code that belongs to it."""
    try:
        yield
    except ViewmeshError as error:
        typer.echo(f"viewmesh: {error}", err=True)
        if error.hint:
            typer.echo(f"  {error.hint}", err=True)
        code = next((c for kind, c in EXIT_CODES.items() if isinstance(error, kind)), 1)
        raise typer.Exit(code) from error
    except OSError as error:
        if error.strerror is None or isinstance(error, BrokenPipeError):  # `| head`, of which nobody needs to hear
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        typer.echo(f"viewmesh: {where}{error.strerror}.", err=True)
        raise typer.Exit(1) from error


def places_of(given: list[str], model: str) -> dict[str, Path]:
    """Folders by weight set, from `SET=DIR`, or `DIR` for the model's own. Raises OptionError naming a wrong one."""
    from viewmesh.weights.manifest import WEIGHT_SETS

    places = {}
    for text in given:
        name, named, folder = text.partition("=")
        if not named or Path(text).exists():
            name, folder = model, text
        if name not in WEIGHT_SETS:
            raise OptionError(
                f"weights: {text} names none of the sets {', '.join(WEIGHT_SETS)}.",
                hint="Write SET=DIR, or name the model, too: --model trellis --weights DIR.",
            )
        places[name] = Path(folder).expanduser()
        if not folder or not places[name].exists():
            raise OptionError(f"weights: {text} names no folder that is there.")
    return places


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; a second Ctrl-C stops at once."""
    stop = threading.Event()

    def handler(signum: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        typer.echo("\nStopping after this step; press Ctrl-C again to stop at once.", err=True)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


class Bar:
    """A live line on standard error: stage, bar, step, loss, PSNR, time left. It is a viewmesh.progress.Progress.

    Where standard error is no terminal it is a plain line at each new stage and every LINE_EVERY_S seconds.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:>5.0f}/{task.total:<5.0f}"),
            TextColumn("{task.fields[metrics]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._stage, self._task = "", TaskID(0)
        self._printed = 0.0

    def __enter__(self) -> "Bar":
        self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bars.stop()

    def __call__(self, stage: str, step: int, steps: int, **metrics: float) -> None:
        new = stage != self._stage
        shown = " ".join(f"{name} {metrics[name]:.4g}" for name in ("loss", "psnr") if name in metrics)
        if new:
            self._end_stage()
            self._stage, self._task = stage, self._bars.add_task(stage, total=steps, metrics="")
        if self._console.is_terminal:
            self._bars.update(self._task, completed=step, total=steps, metrics=shown)
        elif new or time.monotonic() - self._printed > LINE_EVERY_S:
            typer.echo(f"{stage} {step}/{steps} {shown}".rstrip(), err=True)
            self._printed = time.monotonic()

    def _end_stage(self) -> None:
        """Its bar is full and its clock stands, wherever its steps ended: some stages count those of others, too."""
        for task in self._bars.tasks:
            if not task.finished:
                self._bars.update(task.id, total=task.completed)
                self._bars.stop_task(task.id)


def tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"viewmesh {__version__}")
        raise typer.Exit


@app.callback()
def viewmesh(
    version: Annotated[
        bool, typer.Option("--version", callback=tell_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Photos of an object in, a textured PBR mesh out."""


@app.command()
@errors_as_sentences()
@takes_options
def reconstruct(
    source: Annotated[Path, typer.Argument(help="A folder or zip of views.", exists=True)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the mesh and its report go.", file_okay=False)],
    options: "Options",
    weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[SET=]DIR",
            help="Weights that are not the downloaded ones: of --model, or SET=DIR of trellis, reconviagen, dinov2 or "
            "vggt-object. May be repeated.",
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the best there is by default.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on where a stopped run left off.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on standard output.")] = False,
) -> None:
    """Reconstruct a textured mesh from a folder or zip of views."""
    from viewmesh.reconstruct import lost_by_starting
    from viewmesh.reconstruct import reconstruct as run

    places = places_of(weights or [], options.model)
    if not resume and (lost := lost_by_starting(source, out, options)):
        typer.echo(f"note: {lost}", err=True)
    with interruptible() as stop:
        try:
            with Bar() as bar:
                files = run(
                    source,
                    out,
                    options,
                    device=device,
                    weights=places,
                    resume=resume,
                    progress=bar,
                    cancelled=stop.is_set,
                )
        except Cancelled as error:
            error.hint = "The same command with --resume goes on from here."
            raise
    report = json.loads(files["report.json"].read_text())
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    tell_notes(report)
    typer.echo(f"{files.get('mesh.glb', out)}: {report['faces']} faces", err=True)


def tell_notes(report: dict[str, Any]) -> None:
    for warning in report.get("warnings", []):
        typer.echo(f"note: {warning}", err=True)


@app.command()
def sample(
    folder: Annotated[Path, typer.Argument(help="Where the sample capture goes.", file_okay=False)],
    size: Annotated[int, typer.Option(help="Side of the views, pixels.")] = 400,
) -> None:
    """Write the sample capture: six canonical RGB-D views, 24 training and 8 test views, masks, ground-truth mesh."""
    from viewmesh.sample.capture import write_sample

    with errors_as_sentences(), Bar() as bar:
        write_sample(folder, size=size, progress=bar)
    following = shlex.join(["viewmesh", "reconstruct", str(folder / "six"), "-o", "robot"])
    typer.echo(f"wrote {folder}; next: {following}", err=True)


@app.command()
def render(
    result: Annotated[Path, typer.Argument(help="A folder that viewmesh reconstruct wrote.", exists=True)],
    cameras: Annotated[Path, typer.Option(help="transforms.json of the cameras to render.", exists=True)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the pictures go.", file_okay=False)],
    environment: Annotated[Path | None, typer.Option(help="Another .hdr to light it with.")] = None,
) -> None:
    """Render a result from any cameras: RGBA with straight alpha, and 16-bit depth."""
    from viewmesh.export.rerender import rerender

    with errors_as_sentences():
        count = rerender(result, cameras, out, environment=environment)
    typer.echo(f"{count} views in {out}", err=True)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what this machine can run, what is missing, and the command that gets it."""
    from viewmesh.doctor import examine

    tell_findings(examine(), as_json=as_json)


def tell_findings(findings: "list[Finding]", *, as_json: bool) -> None:
    """One line each, and its remedy below. If there is a problem, the first on standard error, and the exit code 1."""
    if as_json:
        typer.echo(json.dumps([vars(f) for f in findings], indent=2))
    else:
        for finding in findings:
            mark = {"ok": "ok     ", "optional": "missing", "problem": "PROBLEM"}[finding.state]
            typer.echo(f"{mark}  {finding.what}: {finding.detail}")
            if finding.remedy:
                typer.echo(f"         {finding.remedy}")
    problem = next((f for f in findings if f.state == "problem"), None)
    if problem is not None:
        typer.echo(f"viewmesh: {problem.what}: {problem.detail}", err=True)
        raise typer.Exit(1)
