"""A TexturedMesh, with Gaussians and previews if there are any, as one safetensors file: what a model leaves for the
exporter. A Mesh as what it leaves for who textures it."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors
import safetensors.torch
import torch

from viewmesh.geometry.gaussians import Gaussians
from viewmesh.geometry.mesh import Material, Mesh, TexturedMesh

NONE: Mapping[str, Any] = MappingProxyType({})


def save_mesh(
    mesh: TexturedMesh,
    path: Path,
    gaussians: Gaussians | None = None,
    notes: Mapping[str, Any] = NONE,
    previews: Mapping[str, bytes] = NONE,
) -> None:
    """notes: whatever JSON can say. previews: files by name."""
    tensors = {
        "vertices": mesh.mesh.vertices,
        "faces": mesh.mesh.faces,
        "uvs": mesh.uvs,
        "uv_faces": mesh.uv_faces,
        "base_color": mesh.material.base_color,
        "orm": mesh.material.orm,
        "normal": mesh.material.normal,
    }
    if mesh.environment is not None:
        tensors["environment"] = mesh.environment
    if gaussians is not None:
        tensors |= {f"gaussians.{name}": tensor for name, tensor in gaussians.tensors().items()}
    tensors |= {f"previews.{name}": _bytes(data) for name, data in previews.items()}
    _save(tensors, path, notes)


def save_plain(mesh: Mesh, path: Path, gaussians: Gaussians | None = None, notes: Mapping[str, Any] = NONE) -> None:
    """A mesh without UVs; `load_plain`, `load_gaussians` and `load_notes` read it."""
    tensors = {"vertices": mesh.vertices, "faces": mesh.faces.int()}
    if mesh.vertex_colors is not None:
        tensors["vertex_colors"] = mesh.vertex_colors
    if gaussians is not None:
        tensors |= {f"gaussians.{name}": tensor for name, tensor in gaussians.tensors().items()}
    _save(tensors, path, notes)


def load_plain(path: Path, device: torch.device | str = "cpu") -> Mesh:
    t = {name: tensor.to(device) for name, tensor in safetensors.torch.load_file(path).items()}
    return Mesh(t["vertices"], t["faces"].long(), t.get("vertex_colors"))


def _save(tensors: dict[str, torch.Tensor], path: Path, notes: Mapping[str, Any]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    taken = set()
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        if memory in taken:  # the format shares none
            tensors[name] = tensor.clone()
        taken.add(memory)
    safetensors.torch.save_file(tensors, path, {"notes": json.dumps(dict(notes))})


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def load_notes(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, framework="pt") as stored:
        return json.loads((stored.metadata() or {}).get("notes", "{}"))


def load_mesh(path: Path) -> TexturedMesh:
    t = safetensors.torch.load_file(path)
    return TexturedMesh(
        Mesh(t["vertices"], t["faces"]),
        t["uvs"],
        t["uv_faces"],
        Material(t["base_color"], t["orm"], t["normal"]),
        t.get("environment"),
    )


def load_gaussians(path: Path) -> Gaussians | None:
    """The file's Gaussians, None where there are none."""
    found = _named(path, "gaussians.")
    return Gaussians(**found) if found else None


def load_previews(path: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in _named(path, "previews.").items()}


def _named(path: Path, prefix: str) -> dict[str, torch.Tensor]:
    with safetensors.safe_open(path, framework="pt") as stored:
        names = [name for name in stored.keys() if name.startswith(prefix)]  # noqa: SIM118
        return {name.removeprefix(prefix): stored.get_tensor(name) for name in names}
