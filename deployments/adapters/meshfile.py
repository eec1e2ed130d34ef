"""A TexturedMesh as one safetensors file: what an optimiser leaves for the exporter."""

from pathlib import Path

import safetensors.torch

from viewmesh.geometry.mesh import Material, Mesh, TexturedMesh


def save_mesh(mesh: TexturedMesh, path: Path) -> None:
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
    safetensors.torch.save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def load_mesh(path: Path) -> TexturedMesh:
    t = safetensors.torch.load_file(path)
    return TexturedMesh(
        Mesh(t["vertices"], t["faces"]),
        t["uvs"],
        t["uv_faces"],
        Material(t["base_color"], t["orm"], t["normal"]),
        t.get("environment"),
    )
