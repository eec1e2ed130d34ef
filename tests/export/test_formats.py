"""Every format read back by somebody else's reader: geometry, UVs, colours and material as they were meant."""

import io
import json
import os
import re
import shutil
import struct
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from results import result_of, textured_ball

from viewmesh.errors import InvalidMesh
from viewmesh.export.check import check_file
from viewmesh.export.images import dequantised, quantised
from viewmesh.export.write import FORMATS, GAUSSIAN_PLY, encode

HERE = Path(__file__).parent


def loaded(kind: str, folder: Path, mesh) -> trimesh.Trimesh:
    for name, data in encode(mesh, kind).items():
        (folder / name).write_bytes(data)
    return trimesh.load(folder / f"mesh.{kind}", process=False, force="mesh")


def corners(mesh) -> np.ndarray:
    return mesh.mesh.vertices.numpy()[mesh.mesh.faces.numpy()]


@pytest.mark.parametrize("kind", ["glb", "obj", "ply", "stl"])
def test_triangles_come_back_in_order(kind, tmp_path):
    mesh = result_of().output
    read = loaded(kind, tmp_path, mesh)
    assert np.allclose(read.triangles, corners(mesh), atol=1e-5)
    assert read.volume > 0  # the faces look outwards


@pytest.mark.parametrize("kind", ["glb", "obj"])
def test_uvs_and_textures_come_back(kind, tmp_path):
    mesh = textured_ball()
    read = loaded(kind, tmp_path, mesh)
    uv = mesh.uvs[mesh.uv_faces].numpy() * [1, -1] + [0, 1]  # trimesh counts v upwards
    assert np.allclose(np.asarray(read.visual.uv)[read.faces], uv, atol=1e-6)
    material = read.visual.material
    image = material.baseColorTexture if kind == "glb" else material.image
    assert np.array_equal(np.asarray(image.convert("RGB")), quantised(mesh.material)["base_color"])


def test_glb_says_metallic_roughness_occlusion_and_normals(tmp_path):
    mesh = textured_ball()
    read = loaded("glb", tmp_path, mesh)
    maps, material = quantised(mesh.material), read.visual.material
    assert np.array_equal(np.asarray(material.metallicRoughnessTexture)[..., :3], maps["orm"])
    assert np.array_equal(np.asarray(material.normalTexture)[..., :3], maps["normal"])
    assert np.allclose(np.linalg.norm(read.vertex_normals, axis=1), 1, atol=1e-5)
    outwards = np.asarray(read.vertices) / np.linalg.norm(read.vertices, axis=1, keepdims=True)
    assert ((read.vertex_normals * outwards).sum(1) > 0.98).all()
    document, _ = chunks(encode(mesh, "glb")["mesh.glb"])
    pbr = document["materials"][0]["pbrMetallicRoughness"]
    assert pbr["metallicFactor"] == pbr["roughnessFactor"] == 1
    assert document["materials"][0]["occlusionTexture"]["index"] == pbr["metallicRoughnessTexture"]["index"]
    flat, _ = chunks(encode(textured_ball(flat=True), "glb")["mesh.glb"])
    assert "normalTexture" not in flat["materials"][0]


def chunks(data: bytes) -> tuple[dict, bytes]:
    magic, version, total = struct.unpack_from("<4sII", data)
    assert (magic, version, total) == (b"glTF", 2, len(data))
    length, kind = struct.unpack_from("<I4s", data, 12)
    assert kind == b"JSON"
    return json.loads(data[20 : 20 + length]), data[28 + length :]


def test_the_khronos_validator_finds_nothing(tmp_path):
    node = shutil.which("node")
    if node is None or not (HERE / "node_modules" / "gltf-validator").exists():
        if os.environ.get("CI") == "true":
            pytest.fail("the glTF validator is missing: npm --prefix tests/export ci")
        pytest.skip("needs node and `npm --prefix tests/export ci`")
    files = {"bumpy": textured_ball(), "flat": textured_ball(flat=True), "moved": result_of().output}
    for name, mesh in files.items():
        (tmp_path / f"{name}.glb").write_bytes(encode(mesh, "glb")["mesh.glb"])
    broken = bytearray(encode(textured_ball(), "glb")["mesh.glb"])
    at = broken.index(b'"max":[') + 7
    broken[at : at + 3] = b"9.9"
    (tmp_path / "broken.glb").write_bytes(broken)
    paths = [str(tmp_path / f"{name}.glb") for name in [*files, "broken"]]
    out = subprocess.run([node, "validate.js", *paths], cwd=HERE, capture_output=True, text=True, check=True).stdout
    issues = {Path(path).stem: report for path, report in json.loads(out).items()}
    for name in files:
        assert issues[name]["numErrors"] == issues[name]["numWarnings"] == 0, issues[name]["messages"]
    assert issues["broken"]["numErrors"] > 0  # the validator does look


