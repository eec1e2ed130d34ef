"""`refine` from files to files, on a network of random weights: it makes nothing like the views."""

import json
from dataclasses import replace

import numpy as np
import pytest
import synthetic_views as synthetic
import torch
import trimesh
from known_crops import lost, seeing, sfm_finding
from tiny_command import shrink, tiny_preset

from serve_app.models import MODELS
from viewmesh import reconstruct as module
from viewmesh import refine
from viewmesh.errors import Cancelled, InputError
from viewmesh.generate import Made, load_made, save_made
from viewmesh.geometry.camera import Cameras
from viewmesh.geometry.gaussians import Gaussians
from viewmesh.geometry.mesh import Mesh
from viewmesh.nvdiffrec import fit, register
from viewmesh.nvdiffrec.register import Plan
from viewmesh.options import Options
from viewmesh.reconstruct import reconstruct
from viewmesh.trellis import checkpoint
from viewmesh.trellis.preprocess import reconviagen_image
from viewmesh.trellis.reconviagen import ReconViaGen
from viewmesh.trellis.tiny import write_tiny_reconviagen, write_tiny_trellis
from viewmesh.trellis.view_cameras import in_views
from viewmesh.views.load import load_views

WISHES = Options(
    model="trellis", refine=True, steps=1, target_faces=300, texture_size=256, formats=("glb", "gaussian_ply")
)  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_tiny_trellis(tmp_path_factory.mktemp("tiny-trellis"))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink(monkeypatch.setattr)
    monkeypatch.setattr(refine, "PLAN", Plan(rotations=64, candidates=2, coarse_steps=1, finalists=1, fine_size=48))


def report_of(tmp_path, weights) -> dict:
    files = reconstruct(tmp_path, tmp_path / "out", WISHES, device="cpu", weights={"trellis": weights})
    assert "gaussians.ply" in files
    return json.loads(files["report.json"].read_text())


