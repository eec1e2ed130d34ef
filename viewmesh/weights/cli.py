"""viewmesh weights list | download | verify."""

import typer
from rich.console import Console

from viewmesh.errors import ViewmeshError
from viewmesh.weights.download import download as download_set
from viewmesh.weights.manifest import WEIGHT_SETS, WeightSet, sets_for
from viewmesh.weights.store import list_weights, local_folder, weights_root
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
    for p in list_weights():
        w = p.weights
        state = "complete" if p.complete else f"{len(p.missing)} of {len(w.files)} files missing"
        elsewhere = None if p.complete else local_folder(w.name)
        size = f"{p.bytes_present / 1e9:.2f} GB here" + (f" of {w.known_bytes / 1e9:.2f} GB" if w.known_bytes else "")
        revision = p.revision or w.revision or "the newest, locked at download"
        color = "green" if p.complete else "yellow"
        console.print(f"[bold]{w.name}[/] for {', '.join(w.used_by)}: [{color}]{state}[/], {size}")
        lines = [f"from    {w.source} at {revision}", f"in      {p.folder}", f"licence {w.licence}"]
        if elsewhere is not None:
            lines.insert(2, f"or in   {elsewhere}, Hugging Face's cache, which is used")
        for line in lines:
            console.print(f"    {line}", soft_wrap=True, highlight=False)


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
    if not chosen:
        console.print(
            f"No weights are in {weights_root()}; viewmesh weights download trellis gets some.", soft_wrap=True
        )
    failed = 0
    for weights in chosen:
        for check in verify_set(weights):
            failed += not check.passed
            console.print(f"[{'green' if check.passed else 'red'}]{check.verdict:10}[/] {check.path}")
    raise typer.Exit(1 if failed else 0)
