"""The nouns that leave the library: Mesh, Material, TexturedMesh.

All are frozen values. Frames: a mesh is in the frame of whatever made it; `report.json` carries `world_from_mesh`.
Textures: row 0 is the top; UV (0, 0) is the top-left corner of the image and v grows downwards, as in glTF.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from viewmesh.errors import InvalidMesh


@dataclass(frozen=True)
class Mesh:
    """A triangle mesh.

    vertices: (V, 3) float32.
    faces: (F, 3) int64, counter-clockwise seen from outside.
    vertex_colors: (V, 3) float32 linear RGB in [0, 1], or None.
    """

    vertices: Tensor  # (V, 3)
    faces: Tensor  # (F, 3)
    vertex_colors: Tensor | None = None  # (V, 3)

    def to(self, device: torch.device | str) -> "Mesh":
        colors = None if self.vertex_colors is None else self.vertex_colors.to(device)
        return Mesh(self.vertices.to(device), self.faces.to(device), colors)

    def transformed(self, target_from_mesh: Tensor) -> "Mesh":
        """The same mesh in another frame; target_from_mesh is a (4, 4) similarity (a reflection flips the faces)."""
        m = target_from_mesh.to(self.vertices)
        faces = self.faces if torch.linalg.det(m[:3, :3]) > 0 else self.faces.flip(-1)
        return replace(self, vertices=self.vertices @ m[:3, :3].T + m[:3, 3], faces=faces)

    def validate(self) -> "Mesh":
        """Returns self; raises InvalidMesh unless of the shapes above, finite, non-empty and with indices in range."""
        V, F = len(self.vertices), len(self.faces)
        if self.vertices.shape != (V, 3) or not _are_triples(self.faces):
            shapes = f"{tuple(self.vertices.shape)} and {tuple(self.faces.shape)} {self.faces.dtype}"
            raise InvalidMesh(f"A mesh has vertices (V, 3) and faces (F, 3) of integers, this one has {shapes}.")
        if V == 0 or F == 0:
            raise InvalidMesh(f"The mesh is empty: {V} vertices, {F} faces.")
        if not bool(torch.isfinite(self.vertices).all()):
            raise InvalidMesh("The mesh has vertices that are not finite.")
        if int(self.faces.min()) < 0 or int(self.faces.max()) >= V:
            raise InvalidMesh(f"A face names a vertex outside 0..{V - 1}.")
        if self.vertex_colors is not None and self.vertex_colors.shape != (V, 3):
            raise InvalidMesh(f"vertex_colors has shape {tuple(self.vertex_colors.shape)}, expected {(V, 3)}.")
        return self


@dataclass(frozen=True)
class Material:
    """PBR maps of one size, glTF's metallic-roughness model.

    base_color: (H, W, 3) float32 linear RGB in [0, 1].
    orm: (H, W, 3) float32 linear: occlusion, roughness, metallic.
    normal: (H, W, 3) float32 unit tangent-space normals, +y up (glTF), (0, 0, 1) where flat.
    """

    base_color: Tensor  # (H, W, 3)
    orm: Tensor  # (H, W, 3)
    normal: Tensor  # (H, W, 3)


@dataclass(frozen=True)
class TexturedMesh:
    """A mesh, its UV atlas, its material and the light it was seen under.

    uvs: (T, 2) float32 in [0, 1], row-0-top convention; uv_faces: (F, 3) int64 into uvs, one row per face of `mesh`.
    environment: (H, 2H, 3) float32 linear radiance, latitude-longitude. Row 0 is +y of the mesh's frame; the column of
        a direction d away from the object is u = atan2(d.x, -d.z) / 2π mod 1. None if no light was estimated.
    """

    mesh: Mesh
    uvs: Tensor  # (T, 2)
    uv_faces: Tensor  # (F, 3)
    material: Material
    environment: Tensor | None = None  # (H, W, 3)

    def to(self, device: torch.device | str) -> "TexturedMesh":
        m = self.material
        return TexturedMesh(
            self.mesh.to(device),
            self.uvs.to(device),
            self.uv_faces.to(device),
            Material(m.base_color.to(device), m.orm.to(device), m.normal.to(device)),
            None if self.environment is None else self.environment.to(device),
        )

    def transformed(self, target_from_mesh: Tensor) -> "TexturedMesh":
        """The same textured mesh in another frame. The environment is not rotated: see `render.light`."""
        flipped = torch.linalg.det(target_from_mesh[:3, :3]) < 0
        uv_faces = self.uv_faces.flip(-1) if flipped else self.uv_faces
        return replace(self, mesh=self.mesh.transformed(target_from_mesh), uv_faces=uv_faces)

    def validate(self) -> "TexturedMesh":
        """Returns self; raises InvalidMesh on a bad mesh, UVs outside [0, 1] or indices out of range, or bad maps."""
        self.mesh.validate()
        if self.uv_faces.shape != self.mesh.faces.shape or not _are_triples(self.uv_faces):
            shapes = f"{tuple(self.uv_faces.shape)} {self.uv_faces.dtype}, faces {tuple(self.mesh.faces.shape)}"
            raise InvalidMesh(f"uv_faces must be integers of the shape of faces, it is {shapes}.")
        if self.uvs.shape != (len(self.uvs), 2):
            raise InvalidMesh(f"uvs has shape {tuple(self.uvs.shape)}, expected {(len(self.uvs), 2)}.")
        if int(self.uv_faces.min()) < 0 or int(self.uv_faces.max()) >= len(self.uvs):
            raise InvalidMesh(f"A face names a UV outside 0..{len(self.uvs) - 1}.")
        if not bool(torch.isfinite(self.uvs).all()) or float(self.uvs.min()) < 0 or float(self.uvs.max()) > 1:
            raise InvalidMesh("The mesh has UVs outside [0, 1].")
        images = {name: getattr(self.material, name) for name in ("base_color", "orm", "normal")}
        images |= {} if self.environment is None else {"environment": self.environment}
        for name, image in images.items():
            if image.ndim != 3 or image.shape[-1] != 3 or not bool(torch.isfinite(image).all()):
                raise InvalidMesh(f"The {name} texture must be a finite (H, W, 3) image, got {tuple(image.shape)}.")
        return self


def _are_triples(faces: Tensor) -> bool:
    return faces.shape == (len(faces), 3) and faces.dtype in (torch.int64, torch.int32)
