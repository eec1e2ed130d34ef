"""Whether a generative model's weights are on this machine, and what is worth knowing about them. No torch, no network.

`places` names folders (or repositories) by weight set, e.g. {"trellis": "/models/TRELLIS-image-large"}; a set that it
does not name is looked for where `viewmesh weights download` puts it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from viewmesh.weights.manifest import WEIGHT_SETS, sets_for
from viewmesh.weights.store import local_folder, read_lock

GENERATIVE = ("trellis", "reconviagen")
Places = Mapping[str, Path | str]
DOWNLOADED: Places = MappingProxyType({})  # every set where `viewmesh weights download` puts it
SPARE_BYTES = 4 << 30  # what a run needs beside the weights, about


@dataclass(frozen=True)
class Readiness:
    """reason: one sentence, hint: the command that helps; both empty when ready."""

    ready: bool
    reason: str = ""
    hint: str = ""


def readiness(model: str, places: Places = DOWNLOADED) -> Readiness:
    """Whether every weight set that the model needs is here and whole."""
    missing = [name for name in _needed(model, places) if _folder(name, places) is None]
    if not missing:
        return Readiness(True)
    named = [f"{places[name]} is not a folder of weights" for name in missing if name in places]
    reason = f"{'; '.join(named)}." if named else f"The weights of {model} are not installed ({', '.join(missing)})."
    return Readiness(False, reason, f"viewmesh weights download {model}")


def vram_bytes(model: str, places: Places = DOWNLOADED) -> int:
    """Device memory that the model wants free: its files and what a run needs beside them; 0 without the weights."""
    folders = [_folder(name, places) for name in _needed(model, places)]
    if None in folders:
        return 0
    files = {
        f.resolve() for folder in folders if folder for s in ("safetensors", "pth") for f in folder.rglob(f"*.{s}")
    }
    return sum(f.stat().st_size for f in files) + SPARE_BYTES


def revision(model: str, places: Places = DOWNLOADED) -> str:
    """The commit of the repository that the model's own weights came from, "" where nothing says."""
    folder = _folder(model, places)
    if folder is None:
        return ""
    lock = read_lock(folder)
    if lock is not None:
        return lock.revision
    return folder.name if folder.parent.name == "snapshots" else ""


def licence_notes(model: str) -> tuple[str, ...]:
    """One sentence per weight set; the first says so if a result may not be used commercially."""
    sets = sets_for(model)
    notes = tuple(f"{s.source}: {s.licence}" for s in sets)
    if all(s.commercial for s in sets):
        return notes
    return (f"Treat results of {model} as non-commercial: so are the weights it runs on.", *notes)


def place(name: str, places: Places = DOWNLOADED) -> Path | str:
    """Where to load a weight set from."""
    return places.get(name, name)


def _needed(model: str, places: Places) -> list[str]:
    names = [s.name for s in sets_for(model)]
    folder = _folder(model, places)
    if folder is not None and _brings_encoder(folder):
        names.remove("dinov2")
    return sorted(names, key=lambda name: name != model)


def _brings_encoder(folder: Path) -> bool:
    """True where the image encoder lies beside the networks."""
    if any(folder.glob("dinov2_vitl14_reg4*")):
        return True
    try:
        named = json.loads((folder / "pipeline.json").read_text())["args"]["image_cond_model"]
        return (folder / f"{named}.json").is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _folder(name: str, places: Places) -> Path | None:
    given = places.get(name)
    if given is None:
        return local_folder(name)
    if Path(given).is_dir():
        wanted = "config.json" if name == "vggt-object" else "pipeline.json"
        return Path(given) if name == "dinov2" or (Path(given) / wanted).is_file() else None
    return local_folder(str(given)) if str(given) in {s.source for s in WEIGHT_SETS.values()} else None
