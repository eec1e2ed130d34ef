import errno
import json
from dataclasses import fields, replace
from functools import partial

import av
import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from results import result_of, similarity, textured_ball
from safetensors.torch import load, save
from synthetic_views import blanked

from viewmesh.errors import Cancelled, InputError, InvalidMesh, OptionError
from viewmesh.export import files as files_module
from viewmesh.export import preview
from viewmesh.export.files import WriteError, write_whole
from viewmesh.export.hdr import read_environment
from viewmesh.export.images import straight_uint8
from viewmesh.export.metrics import chamfer, psnr
from viewmesh.export.report import Report, measure
from viewmesh.export.rerender import rerender
from viewmesh.export.result import Reconstruction
from viewmesh.export.store import FACTS, FORMAT, load_reconstruction, reconstruction_bytes, reexport
from viewmesh.export.write import GAUSSIAN_PLY, STORED, export
from viewmesh.geometry.camera import canonical6
from viewmesh.geometry.clean import is_watertight
from viewmesh.geometry.gaussians import Gaussians
from viewmesh.geometry.mesh import TexturedMesh
from viewmesh.geometry.meshfile import load_previews, save_mesh
from viewmesh.render.draw import draw, draw_depth
from viewmesh.render.light import latlong_directions
from viewmesh.views.viewset import ViewSet


def views_of(mesh, size: int = 64) -> ViewSet:
    cameras = canonical6(size, size)
    drawn = draw(mesh, cameras, mesh.environment)
    images = torch.from_numpy(np.stack([straight_uint8(d) for d in drawn]))
    return ViewSet(tuple(f"view_{i:02d}.png" for i in range(6)), images, cameras, mask_source="alpha")


def test_a_whole_export(tmp_path, monkeypatch):
    mesh = textured_ball()
    steps = []
    monkeypatch.setattr(preview, "turntable_bytes", partial(preview.turntable_bytes, frames=3, side=64))
    monkeypatch.setattr(preview, "thumbnail_bytes", partial(preview.thumbnail_bytes, side=64))
    written = export(
        result_of(mesh, views=views_of(mesh), generated_together=3), tmp_path, ("glb", "obj", "ply", "stl", "usdz"),
        progress=lambda stage, step, of, **_: steps.append((stage, step, of)),
    )  # fmt: skip
    assert {p.name for p in tmp_path.iterdir()} == set(written)
    assert steps[-1] == ("export", 8, 8)
    report = Report.model_validate_json((tmp_path / "report.json").read_text())
    assert report.watertight
    assert report.components == 1
    assert report.faces == len(mesh.mesh.faces)
    assert 0.5 < report.uv_coverage < 0.9
    assert report.seconds["optimise"] == 1.5
    assert report.generated_together == 3
    assert report.seconds["export"] > 0
    assert set(report.files) == set(written)
    assert report.quality is not None
    assert report.quality.views == 6
    assert report.quality.psnr_db > 30  # its own renders
    assert report.quality.mask_iou is not None
    assert report.quality.mask_iou > 0.97
    assert torch.allclose(read_environment((tmp_path / "environment.hdr").read_bytes()), mesh.environment, atol=0.02)
    picture = np.asarray(Image.open(tmp_path / "thumbnail.png"))
    assert picture.shape[2] == 4
    assert 0.3 < (picture[..., 3] > 127).mean() < 0.8
    with av.open(str(tmp_path / "turntable.mp4")) as video:
        assert len(list(video.decode(video=0))) == 3
        assert video.streams.video[0].codec_context.pix_fmt == "yuv420p"


def test_previews_that_were_drawn_where_the_mesh_was_made_are_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(preview, "turntable_bytes", partial(preview.turntable_bytes, frames=2, side=64))
    monkeypatch.setattr(preview, "thumbnail_bytes", partial(preview.thumbnail_bytes, side=64))
    result = result_of(textured_ball())
    drawn = preview.previews(result.mesh)
    save_mesh(result.mesh, tmp_path / "made", previews=drawn)
    assert load_previews(tmp_path / "made") == drawn
    save_mesh(result.mesh, tmp_path / "without")
    assert load_previews(tmp_path / "without") == {}
    early = export(replace(result, previews=drawn), tmp_path / "early", ("ply",))
    assert {name: early[name].read_bytes() for name in drawn} == drawn
    late = export(result, tmp_path / "late", ("ply",))  # in the files' frame: the same picture
    pictures = [np.asarray(Image.open(paths["thumbnail.png"])).astype(int) for paths in (early, late)]
    assert np.abs(pictures[0] - pictures[1]).mean() < 0.5


