"""Whether a generative model's weights are on this machine, and what is worth knowing about them. No torch, no network.

`places` names folders (or repositories) by weight set, e.g. {"trellis": "/models/TRELLIS-image-large"}, of the image
encoder (dinov2) its file, too; a set that it does not name is looked for where `viewmesh weights download` puts it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from viewmesh.weights.manifest import WEIGHT_SETS, sets_for
from viewmesh.weights.store import local_folder, read_lock

GENERATIVE = ("trellis", "reconviagen")
Places = Mapping[str, Path | str]
DOWNLOADED: Places = MappingProxyType({})  # every set where `viewmesh weights download` puts it
ENCODER_SUFFIXES = ("safetensors", "pth")
SPARE_BYTES = 4 << 30  # what a run needs beside the weights, about


@dataclass(frozen=True)
class Readiness:
    """reason: one sentence, hint: the command that helps; both empty when ready."""

    ready: bool
    reason: str = ""
    hint: str = ""


def readiness(model: str, places: Places = DOWNLOADED) -> Readiness:
    """Whether every file that loading the model opens is here: not empty, and of its size where that is known."""
    absent, wrong = [], []
    for name, where in _found(model, places).items():
        if where is None and name not in places:
            absent.append(name)
        elif where is None:
            wrong.append(f"{places[name]} is not a folder of weights")
        elif faults := _faults(name, where, exact=where != Path(places.get(name, ""))):
            wrong.append(faults[0] + (f" (and {len(faults) - 1} more)" if faults[1:] else ""))
    if not absent and not wrong:
        return Readiness(True)
    reason = f"{'; '.join(wrong)}." if wrong else f"The weights of {model} are not installed ({', '.join(absent)})."
    return Readiness(False, reason, f"viewmesh weights download {model}")


def vram_bytes(model: str, places: Places = DOWNLOADED) -> int:
    """Device memory that the model wants free: its files and what a run needs beside them; 0 without the weights."""
    if not readiness(model, places).ready:
        return 0
    opened = {f.resolve() for name, where in _found(model, places).items() if where for f in _opened(name, where)}
    return sum(file.stat().st_size for file in opened if file.suffix != ".json") + SPARE_BYTES


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


def encoder_in(place: Path) -> Path | None:
    """The image encoder's file: the place itself, or what lies in that folder."""
    if place.is_file():
        return place
    return next((file for suffix in ENCODER_SUFFIXES for file in sorted(place.glob(f"*.{suffix}"))), None)


def _found(model: str, places: Places) -> dict[str, Path | None]:
    """Where each weight set that the model needs lies, its own first. The image encoder's may be a file."""
    names = sorted((s.name for s in sets_for(model)), key=lambda name: name != model)
    found = {name: _folder(name, places) for name in names}
    own = found.get(model)
    if own is not None and "dinov2" not in places:
        found["dinov2"] = _encoder_beside(own) or found["dinov2"]
    return found


def _folder(name: str, places: Places) -> Path | None:
    given = places.get(name)
    if given is None:
        return local_folder(name)
    if Path(given).is_dir() or (name == "dinov2" and Path(given).is_file()):
        return Path(given)
    return local_folder(str(given)) if str(given) in {s.source for s in WEIGHT_SETS.values()} else None


def _faults(name: str, where: Path, *, exact: bool) -> list[str]:
    """What is wrong with the files of a weight set. exact: their sizes are known; a conversion has others."""
    weights = WEIGHT_SETS[name]
    sizes = {where / file.path: file.size for file in weights.files if exact}
    broken = [file for file in _opened(name, where) if not _whole(file, sizes.get(file))]
    if broken:
        return [f"{file} is missing or not whole" for file in broken]
    return [f"{where / 'pipeline.json'} names no {role}" for role in weights.roles if role not in _networks(where)]


def _whole(file: Path, size: int | None) -> bool:
    found = file.stat().st_size if file.is_file() else 0
    return found > 0 if size is None else found == size


def _opened(name: str, where: Path) -> list[Path]:
    """The files that loading a weight set opens, whether they are there or not."""
    weights = WEIGHT_SETS[name]
    if name == "dinov2":
        file = encoder_in(where) or where / weights.files[0].path
        return [file, config] if (config := file.with_suffix(".json")).exists() else [file]
    if not weights.roles:
        return [where / file.path for file in weights.files]
    named = _networks(where)
    stems = [_stem(where, str(named[role])) for role in weights.roles if role in named]
    files = [Path(f"{stem}.{suffix}") for stem in stems for suffix in ("json", "safetensors")]
    return [where / "pipeline.json", *files]


def _stem(folder: Path, entry: str) -> Path:
    """A network's path without suffix, found as loading finds it: in the folder, else in another repository."""
    owner, _, rest = entry.partition("/")
    name, _, inside = rest.partition("/")
    other = local_folder(f"{owner}/{name}") if inside and not (folder / f"{entry}.json").exists() else None
    return folder / entry if other is None else other / inside


def _encoder_beside(folder: Path) -> Path | None:
    """The image encoder's file where pipeline.json names one, or one lies beside it; found as loading finds it."""
    named = _pipeline(folder).get("image_cond_model", "dinov2_vitl14_reg")
    if (folder / f"{named}.json").exists():
        return folder / f"{named}.safetensors"
    return next((file for s in ENCODER_SUFFIXES for file in folder.glob(f"dinov2_vitl14_reg4*.{s}")), None)


def _networks(folder: Path) -> dict[str, Any]:
    """The networks that pipeline.json names, by role: paths without suffix."""
    models = _pipeline(folder).get("models")
    return models if isinstance(models, dict) else {}


def _pipeline(folder: Path) -> dict[str, Any]:
    """The arguments in pipeline.json; empty where there are none to read."""
    try:
        args = json.loads((folder / "pipeline.json").read_text())["args"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return args if isinstance(args, dict) else {}
