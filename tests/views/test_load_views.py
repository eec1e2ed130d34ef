"""load_views: every form of a good view set comes to the same posed, masked, normalised views."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import synthetic_views as synthetic
import torch
from PIL import Image

from viewmesh.errors import Cancelled, InputError
from viewmesh.geometry.camera import canonical6
from viewmesh.options import ViewRules
from viewmesh.views.find import matched
from viewmesh.views.limits import Limits
from viewmesh.views.load import load_views, plan_views
from viewmesh.views.viewset import ViewSet

AUTO = ViewRules()


def object_in_scene(views: ViewSet) -> torch.Tensor:
    m = torch.linalg.inv(views.world_from_scene)
    return synthetic.surface_points() @ m[:3, :3].T + m[:3, 3]


def assert_consistent(views: ViewSet, poses: np.ndarray) -> None:
    """The laws of a loaded view set: the object fills the unit cube, and the cameras went nowhere in the world."""
    points = object_in_scene(views)
    assert points.abs().max() < 0.5
    assert 0.8 < float((points.amax(0) - points.amin(0)).max()) < 0.92
    assert views.cameras is not None
    back = views.cameras.moved(views.world_from_scene)
    torch.testing.assert_close(back.world_from_camera, torch.from_numpy(poses), atol=1e-9, rtol=0)
    pixels, _ = views.cameras.project(points)
    assert pixels.shape[:2] == (len(views), len(points))
    c, r = pixels.floor().long().unbind(-1)
    inside = (c >= 0) & (r >= 0) & (c < views.width) & (r < views.height)
    n = torch.arange(len(views))[:, None].expand_as(c)
    alpha = views.images[n[inside], r[inside], c[inside], 3]
    if views.known is not None:
        alpha = alpha[views.known[n[inside], r[inside], c[inside]]]
    assert (alpha > 127).float().mean() > 0.9  # of a surface seen against its own silhouette


@pytest.fixture
def poses() -> np.ndarray:
    return synthetic.around(8)


def test_folder_with_everything(tmp_path, poses):
    synthetic.write_views(tmp_path, poses, masks=True, depth=True, alpha=False)
    views = load_views(tmp_path, AUTO)
    assert views.names[0] == "views/view_00.png"
    assert (views.camera_source, views.mask_source, views.warnings) == ("file", "masks", ())
    assert views.images.dtype == torch.uint8
    assert views.images.shape == (8, 48, 64, 4)
    assert_consistent(views, poses)


def test_depth_lands_on_the_surface(tmp_path, poses):
    synthetic.write_views(tmp_path, poses, depth=True)
    views = load_views(tmp_path, AUTO)
    assert views.cameras is not None
    assert views.depths is not None
    world = views.world_from_scene.float()
    points = views.cameras.unproject(views.depths)[views.depths > 0] @ world[:3, :3].T + world[:3, 3]
    to_ball = ((points - torch.from_numpy(synthetic.BALL_CENTER).float()).norm(dim=-1) - synthetic.BALL_RADIUS).abs()
    low, high = (torch.from_numpy(v).float() for v in (synthetic.BOX_LOW, synthetic.BOX_HIGH))
    to_box = (torch.maximum(torch.maximum(low - points, points - high), torch.zeros(()))).norm(dim=-1)
    assert torch.minimum(to_ball, to_box).max() < 2e-3


def test_depth_along_the_ray_is_converted_when_declared(tmp_path, poses):
    synthetic.write_views(tmp_path / "z", poses, depth=True)
    synthetic.write_views(tmp_path / "ray", poses, depth=True, depth_kind="ray")
    for i, pose in enumerate(poses):
        _, z = synthetic.render(pose, 80.0, 64, 48)
        length = z * np.linalg.norm(synthetic.rays(pose, 80.0, 64, 48)[1], axis=-1)
        cv2.imwrite(str(tmp_path / f"ray/depth/depth_{i:02d}.png"), (length / synthetic.UNIT).round().astype(np.uint16))
    a, b = load_views(tmp_path / "z", AUTO), load_views(tmp_path / "ray", AUTO)
    assert a.depths is not None
    torch.testing.assert_close(a.depths, b.depths, atol=4e-4, rtol=0)


def test_nerf_synthetic_uses_only_the_train_split(tmp_path, poses):
    (tmp_path / "train").mkdir()
    frames = []
    for i, pose in enumerate(poses):
        Image.fromarray(synthetic.render(pose, 80.0, 64, 48)[0]).save(tmp_path / f"train/r_{i}.png")
        frames.append({"file_path": f"./train/r_{i}", "rotation": 0.1, "transform_matrix": pose.tolist()})
    angle = 2 * np.arctan(32 / 80.0)
    (tmp_path / "transforms_train.json").write_text(json.dumps({"camera_angle_x": angle, "frames": frames}))
    (tmp_path / "transforms_test.json").write_text("not even JSON")
    views = load_views(tmp_path, AUTO)
    assert views.mask_source == "alpha"
    assert_consistent(views, poses)


def test_z_up_worlds_come_out_y_up(tmp_path):
    poses = synthetic.ring(8)
    turn = np.array([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])  # z up from y up
    synthetic.write_views(tmp_path, poses)
    top = json.loads((tmp_path / "cameras.json").read_text())
    for frame, pose in zip(top["frames"], turn @ poses, strict=True):
        frame["transform_matrix"] = pose.tolist()
    (tmp_path / "cameras.json").write_text(json.dumps(top))
    views = load_views(tmp_path, AUTO)
    assert views.cameras is not None
    assert (views.cameras.centers[:, 1] > 0.4).all()
    torch.testing.assert_close(
        views.cameras.moved(views.world_from_scene).world_from_camera, torch.from_numpy(turn @ poses)
    )
    y_up = load_views(tmp_path, ViewRules(up="+y"))
    assert y_up.cameras is not None
    assert (y_up.cameras.centers[:, 2] > 0.4).all()


def test_a_world_whose_origin_is_far_is_read_while_float32_holds_the_object(tmp_path, poses):
    far = poses.copy()
    far[:, :3, 3] += 1.2e4 * np.array([0.6, 0, -0.8])
    for name, placed in (("near", poses), ("far", far)):
        top = synthetic.write_views(tmp_path / name, poses)
        for frame, pose in zip(top["frames"], placed, strict=True):
            frame["transform_matrix"] = pose.tolist()
        (tmp_path / name / "cameras.json").write_text(json.dumps(top))
    a, b = (load_views(tmp_path / name, AUTO) for name in ("near", "far"))
    assert a.cameras is not None
    assert b.cameras is not None
    torch.testing.assert_close(b.cameras.world_from_camera, a.cameras.world_from_camera, atol=1e-6, rtol=0)


@pytest.mark.parametrize("model", ["OPENCV", "OPENCV_FISHEYE"])
def test_distortion_is_undone(tmp_path, poses, model):
    from viewmesh.views.lens import Lens, distorted_pixels

    k = (-0.18, 0.05, 0.0, 0.0)
    fields = {"camera_model": model, "k1": k[0], "k2": k[1]}
    synthetic.write_views(tmp_path, poses, size=(96, 72), f=110.0, **fields)
    kind = "fisheye" if model == "OPENCV_FISHEYE" else "opencv"
    big = Lens(220.0, 220.0, 96.0, 72.0, 192, 144, kind, k)
    for i, pose in enumerate(poses):  # the distorted photo, found by searching for each pixel's ray
        clean = synthetic.render(pose, 220.0, 192, 144)[0]
        u, v = distorted_pixels(big)
        photo = np.zeros((72, 96, 4), np.uint8)
        c, r = (u / 2).astype(int), (v / 2).astype(int)
        keep = (c >= 0) & (c < 96) & (r >= 0) & (r < 72)
        photo[r[keep], c[keep]] = clean[keep]
        Image.fromarray(photo).save(tmp_path / f"views/view_{i:02d}.png")
    views = load_views(tmp_path, AUTO)
    for i, pose in enumerate(poses):
        truth = synthetic.render(pose, 110.0, 96, 72)[0][..., 3] > 127
        mask = views.images[i, ..., 3].numpy() > 127
        assert (truth & mask).sum() / (truth | mask).sum() > 0.93


def test_nerfstudio_fields(tmp_path, poses):
    top = synthetic.write_views(tmp_path, poses, masks=True, depth=True, alpha=False, cameras=None)
    per_frame = {k: top.pop(k) for k in ("w", "h", "fl_x", "fl_y", "cx", "cy")}
    top.pop("depth_unit_scale")
    for i, frame in enumerate(top["frames"]):
        frame |= per_frame | {"mask_path": f"masks/mask_{i:02d}.png", "depth_file_path": f"depth/depth_{i:02d}.png"}
    top |= {"camera_model": "OPENCV", "integer_depth_scale": synthetic.UNIT, "train_filenames": [
        f["file_path"] for f in top["frames"][:6]], "applied_transform": np.eye(4)[:3].tolist()}  # fmt: skip
    (tmp_path / "transforms.json").write_text(json.dumps(top))
    for extra in ("masks/mask_99.png", "depth/depth_99.png"):  # not named by any frame
        (tmp_path / extra).write_bytes(b"")
    views = load_views(tmp_path, AUTO)
    assert len(views) == 6
    assert views.mask_source == "masks"
    assert views.depths is not None
    assert_consistent(views, poses[:6])


def test_canonical_rig(tmp_path):
    rig = canonical6(48, 48)
    f = float(rig.fx[0])
    synthetic.write_views(tmp_path, rig.world_from_camera.numpy(), size=(48, 48), f=f, cameras=None)
    for rules in (ViewRules(rig="canonical6"), ViewRules(cameras="canonical6")):
        views = load_views(tmp_path, rules)
        assert views.camera_source == "canonical6"
        assert_consistent(views, rig.world_from_camera.numpy())


def test_zip_of_a_folder_with_operating_system_debris(tmp_path, poses):
    synthetic.write_views(tmp_path / "set", poses)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in sorted((tmp_path / "set").rglob("*")):
            archive.write(path, f"my object/{path.relative_to(tmp_path / 'set')}")
        archive.writestr("__MACOSX/my object/views/._view_00.png", b"x")
        archive.writestr("my object/.DS_Store", b"x")
        archive.writestr("my object/views/Thumbs.db", b"x")
        archive.writestr("my object/README.txt", b"x")
    a, b = load_views(tmp_path / "set.zip", AUTO, workdir=tmp_path / "work"), load_views(tmp_path / "set", AUTO)
    assert a.names == b.names
    torch.testing.assert_close(a.images, b.images)
    torch.testing.assert_close(a.world_from_scene, b.world_from_scene)
    assert list((tmp_path / "work").iterdir()) == []


def test_sizes_are_brought_together_with_their_intrinsics(tmp_path, poses):
    top = synthetic.write_views(tmp_path, poses)
    for i, (width, height) in {0: (128, 96), 1: (60, 80)}.items():
        f = 1.2 * width
        Image.fromarray(synthetic.render(poses[i], f, width, height)[0]).save(tmp_path / f"views/view_{i:02d}.png")
        top["frames"][i] |= {"w": width, "h": height, "fl_x": f, "fl_y": f, "cx": width / 2, "cy": height / 2}
    (tmp_path / "cameras.json").write_text(json.dumps(top))
    views = load_views(tmp_path, AUTO)
    assert views.images.shape == (8, 96, 128, 4)
    assert_consistent(views, poses)
    small = load_views(tmp_path, AUTO, max_size=64)
    assert max(small.height, small.width) == 64
    assert_consistent(small, poses)


def test_what_lies_beyond_the_edge_of_a_smaller_photo_is_not_said_to_be_empty(tmp_path):
    poses = synthetic.around(12)
    top = synthetic.write_views(tmp_path, poses, depth=True)
    whole = load_views(tmp_path, AUTO)
    assert whole.known is None
    frames = {i: dict(top) | frame for i, frame in enumerate(top.pop("frames"))}
    cut = {}
    for i in (2, 7):
        rgba, _ = synthetic.render(poses[i], 80.0, 64, 48)
        columns = np.flatnonzero(rgba[..., 3].any(0))
        cut[i] = int(columns[0] + 0.6 * len(columns))
        Image.fromarray(rgba[:, : cut[i]]).save(tmp_path / f"views/view_{i:02d}.png")
        depth = cv2.imread(str(tmp_path / f"depth/depth_{i:02d}.png"), cv2.IMREAD_UNCHANGED)
        assert depth is not None
        cv2.imwrite(str(tmp_path / f"depth/depth_{i:02d}.png"), depth[:, : cut[i]])
        frames[i]["w"] = cut[i]
    for frame in frames.values():
        frame.pop("frames", None)
    (tmp_path / "cameras.json").write_text(json.dumps({**top, "frames": list(frames.values())}))
    views = load_views(tmp_path, AUTO)
    assert views.warnings == ()
    assert views.known is not None
    for i, known in enumerate(views.known):
        edge = cut.get(i, 64)
        assert known[:, :edge].all()
        assert not known[:, edge:].any()
        assert (views.images[i, :, edge:, 3] == 0).all()
    torch.testing.assert_close(views.world_from_scene, whole.world_from_scene, atol=0.03, rtol=0)
    assert_consistent(views, poses)
    chosen = views.select([2]).known
    assert chosen is not None
    assert torch.equal(chosen[0], views.known[2])


def test_exif_orientation_is_applied_and_the_camera_fits(tmp_path, poses):
    synthetic.write_views(tmp_path, poses, masks=True, alpha=False)
    upright = load_views(tmp_path, AUTO)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown upright after a quarter turn clockwise
    for i in range(8):
        path = tmp_path / f"views/view_{i:02d}.png"
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    turned = load_views(tmp_path, AUTO)
    torch.testing.assert_close(turned.images, upright.images)
    assert_consistent(turned, poses)


def test_cameras_of_the_stored_pixels_leave_the_photo_as_stored(tmp_path, poses):
    synthetic.write_views(tmp_path, poses)
    plain = load_views(tmp_path, AUTO)
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(8):
        path = tmp_path / f"views/view_{i:02d}.png"
        Image.open(path).save(path, exif=exif)  # w, h of the cameras are the stored size
    torch.testing.assert_close(load_views(tmp_path, AUTO).images, plain.images)


UNTURNED = {  # what a photo that is shown upright is stored as, by its EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def write_oriented(folder: Path, orientation: int, turn: Image.Transpose | None = None) -> None:
    """Gives every view the EXIF orientation, its pixels turned before if asked for."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for path in (folder / "views").iterdir():
        image = Image.open(path)
        (image if turn is None else image.transpose(turn)).save(path, exif=exif)