def test_previews_are_drawn_early_on_a_gpu_that_has_memory_for_them(monkeypatch):
    mesh, moved = textured_ball(), []
    monkeypatch.setattr(preview, "previews", lambda m: {"thumbnail.png": b"png"})
    monkeypatch.setattr(TexturedMesh, "to", lambda self, device: moved.append(str(device)))
    assert preview.early_previews(mesh, torch.device("cpu")) == {}
    assert preview.early_previews(mesh, torch.device("cuda")) == {"thumbnail.png": b"png"}
    assert moved == ["cuda"]

    def full(m):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(preview, "previews", full)
    assert preview.early_previews(mesh, torch.device("cuda")) == {}


def test_files_are_y_up_in_the_inputs_scale_and_world_from_mesh_leads_back():
    result = result_of()
    assert torch.allclose(result.world_from_mesh @ result.mesh_from_scene, similarity())
    turn = result.world_from_mesh[:3, :3]
    assert torch.allclose(turn @ turn.T, torch.eye(3, dtype=torch.float64))
    v, scene = result.output.mesh.vertices, result.mesh.mesh.vertices
    assert torch.allclose(v[:, 1] - v[:, 1].mean(), 3 * (scene[:, 1] - scene[:, 1].mean()), atol=1e-5)
    assert torch.equal(replace(result, world_from_scene=torch.eye(4).double()).world_from_mesh, torch.eye(4).double())


