"""viewmesh weights list | download | verify."""

import typer
from rich.console import Console
from rich.table import Table

from viewmesh.errors import ViewmeshError
from viewmesh.weights.download import download as download_set
from viewmesh.weights.manifest import WEIGHT_SETS, WeightSet, sets_for
from viewmesh.weights.store import list_weights
from viewmesh.weights.store import verify as verify_set

app = typer.Typer(no_args_is_help=True, help="What the generative models need on disk.")
console = Console()


def _chosen(names: list[str]) -> list[WeightSet]:
    chosen: dict[str, WeightSet] = {}
    for name in names:
        found = sets_for(name)
        if not found:
            known = sorted({*WEIGHT_SETS, *(m for s in WEIGHT_SETS.values() for m in s.used_by)})
            raise typer.BadParameter(f"{name!r} is not known; there are {', '.join(known)}.")
        chosen |= {s.name: s for s in found}
    return list(chosen.values())


@app.command("list")
def list_command() -> None:
    """What is there, where, and what is missing."""
    table = Table("set", "for", "state", "GB", "revision", "licence", "folder")
    for p in list_weights():
        state = "complete" if p.complete else f"{len(p.missing)} of {len(p.weights.files)} files missing"
        table.add_row(
            p.weights.name,
            ", ".join(p.weights.used_by),
            state,
            f"{p.bytes_present / 1e9:.2f} of {p.weights.known_bytes / 1e9:.2f}" if p.weights.known_bytes else "",
            (p.revision or p.weights.revision or "")[:12],
            p.weights.licence,
            str(p.folder),
        )
    console.print(table)


@app.command()
def download(names: list[str] = typer.Argument(help="Models (trellis, reconviagen) or sets (dinov2, …).")) -> None:
    """Download what a model needs; goes on where an earlier try stopped."""
    for weights in _chosen(names):
        if not weights.commercial:
            console.print(f"[yellow]{weights.name}: licence {weights.licence}[/]")
        try:
            folder = download_set(weights)
        except ViewmeshError as error:
            console.print(f"[red]{error}[/]\n{error.hint}")
            raise typer.Exit(1) from None
        console.print(f"{weights.name}: {folder}")


@app.command()
def verify(names: list[str] = typer.Argument(None, help="Default: every set of which something is there.")) -> None:
    """Read every file and compare its sha256 with the one that was locked at download."""
    chosen = _chosen(names) if names else [p.weights for p in list_weights() if p.bytes_present]
    failed = 0
    for weights in chosen:
        for check in verify_set(weights):
            failed += not check.passed
            console.print(f"[{'green' if check.passed else 'red'}]{check.verdict:10}[/] {check.path}")
    raise typer.Exit(1 if failed else 0)