@pytest.mark.parametrize("size", [(64, 48), (48, 48)], ids=["oblong", "square"])
@pytest.mark.parametrize("declared", [True, False], ids=["w and h", "no w and h"])
def test_poses_of_a_camera_file_are_of_the_stored_pixels(tmp_path, poses, size, declared):
    top = synthetic.write_views(tmp_path, poses, size=size, masks=True, alpha=False, depth=True)
    if not declared:
        fields = {k: v for k, v in top.items() if k not in ("w", "h")}
        (tmp_path / "cameras.json").write_text(json.dumps(fields))
    plain = load_views(tmp_path, AUTO)
    assert_consistent(plain, poses)
    for orientation in UNTURNED:
        write_oriented(tmp_path, orientation)
        assert torch.equal(load_views(tmp_path, AUTO).images, plain.images), orientation


@pytest.mark.parametrize("orientation", UNTURNED)
@pytest.mark.parametrize("cameras", ["none", "canonical6"])
def test_without_poses_of_a_camera_file_photos_are_turned_upright(tmp_path, orientation, cameras):
    rig = canonical6(48, 64).world_from_camera.numpy()
    top = synthetic.write_views(tmp_path, rig, f=200.0)
    upright = load_views(tmp_path, ViewRules(cameras=cameras))
    write_oriented(tmp_path, orientation, UNTURNED[orientation])
    for w, h in ((64, 48), (48, 64)):
        (tmp_path / "cameras.json").write_text(json.dumps(top | {"w": w, "h": h}))
        assert torch.equal(load_views(tmp_path, ViewRules(cameras=cameras)).images, upright.images)


