"""mesh.obj, mesh.mtl and the textures beside them. OBJ's v grows upwards."""

import numpy as np

from viewmesh.export.images import Maps, png
from viewmesh.export.seams import unit_normals
from viewmesh.geometry.mesh import TexturedMesh


def obj_files(textured: TexturedMesh, maps: Maps) -> dict[str, bytes]:
    """File contents by name. Vertices are not doubled: each corner names its vertex, UV and normal. maps: of the mesh's
    material."""
    orm = maps.images["orm"]
    files = {
        "mesh.obj": _obj(textured),
        "texture.png": maps.png("base_color"),
        "texture_roughness.png": png(orm[..., 1:2].repeat(3, -1)),
        "texture_metallic.png": png(orm[..., 2:3].repeat(3, -1)),
    }
    if "normal" in maps.names:
        files["texture_normal.png"] = maps.png("normal")
    files["mesh.mtl"] = _mtl("texture_normal.png" in files)
    return files


def _obj(textured: TexturedMesh) -> bytes:
    faces, uv_faces = textured.mesh.faces.numpy() + 1, textured.uv_faces.numpy() + 1
    corners = np.stack([faces, uv_faces, faces], -1)  # vertex, UV, normal
    text = (
        "# viewmesh, +y up\nmtllib mesh.mtl\no mesh\n",
        _lines("v %.8g %.8g %.8g\n", textured.mesh.vertices.numpy()),
        _lines("vt %.8g %.8g\n", textured.uvs.numpy() * [1, -1] + [0, 1]),
        _lines("vn %.5f %.5f %.5f\n", unit_normals(textured)),
        "usemtl material\n",
        _lines("f %d/%d/%d %d/%d/%d %d/%d/%d\n", corners),
    )
    return "".join(text).encode()


def _lines(line: str, rows: np.ndarray) -> str:
    """One line per row. All at once: a list for each row would wake the garbage collector again and again."""
    return (line * len(rows)) % tuple(rows.ravel().tolist())


def _mtl(normal_map: bool) -> bytes:
    """The common keys, and the PBR ones (map_Pr, map_Pm, norm) that Blender and others read."""
    lines = [
        "newmtl material", "Ka 0 0 0", "Kd 1 1 1", "Ks 0.04 0.04 0.04", "Ns 32", "d 1", "illum 2", "Pr 1", "Pm 1",
        "map_Kd texture.png", "map_Pr texture_roughness.png", "map_Pm texture_metallic.png",
    ]  # fmt: skip
    return ("\n".join(lines + (["norm texture_normal.png"] if normal_map else [])) + "\n").encode()
