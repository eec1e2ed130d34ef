"""mesh.obj, mesh.mtl and the textures beside them. OBJ's v grows upwards."""

import numpy as np

from viewmesh.export.images import is_flat, png, quantised
from viewmesh.export.seams import unit_normals
from viewmesh.geometry.mesh import TexturedMesh


def obj_files(textured: TexturedMesh) -> dict[str, bytes]:
    """File contents by name. Vertices are not doubled: each corner names its vertex, UV and normal."""
    maps = quantised(textured.material)
    files = {
        "mesh.obj": _obj(textured),
        "texture.png": png(maps["base_color"]),
        "texture_roughness.png": png(maps["orm"][..., 1:2].repeat(3, -1)),
        "texture_metallic.png": png(maps["orm"][..., 2:3].repeat(3, -1)),
    }
    if not is_flat(maps["normal"]):
        files["texture_normal.png"] = png(maps["normal"])
    files["mesh.mtl"] = _mtl("texture_normal.png" in files)
    return files


def _obj(textured: TexturedMesh) -> bytes:
    uvs = textured.uvs.numpy() * [1, -1] + [0, 1]
    lines = ["# viewmesh, +y up", "mtllib mesh.mtl", "o mesh"]
    lines += [f"v {x:.8g} {y:.8g} {z:.8g}" for x, y, z in textured.mesh.vertices.tolist()]
    lines += [f"vt {u:.8g} {v:.8g}" for u, v in uvs.tolist()]
    lines += [f"vn {x:.5f} {y:.5f} {z:.5f}" for x, y, z in unit_normals(textured).tolist()]
    lines += ["usemtl material"]
    corners = np.stack([textured.mesh.faces.numpy(), textured.uv_faces.numpy()], -1) + 1
    lines += [
        f"f {a}/{p}/{a} {b}/{q}/{b} {c}/{r}/{c}" for (a, p), (b, q), (c, r) in corners.tolist()
    ]  # fmt: skip
    return ("\n".join(lines) + "\n").encode()


def _mtl(normal_map: bool) -> bytes:
    """The common keys, and the PBR ones (map_Pr, map_Pm, norm) that Blender and others read."""
    lines = [
        "newmtl material", "Ka 0 0 0", "Kd 1 1 1", "Ks 0.04 0.04 0.04", "Ns 32", "d 1", "illum 2", "Pr 1", "Pm 1",
        "map_Kd texture.png", "map_Pr texture_roughness.png", "map_Pm texture_metallic.png",
    ]  # fmt: skip
    return ("\n".join(lines + (["norm texture_normal.png"] if normal_map else [])) + "\n").encode()