def test_a_view_that_contradicts_the_others_is_named(tmp_path):
    synthetic.write_views(tmp_path, synthetic.around(10), masks=True, alpha=False)
    wrong = np.zeros((48, 64), np.uint8)
    wrong[:6, :6] = 255
    Image.fromarray(wrong).save(tmp_path / "masks/mask_04.png")
    views = load_views(tmp_path, AUTO)
    assert len(views) == 10
    assert views.warnings == (
        "views/view_04.png: its mask contradicts the other views'; check its mask and its camera.",
    )
    assert object_in_scene(views).abs().max() < 0.5


def test_a_phones_jpeg_with_a_gain_map_is_its_first_picture(tmp_path, poses):
    synthetic.write_views(tmp_path, poses, masks=True, alpha=False)
    plain = load_views(tmp_path, AUTO)
    for i in range(8):
        path = tmp_path / f"views/view_{i:02d}.png"
        picture = Image.open(path)
        picture.load()
        picture.save(path, "MPO", save_all=True, append_images=[Image.new("RGB", (32, 24))], quality=98)
    views = load_views(tmp_path, AUTO)
    assert (views.images.int() - plain.images.int()).abs().float().mean() < 3


def test_too_many_views_are_thinned_with_a_warning(tmp_path):
    poses = synthetic.around(9)
    synthetic.write_views(tmp_path, poses, depth=True, masks=True)
    views = load_views(tmp_path, AUTO, limits=replace(Limits(), views=5))
    assert views.names == tuple(f"views/view_{i:02d}.png" for i in (0, 2, 4, 6, 8))
    assert "5 of the 9 views" in views.warnings[0]
    assert_consistent(views, poses[::2])