def test_obj_names_its_material_and_every_map(tmp_path):
    files = encode(textured_ball(), "obj")
    mtl = files["mesh.mtl"].decode()
    for key in ("map_Kd", "map_Pr", "map_Pm", "norm"):
        name = re.search(rf"^{key} (\S+)$", mtl, re.MULTILINE)
        assert name
        assert name[1] in files
    rough = np.asarray(Image.open(io.BytesIO(files["texture_roughness.png"])))
    assert np.array_equal(rough[..., 0], quantised(textured_ball().material)["orm"][..., 1])
    assert "norm" not in encode(textured_ball(flat=True), "obj")["mesh.mtl"].decode()


def test_ply_vertices_have_the_textures_colours(tmp_path):
    mesh = textured_ball(256)
    read = loaded("ply", tmp_path, mesh)
    image = quantised(mesh.material)["base_color"].astype(float)
    seen = np.asarray(read.visual.vertex_colors)[:, :3].astype(float)
    row = mesh.uv_faces.numpy()[:, 0]
    at = (mesh.uvs.numpy()[row] * 256).astype(int).clip(0, 255)
    inner = (mesh.uvs.numpy()[row, 0] > 0.06) & (mesh.uvs.numpy()[row, 1] > 0.1) & (mesh.uvs.numpy()[row, 1] < 0.9)
    difference = np.abs(image[at[:, 1], at[:, 0]] - seen[mesh.mesh.faces.numpy()[:, 0]])[inner, :2]
    assert difference.max() < 8  # red and green are smooth there


def test_usdz_is_an_aligned_uncompressed_package_that_names_its_textures():
    mesh = textured_ball()
    data = encode(mesh, "usdz")["mesh.usdz"]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        assert names[0] == "mesh.usda"
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
            n, extra = struct.unpack_from("<HH", data, info.header_offset + 26)
            assert (info.header_offset + 30 + n + extra) % 64 == 0
        text = archive.read("mesh.usda").decode()
    assert text.startswith("#usda 1.0\n")
    assert text.count("{") == text.count("}")
    assert text.count("[") == text.count("]")
    assert set(re.findall(r"@(.+?)@", text)) == set(names[1:])

    def numbers(name: str) -> np.ndarray:
        found = re.search(rf" {re.escape(name)} = \[(.*?)\]", text)
        assert found
        return np.array([float(x) for x in re.findall(r"[-+\d.e]+", found[1])])

    points, index = numbers("points").reshape(-1, 3), numbers("faceVertexIndices").astype(int)
    assert np.allclose(points[index.reshape(-1, 3)], corners(mesh), atol=1e-6)
    assert (numbers("faceVertexCounts") == 3).all()
    assert len(numbers("normals")) == 3 * len(points)
    st = numbers("primvars:st").reshape(-1, 2)[index].reshape(-1, 3, 2)
    assert np.allclose(st, mesh.uvs[mesh.uv_faces].numpy() * [1, -1] + [0, 1], atol=1e-6)
    prims = set(re.findall(r'def \w+ "(\w+)"', text))
    for target in re.findall(r"</([\w/]+)(?:\.[\w:]+)?>", text):
        assert set(target.split("/")) <= prims


def test_usd_core_reads_the_usdz(tmp_path):
    pxr = pytest.importorskip("pxr.Usd", reason="optional: pip install usd-core")
    path = tmp_path / "mesh.usdz"
    path.write_bytes(encode(textured_ball(), "usdz")["mesh.usdz"])
    stage = pxr.Stage.Open(str(path))
    assert len(stage.GetPrimAtPath("/mesh/geometry").GetAttribute("points").Get()) > 100


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != GAUSSIAN_PLY])
def test_a_damaged_file_is_noticed(kind):
    mesh = textured_ball()
    files = encode(mesh, kind)
    check_file(f"mesh.{kind}", files, mesh)
    other = mesh.transformed(torch.diag(torch.tensor([1.1, 1.1, 1.1, 1.0])))
    if kind == "usdz":
        data = bytearray(files["mesh.usdz"])
        data[300] ^= 1
        with pytest.raises(InvalidMesh):
            check_file("mesh.usdz", {"mesh.usdz": bytes(data)}, mesh)
    else:
        with pytest.raises(InvalidMesh):
            check_file(f"mesh.{kind}", files, other)


def test_quantised_maps_survive_the_round_trip():
    maps = quantised(textured_ball().material)
    again = quantised(dequantised(maps))
    for name in ("base_color", "orm"):
        assert np.array_equal(maps[name], again[name])
    assert np.abs(maps["normal"].astype(int) - again["normal"]).max() <= 1
