"""Reads every mesh file back and compares it with what was meant, before a job may call itself done."""

import io
import zipfile

import numpy as np
import trimesh
from trimesh.resolvers import Resolver

from viewmesh.errors import InvalidMesh
from viewmesh.geometry.mesh import TexturedMesh


def check_file(name: str, files: dict[str, bytes], mesh: TexturedMesh) -> None:
    """Raises InvalidMesh unless the bytes of `name` (glb, obj, ply, stl) hold mesh's triangles and bounds, those of
    usdz are whole, and those of gaussians.ply are finite numbers."""
    kind = name.rpartition(".")[2]
    if name == "gaussians.ply":
        return _check_gaussians(files[name])
    try:
        if kind == "usdz":
            return _check_zip(files[name])
        scene = trimesh.load(io.BytesIO(files[name]), file_type=kind, process=False, resolver=_InMemory(files))
        read = scene.to_geometry() if isinstance(scene, trimesh.Scene) else scene
        if not isinstance(read, trimesh.Trimesh):
            raise InvalidMesh(f"{name} holds no triangle mesh.")
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise InvalidMesh(f"{name} cannot be read back: {error}") from error
    low, high = mesh.mesh.vertices.amin(0).numpy(), mesh.mesh.vertices.amax(0).numpy()
    slack = 1e-5 * float(np.abs(high - low).max()) + 1e-6 * float(np.abs([low, high]).max())
    if len(read.faces) != len(mesh.mesh.faces):
        raise InvalidMesh(f"{name} holds {len(read.faces)} triangles instead of {len(mesh.mesh.faces)}.")
    used = mesh.mesh.vertices[mesh.mesh.faces].reshape(-1, 3)
    meant = np.stack([used.amin(0).numpy(), used.amax(0).numpy()])
    if not np.allclose(read.triangles.reshape(-1, 3).min(0), meant[0], atol=slack) or not np.allclose(
        read.triangles.reshape(-1, 3).max(0), meant[1], atol=slack
    ):
        raise InvalidMesh(f"{name} does not have the mesh's bounds.")
    return None


def _check_zip(data: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        bad = archive.testzip()
        if bad or not archive.namelist()[0].endswith(".usda"):
            raise InvalidMesh(f"mesh.usdz is damaged at {bad or 'its first entry'}.")


def _check_gaussians(data: bytes) -> None:
    if not np.isfinite(np.frombuffer(data.partition(b"end_header\n")[2], "<f4")).all():
        raise InvalidMesh("gaussians.ply holds numbers that are not finite.")


class _InMemory(Resolver):
    """Hands trimesh the files that the one it reads refers to."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    def get(self, name: str) -> bytes:
        return self.files[name.removeprefix("./")]

    def keys(self):
        return self.files.keys()

    def write(self, name: str, data) -> None:
        raise OSError("A check only reads.")

    def namespaced(self, namespace: str):
        raise OSError("A check only reads.")