def test_only_the_files_of_the_views_that_are_used_count_as_bytes(tmp_path):
    synthetic.write_views(tmp_path, synthetic.around(9), depth=True, masks=True)

    def size(*views: int) -> int:
        folders = {"views": "view", "masks": "mask", "depth": "depth"}
        return sum((tmp_path / k / f"{v}_{i:02d}.png").stat().st_size for i in views for k, v in folders.items())

    limits = replace(Limits(), views=5, total_bytes=size(0, 2, 4, 6, 8))
    assert len(plan_views(tmp_path, AUTO, limits).views) == 5
    with pytest.raises(InputError, match=r"of the 5 views that are used .* give fewer or smaller"):
        plan_views(tmp_path, AUTO, replace(limits, total_bytes=limits.total_bytes - 1))


def test_without_cameras(tmp_path, poses):
    synthetic.write_views(tmp_path, poses)
    views = load_views(tmp_path, ViewRules(cameras="none"))
    assert views.cameras is None
    assert views.camera_source is None
    assert views.mask_source == "alpha"
    assert 0.02 < (views.images[..., 3] > 127).float().mean() < 0.5


def test_without_masks_the_depth_or_the_cameras_decide(tmp_path, poses):
    synthetic.write_views(tmp_path, poses, alpha=False, depth=True)
    by_depth = load_views(tmp_path, ViewRules(mask="none"))
    assert (by_depth.images[..., 3] == 255).all()
    assert object_in_scene(by_depth).abs().max() < 0.52
    for path in (tmp_path / "depth").iterdir():
        path.unlink()
    by_cameras = load_views(tmp_path, ViewRules(mask="none"))
    extent = object_in_scene(by_cameras)
    assert extent.abs().max() < 0.5
    assert float((extent.amax(0) - extent.amin(0)).max()) > 0.3
    top = json.loads((tmp_path / "cameras.json").read_text()) | {"aabb": [[-0.5] * 3, [0.5] * 3]}
    (tmp_path / "cameras.json").write_text(json.dumps(top))
    by_aabb = load_views(tmp_path, ViewRules(mask="none"))
    torch.testing.assert_close(by_aabb.world_from_scene[:3, :3], torch.eye(3, dtype=torch.float64) / 0.9)


