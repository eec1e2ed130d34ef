"""What this machine can run, what is missing, and the command that gets it. Looks; changes nothing."""

import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from viewmesh import __version__


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's answer. "optional" things are missing without harm to the default model."""

    what: str
    state: Literal["ok", "optional", "problem"]
    detail: str
    remedy: str = ""


def examine() -> list[Finding]:
    """All findings, the most basic first."""
    return [_python(), *_compute(), *_packages(), *_weights(), _disk()]


def _python() -> Finding:
    version = platform.python_version()
    good = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Finding(
        "Python",
        "ok" if good else "problem",
        f"{version}, viewmesh {__version__}",
        "" if good else "viewmesh supports Python 3.11 to 3.13.",
    )


def _compute() -> list[Finding]:
    import torch

    from viewmesh.nvdiffrec.memory import memory_free

    free = memory_free(torch.device("cpu")) / 2**30
    found = [
        Finding("torch", "ok", torch.__version__),
        Finding("CPU", "ok", f"{os.cpu_count()} cores, {free:.1f} GiB free: preset preview in minutes"),
    ]
    if not torch.cuda.is_available():
        return [*found, Finding("GPU", "optional", "no CUDA device: nvdiffrec runs on the CPU, trellis needs a GPU")]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        found.append(Finding("GPU", "ok", f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"))
    return found


def _packages() -> list[Finding]:
    from viewmesh.render.backend_nvdiffrast import INSTALL

    optional = [
        ("nvdiffrast", "a faster rasteriser on CUDA; research and evaluation licence", INSTALL),
        ("rembg", "better masks for photos without alpha", "pip install 'viewmesh[matting]'"),
        ("triton", "compiled kernels for TRELLIS on CUDA", "pip install 'viewmesh[gpu]'"),
    ]
    required = [("numba", "the CPU rasteriser"), ("xatlas", "texture atlases"), ("pycolmap", "structure from motion")]
    found = []
    for name, use in required:
        there = importlib.util.find_spec(name) is not None
        found.append(Finding(name, "ok" if there else "problem", use, "" if there else f"pip install {name}"))
    for name, use, remedy in optional:
        there = importlib.util.find_spec(name) is not None
        found.append(Finding(name, "ok" if there else "optional", use, "" if there else remedy))
    return found


def _weights() -> list[Finding]:
    from viewmesh.weights.ready import GENERATIVE, readiness

    found = []
    for model in GENERATIVE:
        weights = readiness(model)
        state = "ok" if weights.ready else "optional"
        found.append(Finding(f"weights of {model}", state, weights.reason or "complete", weights.hint))
    return found


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    good = free > 5 * 2**30
    return Finding(
        "Disk",
        "ok" if good else "problem",
        f"{free / 2**30:.0f} GiB free here",
        "" if good else "Jobs and artifacts want at least 5 GiB free.",
    )