def test_a_generated_mesh_among_posed_views(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(register, "ENOUGH_IOU", 0.0)
    synthetic.write_views(tmp_path, synthetic.around(6), size=(64, 64), f=96.0, depth=True)
    report = report_of(tmp_path, weights)
    found = report["refinement"]
    assert found["registration"]["scale"] > 0
    assert found["registration"]["depth_error"] is not None
    better = all(found["after"][name] >= found["before"][name] - 1e-3 for name in ("psnr_db", "mask_iou"))
    assert found["kept"] == better
    assert bool(found["reason"]) != found["kept"]
    assert report["quality"]["views"] == 6
    assert "refine" in report["seconds"]


def test_a_mesh_that_agrees_with_nothing_is_handed_out_as_it_came(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(register, "ENOUGH_IOU", 1.1)
    synthetic.write_views(tmp_path, synthetic.around(6), size=(64, 64), f=96.0)
    report = report_of(tmp_path, weights)
    assert not report["refinement"]["kept"]
    assert report["refinement"]["registration"] is not None
    assert report["quality"] is None  # it is not among the cameras
    assert any("silhouettes" in warning for warning in report["warnings"])


def test_views_that_cannot_be_posed_are_a_warning(weights, tmp_path):
    synthetic.write_views(tmp_path, synthetic.around(2), size=(64, 64), f=96.0, cameras=None)
    report = report_of(tmp_path, weights)
    assert "no cameras" in report["refinement"]["reason"]
    assert any("Structure from motion" in warning for warning in report["warnings"])


def test_only_cameras_of_the_callers_own_are_worth_an_error(tmp_path, monkeypatch):
    synthetic.write_views(tmp_path, synthetic.around(2), size=(64, 64), f=96.0, cameras=None)

    def contradicted(source, rules, **asked):
        if rules.cameras != "none":
            raise InputError("The masks contradict each other.")
        return load_views(source, rules, **asked)

    monkeypatch.setattr(refine, "load_views", contradicted)
    views = refine.read_views(tmp_path, WISHES)  # structure from motion's
    assert views.cameras is None
    assert views.warnings[-1] == "The masks contradict each other."
    synthetic.write_views(tmp_path / "posed", synthetic.around(2), size=(64, 64), f=96.0)
    with pytest.raises(InputError, match="contradict"):
        refine.read_views(tmp_path / "posed", WISHES)


@pytest.mark.parametrize("model", ["nvdiffrec", "trellis", "reconviagen"])
def test_options_that_the_model_knows_nothing_of_are_named(model, tmp_path):
    synthetic.write_views(tmp_path, synthetic.around(2), size=(64, 64), f=96.0)
    asked = {"refine": True, "steps": 5, "cfg": 1.0, "multiimage_mode": "multidiffusion"}
    unknown = asked.keys() - MODELS[model].fields
    warnings = refine.read_views(tmp_path, Options.model_validate({"model": model, **asked})).warnings
    assert {name for name in asked if any(f"option {name} " in warning for warning in warnings)} == unknown
    assert bool(unknown) == (model != "trellis")
    assert not any("option" in warning for warning in refine.read_views(tmp_path, Options(model=model)).warnings)


def test_reconviagen_poses_the_views_itself(tmp_path, monkeypatch):
    """VGGT of random weights would see nothing, see tests/serve_app/test_generative.py."""
    weights, poses = write_tiny_reconviagen(tmp_path / "weights"), synthetic.around(6)
    monkeypatch.setattr(register, "ENOUGH_IOU", 0.0)
    monkeypatch.setattr(ReconViaGen, "cameras", seeing(poses, 96.0))
    synthetic.write_views(tmp_path, poses, size=(64, 64), f=96.0, cameras=None)
    places = {"reconviagen": weights, "vggt-object": weights / "vggt"}
    wishes = WISHES.model_copy(update={"model": "reconviagen", "formats": ("glb",)})
    files = reconstruct(tmp_path, tmp_path / "out", wishes, device="cpu", weights=places)
    report = json.loads(files["report.json"].read_text())
    assert report["refinement"]["after"] is not None
    assert report["quality"]["views"] == 6
    assert not any("VGGT" in warning for warning in report["warnings"])


@pytest.fixture
def reconviagen(tmp_path, monkeypatch):
    """Asked for a report: six views without cameras; VGGT's weights are random."""
    weights = write_tiny_reconviagen(tmp_path / "weights")
    monkeypatch.setattr(register, "ENOUGH_IOU", 0.0)
    synthetic.write_views(tmp_path / "photos", synthetic.around(6), size=(64, 64), f=96.0, cameras=None)
    synthetic.write_views(tmp_path / "posed", synthetic.around(6), size=(64, 64), f=96.0)
    wishes = WISHES.model_copy(update={"model": "reconviagen", "formats": ("glb",)})

    def report(**given) -> dict:
        places = {"reconviagen": weights, "vggt-object": weights / "vggt"}
        files = reconstruct(tmp_path / "photos", tmp_path / "out", wishes, device="cpu", weights=places, **given)
        return json.loads(files["report.json"].read_text())

    return report


@pytest.mark.parametrize("trouble", ["nonsense", "no place", "no memory"])
def test_where_vggts_cameras_do_not_do_structure_from_motion_looks_for_others(
    reconviagen, tmp_path, monkeypatch, trouble
):
    monkeypatch.setattr(refine, "load_views", sfm_finding(tmp_path / "posed"))
    if trouble == "no place":
        monkeypatch.setattr(ReconViaGen, "cameras", seeing(synthetic.around(6), 96.0))
        whole = refine.register

        def registered(mesh, views, *given, **more):
            found = whole(mesh, views, *given, **more)
            return replace(found, silhouette_iou=-1.0) if views.camera_source == "vggt" else found

        monkeypatch.setattr(refine, "register", registered)
    if trouble == "no memory":
        monkeypatch.setattr(checkpoint, "free_bytes", short_of_memory_for("VGGT's cameras", monkeypatch))
    report = reconviagen()
    found = report["refinement"]
    assert found["cameras"] == "sfm"
    assert {"psnr_db", "mask_iou"} <= found["before"].keys() & found["after"].keys()
    assert found["kept"] == (not found["reason"])
    assert refine.SFM_INSTEAD in report["warnings"]
    assert report["quality"]["views"] == 6


def short_of_memory_for(what: str, monkeypatch):
    """checkpoint.free_bytes on a device that is full whenever `what` is asked for."""
    whole, asked = checkpoint.require_memory, []

    def require(name, needed, device):
        asked.append(name)
        whole(name, needed, device)

    monkeypatch.setattr(checkpoint, "require_memory", require)
    return lambda device: 1 << (20 if asked and asked[-1].startswith(what) else 50)


def test_where_structure_from_motion_does_not_help_either_the_mesh_is_handed_out_as_it_came(reconviagen):
    report = reconviagen()  # 64 pixels a side are too few for it
    assert not report["refinement"]["kept"]
    assert report["refinement"]["cameras"] is None
    assert report["quality"] is None
    said = " ".join(report["warnings"])
    assert refine.NO_VGGT_CAMERAS in said
    assert "Nor did structure from motion help: " in said


@pytest.mark.slow
def test_among_the_cameras_that_structure_from_motion_finds_the_mesh_has_its_place(tmp_path):
    synthetic.write_views(tmp_path, synthetic.ring(20), size=(320, 320), f=480.0, cameras=None)
    views = refine.posed_by_sfm(tmp_path, WISHES.model_copy(update={"model": "reconviagen"}))
    assert views.camera_source == "sfm"
    assert len(views) >= 16
    assert views.warnings[-1] == refine.SFM_INSTEAD
    ball = trimesh.creation.icosphere(4, synthetic.BALL_RADIUS).apply_translation(synthetic.BALL_CENTER)
    box = trimesh.creation.box(bounds=np.stack([synthetic.BOX_LOW, synthetic.BOX_HIGH]))
    both = trimesh.util.concatenate([ball, box.subdivide_to_size(0.05)])
    colors = torch.from_numpy(synthetic.texture(np.asarray(both.vertices)) / 255).float() ** 2.2
    mesh = Mesh(torch.tensor(both.vertices).float(), torch.tensor(both.faces).long(), colors)
    assert refine.register(mesh, views, torch.Generator().manual_seed(0)).silhouette_iou > 0.97


def test_a_refinement_that_was_stopped_goes_on_from_what_was_generated(reconviagen, tmp_path, monkeypatch):
    monkeypatch.setattr(ReconViaGen, "cameras", seeing(synthetic.around(6), 96.0))
    whole = reconviagen()
    step, told = fit.texture_step, []

    def slow(*args, **given):
        told.append(1)
        return step(*args, **given)

    monkeypatch.setattr(fit, "texture_step", slow)
    with pytest.raises(Cancelled):
        reconviagen(cancelled=lambda: len(told) >= 3)
    kept = {file.name for file in (tmp_path / "out" / ".resume").iterdir()}
    assert {"generated.safetensors", "posed.safetensors", "fit.safetensors"} <= kept
    monkeypatch.setattr(module, "load_model", lambda *given: pytest.fail("the model runs again"))
    again = reconviagen(resume=True)
    assert again["refinement"] == whole["refinement"]
    assert again["bounds"] == whole["bounds"]
    assert set(again["seconds"]) > {"refine", "generate.structure"}
    assert not (tmp_path / "out" / ".resume").exists()


def test_what_was_generated_is_kept_as_it_was(tmp_path):
    gaussians = Gaussians(*(torch.rand(3, n) for n in (3, 3, 3, 4)), torch.rand(3))
    ball = synthetic.textured_ball()
    ball = replace(ball, uvs=ball.mesh.vertices[:, :2].abs(), uv_faces=ball.mesh.faces)  # two names of one tensor
    made = Made(ball, gaussians, {"structure": 1.5}, ("a warning",))
    save_made(made, tmp_path / "made")
    found = load_made(tmp_path / "made")
    assert torch.equal(found.mesh.mesh.vertices, made.mesh.mesh.vertices)
    assert torch.equal(found.mesh.uv_faces, made.mesh.mesh.faces)
    assert torch.equal(found.mesh.material.base_color, made.mesh.material.base_color)
    assert found.gaussians is not None
    assert torch.equal(found.gaussians.rotations, gaussians.rotations)
    assert (found.seconds, found.warnings) == (made.seconds, made.warnings)


def without_cameras(count: int = 6):
    """Views, and a model that knows their cameras."""
    posed = synthetic.viewset(synthetic.around(count))
    return replace(posed, cameras=None, camera_source=None), object.__new__(ReconViaGen)


def test_cameras_that_vggt_sees_become_the_scenes(monkeypatch):
    views, model = without_cameras(40)
    truth = synthetic.viewset(synthetic.around(40)).cameras
    assert truth is not None
    picked = torch.linspace(0, 39, 32).round().long().tolist()
    focal = float(truth.fx[0])
    monkeypatch.setattr(ReconViaGen, "cameras", seeing(synthetic.around(40)[picked], focal))
    posed = refine.with_cameras(model, views)
    assert posed.cameras is not None
    assert (len(posed), posed.camera_source) == (32, "vggt")
    assert posed.names[1] == views.names[picked[1]]
    torch.testing.assert_close(posed.cameras.fx, truth.fx[picked])
    torch.testing.assert_close(posed.cameras.cx, truth.cx[picked])
    centers = posed.cameras.centers
    ours, theirs = ((c - c.roll(1, 0)).norm(dim=-1) for c in (centers, truth.centers[picked]))
    torch.testing.assert_close(ours / theirs, (ours / theirs).mean().expand(32))  # the same but for scale and place
    assert float((centers.norm(dim=-1) * focal / truth.width).std()) < 1  # around the origin


@pytest.mark.parametrize("harm", ["not a number", "at one place", "looking away", "an empty mask"])
def test_cameras_that_vggt_gets_wrong_are_a_warning(harm, monkeypatch):
    views, model = without_cameras()
    right = seeing(synthetic.around(6), 96.0)

    def wrong(model, images):
        cameras = right(model, images)
        poses = cameras.world_from_camera.clone()
        if harm == "at one place":
            poses[:, :3, 3] = 0
        if harm == "looking away":
            poses[:, :3, [0, 2]] *= -1
        return lost(cameras) if harm == "not a number" else replace(cameras, world_from_camera=poses)

    monkeypatch.setattr(ReconViaGen, "cameras", wrong)
    if harm == "an empty mask":
        images = views.images.clone()
        images[0, ..., 3] = 0
        views = replace(views, images=images)
    found = refine.with_cameras(model, views)
    assert found.cameras is None
    assert found.warnings[-1] == refine.NO_VGGT_CAMERAS


@pytest.mark.parametrize("harm", ["not a number", "at one place", "empty masks", "full masks"])
def test_views_that_say_nothing_about_the_place_leave_the_mesh_as_it_is(harm):
    views = synthetic.viewset(synthetic.around(4))
    assert views.cameras is not None
    poses, images = views.cameras.world_from_camera.clone(), views.images.clone()
    if harm == "at one place":
        poses[:, :3, 3] = 0
    if harm.endswith("masks"):
        images[..., 3] = 0 if harm == "empty masks" else 255
    cameras = replace(views.cameras, world_from_camera=poses)
    views = replace(views, cameras=lost(cameras) if harm == "not a number" else cameras, images=images)
    mesh = synthetic.textured_ball()
    state = refine.start(mesh, views, WISHES, tiny_preset("preview", "cpu"))
    assert state.done
    found = refine.finish(state, views)
    assert found.mesh is mesh
    assert found.views.cameras is None
    assert not found.facts["kept"]
    assert json.loads(json.dumps(found.facts, allow_nan=False)) == found.facts


def test_cameras_of_crops_are_cameras_of_the_views():
    """A pixel of the crop and the pixel of the view that it was cut from look the same way."""
    from PIL import Image

    views = synthetic.viewset(synthetic.around(3))
    assert views.cameras is not None
    size = 40
    images = views.images.clone()
    focal, centre = (torch.full((3,), v, dtype=torch.float64) for v in (70.0, size / 2))
    crops = Cameras(views.cameras.world_from_camera, focal, focal.clone(), centre, centre.clone(), size, size)
    there = in_views(crops, images)
    ramp = torch.arange(64).float() * 4
    for i in range(3):
        images[i, ..., 0], images[i, ..., 1] = ramp[None].to(torch.uint8), ramp[:, None].to(torch.uint8)
        crop = torch.from_numpy(np.array(reconviagen_image(Image.fromarray(images[i].numpy()), size=size)))
        inside = (crop[..., 3] == 255).nonzero()
        row, column = inside[len(inside) // 2].tolist()
        x, y = (float(crop[row, column, c]) / 4 + 0.5 for c in (0, 1))  # where in the view the colour says it came from
        ours = [(column + 0.5 - size / 2) / 70, (row + 0.5 - size / 2) / 70]
        theirs = [(x - float(there.cx[i])) / float(there.fx[i]), (y - float(there.cy[i])) / float(there.fy[i])]
        assert ours == pytest.approx(theirs, abs=0.01)