def test_files_are_matched_by_number_then_by_order(tmp_path, poses):
    synthetic.write_views(tmp_path, poses, masks=True, alpha=False)
    expected = load_views(tmp_path, AUTO)
    masks = sorted((tmp_path / "masks").iterdir())
    for path in masks:
        path.rename(path.with_name(f"{100 - int(path.stem[-2:]):03d}_of_view_{int(path.stem[-2:])}.png"))
    torch.testing.assert_close(load_views(tmp_path, AUTO).images, expected.images)
    for path in (tmp_path / "masks").iterdir():
        path.rename(path.with_name("abcdefgh"[int(path.stem.split("_")[-1])] + ".png"))
    torch.testing.assert_close(load_views(tmp_path, AUTO).images, expected.images)


def test_names_come_before_numbers_and_numbers_before_order():
    def pairs(views: str, files: str, **selected) -> list[str]:
        names = tuple(f"views/{v}" for v in views.split())
        found = matched(names, tuple(f"masks/{f}" for f in sorted(files.split())), "mask", **selected)
        return [f.removeprefix("masks/") for f in found]

    assert pairs("front.png back.jpg left.png", "back.png front.png left.png") == ["front.png", "back.png", "left.png"]
    assert pairs("y_0.png x_0.png", "x_0_mask.png y_0_mask.png") == ["y_0_mask.png", "x_0_mask.png"]
    assert pairs("a.jpg b.jpg", "mask_b.png a.jpg.png") == ["a.jpg.png", "mask_b.png"]
    assert pairs("v_2.png v_10.png", "m_02.png m_10.png") == ["m_02.png", "m_10.png"]
    assert pairs("z.png y.png", "1.png 2.png") == ["2.png", "1.png"]  # the order of the names
    assert pairs("c.png a.png", "a.png b.png c.png", selected=True) == ["c.png", "a.png"]
    with pytest.raises(InputError, match="3 files for 2 views"):
        pairs("c.png a.png", "x.png y.png z.png", selected=True)
    with pytest.raises(InputError, match=r"left.png: no mask has the name or number"):
        pairs("front.png back.png left.png", "back.png front.png lft.png")


