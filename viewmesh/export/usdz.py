"""mesh.usdz: a UsdPreviewSurface mesh for AR viewers. A text layer in an uncompressed, 64-byte-aligned zip."""

import io
import zipfile

import numpy as np

from viewmesh.export.images import Maps
from viewmesh.export.seams import split_at_seams
from viewmesh.geometry.mesh import TexturedMesh


def usdz_bytes(textured: TexturedMesh, maps: Maps) -> bytes:
    """The archive: mesh.usda first, as the format demands, then its textures. maps: of the mesh's material."""
    entries = [("mesh.usda", _layer(textured, "normal" in maps.names).encode())]
    entries += [(f"textures/{n}.png", maps.png(n)) for n in maps.names]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries:
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            start = buffer.tell() + 30 + len(name)  # where the data would begin without padding
            pad = (-start - 4) % 64
            info.extra = b"\x86\x19" + pad.to_bytes(2, "little") + b"\0" * pad  # 0x1986: USD's own padding field
            archive.writestr(info, data)
    return buffer.getvalue()


def _layer(textured: TexturedMesh, normal_map: bool) -> str:
    mesh = split_at_seams(textured)
    uvs = mesh.uvs * [1, -1] + [0, 1]
    low, high = mesh.positions.min(0), mesh.positions.max(0)
    textures = _texture("base_color", "float3", "rgb", space="sRGB") + _texture("orm", "float", "r g b")
    bind = ""
    if normal_map:
        textures += _texture("normal", "float3", "rgb", "(2, 2, 2, 2)", "(-1, -1, -1, -1)")
        bind = "            normal3f inputs:normal.connect = </mesh/material/normal.outputs:rgb>\n"
    return f"""#usda 1.0
(
    defaultPrim = "mesh"
    metersPerUnit = 1
    upAxis = "Y"
)

def Xform "mesh" (
    kind = "component"
)
{{
    def Mesh "geometry" (
        prepend apiSchemas = ["MaterialBindingAPI"]
    )
    {{
        uniform token subdivisionScheme = "none"
        uniform token orientation = "rightHanded"
        float3[] extent = {_tuples(np.stack([low, high]))}
        int[] faceVertexCounts = [{", ".join(["3"] * len(mesh.faces))}]
        int[] faceVertexIndices = [{", ".join(map(str, mesh.faces.ravel().tolist()))}]
        point3f[] points = {_tuples(mesh.positions)}
        normal3f[] normals = {_tuples(mesh.normals)} (
            interpolation = "vertex"
        )
        texCoord2f[] primvars:st = {_tuples(uvs)} (
            interpolation = "vertex"
        )
        rel material:binding = </mesh/material>
    }}

    def Material "material"
    {{
        token outputs:surface.connect = </mesh/material/surface.outputs:surface>

        def Shader "surface"
        {{
            uniform token info:id = "UsdPreviewSurface"
            color3f inputs:diffuseColor.connect = </mesh/material/base_color.outputs:rgb>
            float inputs:occlusion.connect = </mesh/material/orm.outputs:r>
            float inputs:roughness.connect = </mesh/material/orm.outputs:g>
            float inputs:metallic.connect = </mesh/material/orm.outputs:b>
{bind}            int inputs:useSpecularWorkflow = 0
            token outputs:surface
        }}

        def Shader "uv"
        {{
            uniform token info:id = "UsdPrimvarReader_float2"
            string inputs:varname = "st"
            float2 outputs:result
        }}
{textures}    }}
}}
"""


def _texture(name: str, kind: str, outputs: str, scale="", bias="", space="raw") -> str:
    lines = [
        "", f'        def Shader "{name}"', "        {", '            uniform token info:id = "UsdUVTexture"',
        f"            asset inputs:file = @textures/{name}.png@",
        "            float2 inputs:st.connect = </mesh/material/uv.outputs:result>",
        f'            token inputs:sourceColorSpace = "{space}"',
        '            token inputs:wrapS = "clamp"', '            token inputs:wrapT = "clamp"',
    ]  # fmt: skip
    if scale:
        lines += [f"            float4 inputs:scale = {scale}", f"            float4 inputs:bias = {bias}"]
    lines += [f"            {kind} outputs:{o}" for o in outputs.split()]
    return "\n".join([*lines, "        }", ""])


def _tuples(rows: np.ndarray) -> str:
    return "[" + ", ".join("(" + ", ".join(f"{x:.8g}" for x in row) + ")" for row in rows.tolist()) + "]"
