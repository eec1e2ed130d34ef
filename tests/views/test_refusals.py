"""Bad view sets: each is refused with one sentence that names the file, the fault and the remedy."""

import json
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest
import synthetic_views as synthetic
from PIL import Image

from viewmesh.errors import InputError
from viewmesh.options import ViewRules
from viewmesh.views.limits import Limits
from viewmesh.views.load import load_views, survey

AUTO = ViewRules()


def edited(**top) -> Callable[[Path], None]:
    """Changes fields at the top of cameras.json; None removes."""

    def break_it(folder: Path) -> None:
        cameras = json.loads((folder / "cameras.json").read_text()) | top
        (folder / "cameras.json").write_text(json.dumps({k: v for k, v in cameras.items() if v is not None}))

    return break_it


def framed(i: int, **fields) -> Callable[[Path], None]:
    """Changes fields of one frame of cameras.json."""

    def break_it(folder: Path) -> None:
        cameras = json.loads((folder / "cameras.json").read_text())
        cameras["frames"][i] |= fields
        (folder / "cameras.json").write_text(json.dumps(cameras))

    return break_it


def posed(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return framed(3, transform_matrix=change(synthetic.around(6)[3]).tolist())


def moved(by: float) -> Callable[[Path], None]:
    """The world's origin so far away that every file that holds float32 would hold another object."""
    poses = synthetic.around(6)
    poses[:, :3, 3] += by * np.array([0.6, 0, -0.8])
    return after(*(framed(i, transform_matrix=pose.tolist()) for i, pose in enumerate(poses)))


def written(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def image(name: str, mode: str, size: tuple[int, int], value=0) -> Callable[[Path], None]:
    return lambda folder: Image.new(mode, size, value).save(folder / name)


def encoded(kind: str, **options) -> bytes:
    stream = BytesIO()
    Image.fromarray(synthetic.render(synthetic.around(6)[2], 80.0, 64, 48)[0][..., :3].copy()).save(
        stream, kind, **options
    )
    return stream.getvalue()


def animated() -> bytes:
    stream = BytesIO()
    frames = [Image.new("RGB", (64, 48), c) for c in ("red", "blue")]
    frames[0].save(stream, "WEBP", save_all=True, append_images=frames[1:])
    return stream.getvalue()


def bomb() -> bytes:
    """A PNG whose header claims 60000 x 60000 pixels."""
    import struct
    import zlib

    data = bytearray(encoded("PNG"))
    data[16:24] = struct.pack(">II", 60000, 60000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def masked(folder: Path) -> None:
    (folder / "masks").mkdir()
    for i in range(6):
        Image.fromarray(synthetic.render(synthetic.around(6)[i], 80.0, 64, 48)[0][..., 3].copy()).save(
            folder / f"masks/mask_{i:02d}.png"
        )


def after(*steps: Callable[[Path], object]) -> Callable[[Path], None]:
    def break_it(folder: Path) -> None:
        for step in steps:
            step(folder)

    return break_it


def listed(**patterns: str) -> Callable[[Path], None]:
    """Gives every frame the paths, {} its index."""

    def break_it(folder: Path) -> None:
        for i in range(6):
            framed(i, **{key: pattern.format(f"{i:02d}") for key, pattern in patterns.items()})(folder)

    return break_it


def faint(name: str) -> Callable[[Path], object]:
    """A mask that rises from 0 to 60."""
    return lambda folder: Image.fromarray(np.tile(np.minimum(np.arange(64, dtype=np.uint8), 60), (48, 1))).save(
        folder / name
    )


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def depth16(name: str, value: int, size: tuple[int, int] = (64, 48)) -> Callable[[Path], object]:
    return lambda folder: cv2.imwrite(str(folder / name), np.full(size[::-1], value, np.uint16))


def nan(pose: np.ndarray) -> np.ndarray:
    return np.where(np.eye(4) > 0, np.nan, pose)


VIEW = "views/view_02.png"
JPEG_AS_VIEW = written(VIEW, encoded("JPEG"))

# name: what is broken, the file named, what the sentence says of the remedy
CASES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "not an image": (written(VIEW, b"hello"), VIEW, "convert it to a PNG, JPEG or WebP"),
    "empty file": (written(VIEW, b""), VIEW, "convert it"),
    "gif by content": (written(VIEW, encoded("GIF")), VIEW, "convert it to a PNG, JPEG or WebP"),
    "truncated png": (written(VIEW, encoded("PNG")[:-400]), VIEW, "save or upload it again"),
    "truncated jpeg": (written(VIEW, encoded("JPEG")[:-300]), VIEW, "save or upload it again"),
    "animated": (written(VIEW, animated()), VIEW, "save one frame"),
    "bomb": (written(VIEW, bomb()), VIEW, "the image has far too many pixels, at most 50 million are read; scale it"),
    "too small": (image(VIEW, "RGBA", (8, 8)), VIEW, "give a larger one"),
    "size against w, h": (image(VIEW, "RGBA", (32, 24), (9, 9, 9, 99)), VIEW, "the camera was estimated from"),
    "missing view": (removed(VIEW), "cameras.json", "add the file or remove its frame"),
    "all transparent": (image(VIEW, "RGBA", (64, 48)), VIEW, "mark the object"),
    "one view without alpha": (JPEG_AS_VIEW, VIEW, "give every view alpha, or none"),
    "not json": (written("cameras.json", b"{"), "cameras.json", "write it again"),
    "deep json": (written("cameras.json", b"[" * 100_000), "cameras.json", "write it again"),
    "a list": (written("cameras.json", b"[]"), "cameras.json", "must be an object"),
    "not utf-8": (written("cameras.json", b"\xff\xfe\xfa"), "cameras.json", "write it again"),
    "no frames": (edited(frames=None), "cameras.json", "give one frame"),
    "frames empty": (edited(frames=[]), "cameras.json", "give one frame"),
    "frame not an object": (edited(frames=[1]), "cameras.json", "name its image"),
    "no focal length": (edited(fl_x=None, fl_y=None), "cameras.json", "give the focal length in pixels"),
    "focal length absurd": (edited(fl_x=1e-3), "cameras.json", "give it in pixels"),
    "focal length text": (edited(fl_x="80"), "cameras.json", "correct it"),
    "angle in degrees": (edited(fl_x=None, fl_y=None, camera_angle_x=40.0), "cameras.json", "give radians"),
    "principal point": (edited(cx=5000), "cameras.json", "give cx, cy in pixels"),
    "distortion": (edited(k1=1e9), "cameras.json", "k1 k2 p1 p2"),
    "camera model": (edited(camera_model="EQUIRECTANGULAR"), "cameras.json", "OPENCV_FISHEYE"),
    "w without h": (edited(h=None), "cameras.json", "give both in pixels"),
    "depth unit": (edited(depth_unit_scale=-1), "cameras.json", "world units per integer step"),
    "depth kind": (edited(depth_kind="disparity"), "cameras.json", "write z (along the optical axis) or ray"),
    "applied transform": (edited(applied_transform=[[0] * 4] * 3), "cameras.json", "correct or remove it"),
    "infinite": (edited(fl_x=10**400), "cameras.json", "correct it"),
    "same file twice": (framed(3, file_path=VIEW), "cameras.json", "list every view once"),
    "no file_path": (framed(3, file_path=None), "cameras.json", "name its image"),
    "leaves the folder": (framed(3, file_path="../x.png"), "cameras.json", "write paths relative to it"),
    "absolute": (framed(3, file_path="/etc/passwd"), "cameras.json", "write paths relative to it"),
    "a drive": (framed(3, file_path="C:\\x.png"), "cameras.json", "write paths relative to it"),
    "long name": (framed(3, file_path="x" * 5000), "cameras.json", "name an image"),
    "some masks only": (framed(3, mask_path="views/view_03.png"), "cameras.json", "for all or for none"),
    "a listed mask missing": (
        after(masked, listed(mask_path="masks/mask_{}.png"), removed("masks/mask_04.png")),
        "cameras.json", "masks/mask_04.png is not in the view set as a mask; add the file",
    ),
    "a listed mask named as its view": (
        listed(mask_path="masks/view_{}.png"), "cameras.json", "masks/view_00.png is not in the view set as a mask",
    ),
    "a view as its mask": (listed(mask_path="views/view_{}.png"), "cameras.json", "not in the view set as a mask"),
    "a listed depth map missing": (
        after(listed(depth_path="depth/depth_{}.png"), removed("depth/depth_04.png")),
        "cameras.json", "not in the view set as a depth map",
    ),
    "a view that is another one": (
        framed(3, file_path="other/view_02.png"), "cameras.json", "other/view_02.png would both be views/view_02.png",
    ),
    "mask_path a number": (framed(3, mask_path=7), "cameras.json", "leave it out"),
    "pose NaN": (posed(nan), "view_03.png", "camera-to-world matrix in numbers"),
    "pose singular": (posed(lambda m: m * [[0], [1], [1], [1]]), "view_03.png", "a rotation and a position"),
    "pose scaled": (posed(lambda m: m * 1.5), "view_03.png", "a rotation"),
    "pose mirrored": (posed(lambda m: m * [-1, 1, 1, 1]), "view_03.png", "right-handed"),
    "pose transposed": (posed(lambda m: m.T), "view_03.png", "is it transposed"),
    "pose far away": (posed(lambda m: m + 1e9 * np.eye(4, k=3)), "view_03.png", "subtract a common offset"),
    "world far away": (moved(2.5e4), "cameras.json", "subtract a common offset from the translations"),
    "world very far away": (moved(9e5), "cameras.json", "subtract a common offset from the translations"),
    "pose 2x2": (posed(lambda m: m[:2, :2]), "view_03.png", "give the camera-to-world matrix"),
    "pose missing": (framed(3, transform_matrix=None), "view_03.png", "give the camera-to-world matrix"),
    "opencv axes": (
        edited(frames=[
            {"file_path": f"views/view_{i:02d}.png", "transform_matrix": (m * [1, -1, -1, 1]).tolist()}
            for i, m in enumerate(synthetic.around(6))
        ]),
        "", "not OpenCV's",
    ),
    "masks and cameras disagree": (
        edited(frames=[
            {"file_path": f"views/view_{i:02d}.png", "cx": -60.0 + 184 * (i % 2), "cy": -40 + 130 * (i // 2 % 2),
             "transform_matrix": m.tolist()} for i, m in enumerate(synthetic.around(6))
        ]),
        "", "agree on no volume",
    ),
    "a mask missing": (after(masked, removed("masks/mask_04.png")), "masks", "give every view one mask"),
    "a mask too many": (
        after(masked, image("masks/mask_9.png", "L", (64, 48)), removed("cameras.json")),
        "masks", "give every view one",
    ),
    "mask too dark": (
        after(masked, faint("masks/mask_04.png")),
        "masks/mask_04.png", "is 60, which is no object; mark the object white (255)",
    ),
    "mask names": (
        after(masked, *(
            lambda f, i=i, name=name: (f / f"masks/mask_{i:02d}.png").rename(f / f"masks/{name}.png")
            for i, name in enumerate(["view_00", "view_01", "view_02", "view_03", "view_04", "extra"])
        )),
        "views/view_05.png", "rename the files of masks/",
    ),
    "mask empty": (after(masked, image("masks/mask_04.png", "L", (64, 48))), "masks/mask_04.png", "white (255)"),
    "mask size": (after(masked, image("masks/mask_04.png", "L", (32, 48), 255)), "masks/mask_04.png", "view's size"),
    "mask numbers": (
        after(masked, lambda f: (f / "masks/mask_04.png").rename(f / "masks/mask_14.png")),
        "views/view_04.png", "rename the files of masks/",
    ),
    "depth 8-bit": (image("depth/depth_04.png", "L", (64, 48), 9), "depth/depth_04.png", "uint16"),
    "depth jpeg": (written("depth/depth_04.png", encoded("JPEG")), "depth/depth_04.png", "convert it to a PNG"),
    "depth size": (depth16("depth/depth_04.png", 9, (32, 24)), "depth/depth_04.png", "give it the view's size"),
    "depth all zero": (depth16("depth/depth_04.png", 0), "depth/depth_04.png", "leave depth out"),
    "depth missing": (removed("depth/depth_04.png"), "depth", "give every view one depth map"),
    "depth in other units": (edited(depth_unit_scale=0.01), "views/view_00.png", "check depth_unit_scale"),
    "a depth map as an array": (
        written("depth/depth_06.npy", b""), "depth/depth_06.npy", "convert it to a 16-bit PNG, or take it out",
    ),
    "a mask of another kind": (
        after(masked, written("masks/mask_06.PGM", b"")), "masks/mask_06.PGM", "convert it to PNG, JPEG or WebP",
    ),
    "a tiff": (image("views/view_06.tif", "RGB", (64, 48)), "views/view_06.tif", "convert it to PNG, JPEG or WebP"),
}  # fmt: skip


@pytest.fixture(scope="module")
def good_set(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    synthetic.write_views(folder, synthetic.around(6), depth=True)
    return folder


@pytest.fixture
def folder(good_set, tmp_path) -> Path:
    return Path(shutil.copytree(good_set, tmp_path / "set"))


def refused(folder: Path, rules: ViewRules = AUTO, limits: Limits = Limits()) -> InputError:
    with pytest.raises(InputError) as caught:
        load_views(folder, rules, limits=limits)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert len(sentence) < 500
    assert "/" + folder.name not in sentence  # the user's names, not this machine's
    return caught.value


def test_the_set_is_good_before_it_is_broken(folder):
    assert len(load_views(folder, AUTO)) == 6


@pytest.mark.parametrize("case", CASES)
def test_refused(folder, case):
    break_it, file, remedy = CASES[case]
    break_it(folder)
    error = refused(folder)
    assert file in error.file
    assert str(error).startswith(error.file)
    assert remedy in str(error)


@pytest.mark.parametrize("name", ["jxl", "npy", "npz", "pfm", "raw", "tga", "ppm", "psd", "cr3", "of_no_known_kind"])
@pytest.mark.parametrize("place", ["views", "images", "masks", "depth"])
@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
def test_no_file_of_a_view_is_left_out_in_silence(tmp_path, name, place, zipped):
    names = ("images" if place == "images" else "views", place)
    source = tmp_path / "set"
    for folder in names:
        (source / folder).mkdir(parents=True, exist_ok=True)
    (source / names[0] / "0.png").write_bytes(encoded("PNG"))
    (source / place / f"1.{name}").write_bytes(bytes(9))
    if zipped:
        source = Path(shutil.make_archive(str(source), "zip", source))
    with pytest.raises(InputError, match=rf"^{place}/1\.{name}: this kind of file is not read; convert it"):
        survey(source, AUTO)


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
def test_side_files_are_no_views(folder, zipped):
    for name in ("README", "LICENSE.txt", "notes.md", "view_00.json", "gps.csv", "a.xml", "view_00.XMP", "view_00.aae"):
        for place in ("views", "depth", "."):
            (folder / place / name).write_bytes(b"x")
    for name in ("views/Thumbs.db", "views/.DS_Store", "depth/.hidden.npy", "points.npy", "scan.psd"):
        (folder / name).write_bytes(b"x")
    source = Path(shutil.make_archive(str(folder), "zip", folder)) if zipped else folder
    assert survey(source, AUTO) == (6, "file")


@pytest.mark.parametrize("ending", ["jpe", "jfif", "JFIF"])
@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
def test_jpegs_by_their_other_names(tmp_path, ending, zipped):
    (tmp_path / "set" / "views").mkdir(parents=True)
    for i in range(2):
        (tmp_path / "set" / "views" / f"{i}.{ending}").write_bytes(encoded("JPEG"))
    source = Path(shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path / "set")) if zipped else tmp_path / "set"
    views = load_views(source, ViewRules(cameras="none", mask="none"))
    assert views.names == tuple(f"views/{i}.{ending}" for i in range(2))


LIMIT_CASES = {
    "pixels": (Limits(pixels=1000), "views/view_00.png", "scale it down"),
    "bytes of a file": (Limits(file_bytes=100), "views/view_00.png", "save it smaller"),
    "bytes of all": (Limits(total_bytes=1000), "set", "give fewer or smaller"),
    "json": (Limits(json_bytes=100), "cameras.json", "keep only the cameras"),
    "frames": (Limits(listed_views=5), "cameras.json", "list fewer"),
}


@pytest.mark.parametrize("case", LIMIT_CASES)
def test_limits(folder, case):
    limits, file, remedy = LIMIT_CASES[case]
    error = refused(folder, limits=limits)
    assert file in error.file
    assert remedy in str(error)


RULE_CASES = {
    "masks": (ViewRules(mask="masks"), "masks/", "add one mask per view"),
    "camera file": (ViewRules(cameras="file"), "cameras.json", "use cameras: auto"),
    "rig of five": (ViewRules(cameras="canonical6"), "views/", "view_00 to view_05"),
    "alpha": (ViewRules(mask="alpha", cameras="canonical6"), "views/view_00.png", "save the cut-out as RGBA"),
}


@pytest.mark.parametrize("case", RULE_CASES)
def test_rules_that_ask_for_what_is_not_there(folder, case):
    rules, file, remedy = RULE_CASES[case]
    (folder / "cameras.json").unlink()
    if case == "rig of five":
        (folder / "views/view_05.png").unlink()
    if case == "alpha":
        for i in range(6):
            Image.open(folder / f"views/view_{i:02d}.png").convert("RGB").save(folder / f"views/view_{i:02d}.png")
    error = refused(folder, rules)
    assert file in error.file
    assert remedy in str(error)


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match="check the path"):
        load_views(tmp_path / "nowhere", AUTO)
    with pytest.raises(InputError, match="put PNG, JPEG or WebP files into views/"):
        load_views(tmp_path, AUTO)


def test_photos_of_nothing(folder):
    for i in range(6):
        Image.new("RGB", (64, 48), "gray").save(folder / f"views/view_{i:02d}.png")
    error = refused(folder, ViewRules(mask="grabcut", cameras="none"))
    assert error.file == "views/view_00.png"
    assert "give masks/ or an alpha channel" in str(error)


def test_an_opaque_alpha_channel_is_no_mask(folder):
    for i in range(6):
        path = folder / f"views/view_{i:02d}.png"
        Image.open(path).convert("RGB").convert("RGBA").save(path)
    views = load_views(folder, AUTO)
    assert views.mask_source in ("grabcut", "rembg")