@pytest.mark.parametrize("cameras", ["file", "none", "sfm"])
def test_a_camera_file_says_which_files_whoever_gives_the_poses(tmp_path, poses, cameras):
    top = synthetic.write_views(tmp_path, poses, masks=True, alpha=False, depth=True)
    top |= {"train_filenames": [f"views/view_{i:02d}.png" for i in (5, 1, 6)]}
    if cameras != "file":
        top["frames"][1].pop("transform_matrix")

    def found() -> set[tuple[str, ...]]:
        (tmp_path / "cameras.json").write_text(json.dumps(top))
        plan = plan_views(tmp_path, ViewRules(cameras=cameras), Limits())
        assert plan.masks is not None
        assert plan.depths is not None
        return set(zip(plan.views, plan.masks, plan.depths, strict=True))

    def files(view: int, mask: int) -> tuple[str, ...]:
        return f"views/view_{view:02d}.png", f"masks/mask_{mask:02d}.png", f"depth/depth_{view:02d}.png"

    assert found() == {files(i, i) for i in (5, 1, 6)}
    for i, frame in enumerate(top["frames"]):
        frame["mask_path"] = f"cut/mask_{7 - i:02d}.png"  # of the folder it was made in, as uploads have none
    assert found() == {files(i, 7 - i) for i in (5, 1, 6)}
    (tmp_path / "cameras.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        plan_views(tmp_path, ViewRules(cameras=cameras), Limits())


def test_the_rig_takes_the_depth_unit_of_a_camera_file(tmp_path):
    rig = canonical6(48, 48)
    poses, f = rig.world_from_camera.numpy(), float(rig.fx[0])
    top = synthetic.write_views(tmp_path, poses, size=(48, 48), f=f, depth=True)
    (tmp_path / "cameras.json").write_text(json.dumps(top | {"frames": top["frames"][::-1]}))
    a, b = load_views(tmp_path, AUTO), load_views(tmp_path, ViewRules(cameras="canonical6"))
    assert b.names == a.names[::-1]
    assert a.depths is not None
    torch.testing.assert_close(b.depths, a.depths.flip(0), atol=1e-5, rtol=0)


def test_cancelled_between_files(tmp_path, poses):
    synthetic.write_views(tmp_path, poses)
    with pytest.raises(Cancelled):
        load_views(tmp_path, AUTO, cancelled=lambda: True)


def test_the_same_input_gives_the_same_views(tmp_path, poses):
    synthetic.write_views(tmp_path, poses, depth=True)
    a, b = load_views(Path(tmp_path), AUTO), load_views(Path(tmp_path), AUTO)
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.world_from_scene, b.world_from_scene)