def test_a_worse_mesh_measures_worse():
    mesh = textured_ball()
    views = views_of(mesh)
    good = measure(mesh, views)
    small = measure(mesh.transformed(torch.diag(torch.tensor([0.8, 0.8, 0.8, 1]))), views)
    assert good is not None
    assert small is not None
    assert small.psnr_db < good.psnr_db - 5
    assert small.ssim < good.ssim
    assert small.mask_iou == pytest.approx(0.64, abs=0.05)
    assert measure(mesh, replace(views, cameras=None)) is None
    unmasked = measure(mesh, replace(views, mask_source="none"))
    assert unmasked is not None
    assert unmasked.mask_iou is None

    half = blanked(views, views.width // 2)  # photos that end in the middle of the object
    unknown, empty = measure(mesh, half), measure(mesh, replace(half, known=None))
    assert unknown is not None
    assert empty is not None
    assert unknown.psnr_db >= good.psnr_db > empty.psnr_db + 5
    assert unknown.mask_iou == pytest.approx(good.mask_iou, abs=0.02)


def test_unknown_formats_and_unsound_meshes_are_refused(tmp_path):
    with pytest.raises(OptionError, match="fbx"):
        export(result_of(), tmp_path, ("fbx",))
    mesh = textured_ball()
    with pytest.raises(InvalidMesh):
        export(result_of(replace(mesh, uvs=mesh.uvs + 1)), tmp_path)
    splats = Gaussians(*(torch.rand(3, n) for n in (3, 3, 3, 4)), torch.tensor([0.5, torch.nan, 0.5]))
    with pytest.raises(InvalidMesh, match=r"gaussians\.ply"):
        export(result_of(gaussians=splats), tmp_path, (GAUSSIAN_PLY,))
    assert list(tmp_path.iterdir()) == []


def test_a_second_export_that_stops_leaves_no_report_of_the_first(tmp_path):
    def stop(stage, step, steps, **_):
        if step == 2:
            raise Cancelled("enough")

    export(result_of(), tmp_path, ("stl",), pictures=False)
    with pytest.raises(InvalidMesh):  # nothing of it was written: the first one is whole
        export(result_of(replace(textured_ball(), uvs=textured_ball().uvs + 1)), tmp_path)
    assert (tmp_path / "report.json").exists()
    with pytest.raises(Cancelled):
        export(result_of(), tmp_path, ("stl", "ply"), pictures=False, progress=stop)
    assert not (tmp_path / "report.json").exists()


def test_an_export_leaves_no_file_of_the_one_before(tmp_path):
    lit = replace(textured_ball(), environment=torch.ones(8, 16, 3))
    export(result_of(lit), tmp_path, ("obj", "stl", "glb"), pictures=False)
    (tmp_path / "notes.txt").write_text("mine")
    again = load_reconstruction(tmp_path / STORED)
    written = export(replace(again, mesh=replace(again.mesh, environment=None)), tmp_path, ("glb",), pictures=False)
    assert set(written) == {"mesh.glb", STORED, "report.json"}
    assert {p.name for p in tmp_path.iterdir()} == {*written, "notes.txt"}
    assert torch.equal(load_reconstruction(tmp_path / STORED).mesh.mesh.vertices, again.mesh.mesh.vertices)


def test_the_stored_result_stays_until_another_takes_its_place(tmp_path):
    def stop(stage, step, steps, **_):
        if step == 2:
            raise Cancelled("enough")

    export(result_of(), tmp_path, ("stl",), pictures=False)
    with pytest.raises(Cancelled):
        export(load_reconstruction(tmp_path / STORED), tmp_path, ("ply", "glb"), pictures=False, progress=stop)
    assert {p.name for p in tmp_path.iterdir()} == {"mesh.ply", STORED}
    assert load_reconstruction(tmp_path / STORED).preset == result_of().preset


ELSEWHERE = ["../outside.txt", "inner/file.txt", "inner", "link", "..", ".", "", "/etc/x", "a\0b", "\ud800", "x" * 9999]
REPORTS = {
    "names elsewhere": json.dumps({"files": ELSEWHERE}),
    "no names": json.dumps({"files": [None, 7, ["m"], {"m": 1}]}),
    "no list": json.dumps({"files": None}),
    "text": json.dumps({"files": "m"}),
    "an object": json.dumps({"files": {"m": 1}}),
    "no object": "[]",
    "not JSON": "{",
    "not UTF-8": b"\xff\xfe\xfa",
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("case", REPORTS)
def test_a_report_that_lies_or_is_damaged_takes_no_file_away(tmp_path, case):
    folder = tmp_path / "out"
    (folder / "inner").mkdir(parents=True)
    kept = [tmp_path / "outside.txt", folder / "inner" / "file.txt", folder / "m"]
    for path in kept:
        path.write_text("kept")
    given = REPORTS[case]
    (folder / "report.json").write_bytes(given if isinstance(given, bytes) else given.encode())
    (folder / "link").symlink_to(tmp_path / "outside.txt")
    export(result_of(), folder, ("stl",), pictures=False)
    assert [path.read_text() for path in kept] == ["kept"] * 3
    Report.model_validate_json((folder / "report.json").read_text())


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    target = tmp_path / "mesh.glb"
    write_whole(target, b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files_module.os, "fsync", full)
    with pytest.raises(WriteError, match="disk is full"):
        write_whole(target, b"new")
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["mesh.glb"]


def test_a_stored_result_is_the_same_result(tmp_path):
    def stored(result):
        return load_reconstruction(write_whole(tmp_path / STORED, reconstruction_bytes(result)))

    result = result_of(device="cpu", weights_revision="abc", refinement={"kept": False, "reason": "worse"})
    again = stored(result)
    assert torch.equal(again.mesh.mesh.vertices, result.mesh.mesh.vertices)
    assert torch.equal(again.mesh.uv_faces, result.mesh.uv_faces)
    assert torch.equal(again.mesh.environment, result.mesh.environment)
    assert torch.equal(again.world_from_scene, result.world_from_scene)
    assert torch.allclose(again.mesh.material.orm, result.mesh.material.orm, atol=0.002)
    assert replace(again, mesh=result.mesh, world_from_scene=result.world_from_scene) == replace(result, views=None)
    assert torch.equal(stored(again).mesh.material.base_color, again.mesh.material.base_color)


def test_every_fact_of_a_result_is_stored():
    others = {"mesh", "views", "world_from_scene", "gaussians", "previews"}  # tensors and pictures
    assert {field.name for field in fields(Reconstruction)} == {*FACTS} | others


@pytest.mark.parametrize("data", [b"", b"x" * 100, b"\x02\0\0\0\0\0\0\0{}"])
def test_other_files_are_not_stored_results(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"x\.safetensors"):
        load_reconstruction(path)


GREY = torch.from_numpy(cv2.imencode(".png", np.zeros((8, 8), np.uint8))[1].ravel())
DAMAGED = {
    "an empty picture": ("base_color", lambda _: torch.zeros(0, dtype=torch.uint8)),
    "a broken picture": ("orm", lambda data: data[:50].clone()),
    "a grey picture": ("normal", lambda _: GREY),
    "UVs outside": ("uvs", lambda uvs: uvs + 5),
    "UVs of three": ("uvs", lambda uvs: uvs[:, :1].repeat(1, 3)),
    "faces of floats": ("faces", lambda faces: faces.float()),
    "faces of four": ("faces", lambda faces: faces[:, [0, 1, 2, 0]]),
    "UV faces of floats": ("uv_faces", lambda faces: faces.float()),
    "flat vertices": ("vertices", lambda vertices: vertices[:, :2].clone()),
    "no scale": ("world_from_scene", lambda m: m * torch.nan),
    "a grey environment": ("environment", lambda image: image[..., 0].clone()),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_results_are_refused_by_name(tmp_path, damage):
    name, change = DAMAGED[damage]
    data = reconstruction_bytes(result_of(textured_ball(8)))
    tensors, path = load(data), tmp_path / "x.safetensors"
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    path.write_bytes(save(tensors, header))
    load_reconstruction(path)
    path.write_bytes(save({**tensors, name: change(tensors[name])}, header))
    with pytest.raises(InputError, match=r"x\.safetensors"):
        load_reconstruction(path)


def test_a_result_stored_in_another_form_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(
        reconstruction_bytes(result_of()).replace(b"viewmesh-reconstruction-1", b"viewmesh-reconstruction-9")
    )
    with pytest.raises(InputError, match=f"reconstruction-9, this version reads {FORMAT}"):
        load_reconstruction(path)


def test_reexport_keeps_shape_and_looks():
    result = result_of(textured_ball(128))
    few = reexport(result, target_faces=200, texture_size=256)
    assert len(few.mesh.mesh.faces) <= 200
    assert few.mesh.material.base_color.shape == (256, 256, 3)
    assert is_watertight(few.mesh.mesh)
    assert chamfer(few.mesh.mesh, result.mesh.mesh, 4000) < 0.01
    cameras = canonical6(64, 64)
    a, b = (draw(r.mesh, cameras, result.mesh.environment) for r in (few, result))
    both = (a[..., 3:] > 0.99) & (b[..., 3:] > 0.99)
    assert psnr(a[..., :3] * both, b[..., :3] * both) > 28
    assert reexport(result) is result


def test_a_result_is_drawn_again_from_the_inputs_cameras(tmp_path):
    mesh = replace(textured_ball(), environment=latlong_directions(8) + 1)  # another light from every side
    result = result_of(mesh)
    export(result, tmp_path / "out", ("glb",), pictures=False)
    cameras = canonical6(48, 48)
    world = cameras.moved(similarity())
    frames = [
        {"file_path": f"views/view_{i:02d}.png", "transform_matrix": m.tolist()}
        for i, m in enumerate(world.world_from_camera)
    ]
    fl = float(cameras.fx[0])
    (tmp_path / "transforms.json").write_text(json.dumps({"w": 48, "h": 48, "fl_x": fl, "fl_y": fl, "frames": frames}))
    assert rerender(tmp_path / "out", tmp_path / "transforms.json", tmp_path / "again") == 6
    direct, depth = draw(mesh, cameras, mesh.environment), draw_depth(mesh.mesh, cameras)
    image = np.asarray(Image.open(tmp_path / "again" / "view_003.png")).astype(int)
    assert np.abs(image - straight_uint8(direct[3]))[image[..., 3] == 255].mean() < 2
    lit = {"environment": tmp_path / "out" / "environment.hdr"}
    rerender(tmp_path / "out", tmp_path / "transforms.json", tmp_path / "lit", **lit)
    assert np.abs(np.asarray(Image.open(tmp_path / "lit" / "view_003.png")).astype(int) - image).mean() < 0.5
    unit = json.loads((tmp_path / "again" / "depth.json").read_text())["depth_unit_scale"]
    read = cv2.imread(str(tmp_path / "again" / "depth_003.png"), cv2.IMREAD_UNCHANGED) * unit
    assert np.abs(read - 3 * depth[3].numpy()).max() < 0.05
    with pytest.raises(InputError, match=STORED):
        rerender(tmp_path, tmp_path / "transforms.json", tmp_path / "no")
