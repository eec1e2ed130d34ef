"""mesh.glb: binary glTF 2.0 with metallic-roughness PBR, and nothing that a viewer has to guess."""

import json
import struct

import numpy as np

from viewmesh import __version__
from viewmesh.export.images import Maps
from viewmesh.export.seams import split_at_seams
from viewmesh.geometry.mesh import TexturedMesh

FLOAT, UNSIGNED_SHORT, UNSIGNED_INT = 5126, 5123, 5125
ARRAY, ELEMENTS = 34962, 34963
LINEAR, TRILINEAR, CLAMP = 9729, 9987, 33071


def glb_bytes(textured: TexturedMesh, maps: Maps) -> bytes:
    """The file. The normal map is left out where it is flat. maps: of the mesh's material."""
    split = split_at_seams(textured)
    binary, views = bytearray(), []

    def add(data: bytes, **target: int) -> int:
        binary.extend(b"\0" * (-len(binary) % 4))
        views.append({"buffer": 0, "byteOffset": len(binary), "byteLength": len(data), **target})
        binary.extend(data)
        return len(views) - 1

    small = len(split.positions) < 65535  # 65535 itself is the restart index
    arrays = [
        (split.positions, "VEC3", FLOAT, np.float32, ARRAY),
        (split.normals, "VEC3", FLOAT, np.float32, ARRAY),
        (split.uvs, "VEC2", FLOAT, np.float32, ARRAY),
        (split.faces.ravel(), "SCALAR", UNSIGNED_SHORT if small else UNSIGNED_INT,
         np.uint16 if small else np.uint32, ELEMENTS),
    ]  # fmt: skip
    accessors = [
        {"bufferView": add(np.ascontiguousarray(a, t).tobytes(), target=use), "componentType": component,
         "count": len(a), "type": kind}
        for a, kind, component, t, use in arrays
    ]  # fmt: skip
    accessors[0]["min"] = split.positions.astype(np.float32).min(0).astype(float).tolist()
    accessors[0]["max"] = split.positions.astype(np.float32).max(0).astype(float).tolist()
    attributes = {"POSITION": 0, "NORMAL": 1, "TEXCOORD_0": 2}
    if "normal" in maps.names:  # then the tangents that it was made in, too: viewers would each make their own
        attributes["TANGENT"] = len(accessors)
        accessors.append({"bufferView": add(split.tangents.astype(np.float32).tobytes(), target=ARRAY),
                          "componentType": FLOAT, "count": len(split.tangents), "type": "VEC4"})  # fmt: skip
    material: dict = {
        "name": "material",
        "pbrMetallicRoughness": {
            "baseColorTexture": {"index": 0}, "metallicRoughnessTexture": {"index": 1},
            "metallicFactor": 1.0, "roughnessFactor": 1.0,
        },
        "occlusionTexture": {"index": 1},
    }  # fmt: skip
    if "normal" in maps.names:
        material["normalTexture"] = {"index": 2}
    document = {
        "asset": {"version": "2.0", "generator": f"viewmesh {__version__}"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "name": "mesh"}],
        "meshes": [{"name": "mesh", "primitives": [
            {"attributes": attributes, "indices": 3, "material": 0}]}],
        "materials": [material],
        "samplers": [{"magFilter": LINEAR, "minFilter": TRILINEAR, "wrapS": CLAMP, "wrapT": CLAMP}],
        "textures": [{"source": i, "sampler": 0, "name": name} for i, name in enumerate(maps.names)],
        "images": [{"bufferView": add(maps.png(n)), "mimeType": "image/png", "name": n} for n in maps.names],
        "accessors": accessors,
        "bufferViews": views,
    }  # fmt: skip
    binary.extend(b"\0" * (-len(binary) % 4))
    document["buffers"] = [{"byteLength": len(binary)}]
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    total = 12 + 8 + len(text) + 8 + len(binary)
    return b"".join([
        struct.pack("<4sII", b"glTF", 2, total),
        struct.pack("<I4s", len(text), b"JSON"), text,
        struct.pack("<I4s", len(binary), b"BIN\0"), bytes(binary),
    ])  # fmt: skip
