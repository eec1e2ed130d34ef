"""Photos on their way to one size and one kind of camera, and mask files in all the ways that they are written."""

import json

import cv2
import numpy as np
import pytest
import synthetic_views as synthetic
from PIL import Image

from viewmesh.options import ViewRules
from viewmesh.progress import never, silent
from viewmesh.views.images import read_mask
from viewmesh.views.lens import Lens
from viewmesh.views.limits import Limits
from viewmesh.views.load import plan_views, read_photos
from viewmesh.views.masks import within_photos
from viewmesh.views.photo import Photo, padded, shrunk, undistorted

BARREL = Lens(180.0, 180.0, 130.0, 90.0, 256, 192, "opencv", (-0.2, 0.05, 0.0, 0.0))
PINCUSHION = Lens(180.0, 180.0, 130.0, 90.0, 256, 192, "opencv", (0.3, 0.0, 0.0, 0.0))
FISHEYE = Lens(100.0, 100.0, 130.0, 90.0, 256, 192, "fisheye", (0.02, 0.0, 0.0, 0.0))


def waves(lens: Lens) -> np.ndarray:
    """Colour that rises by up to 50 levels from one pixel to the next in a quarter of the size."""
    y, x = np.mgrid[: lens.height, : lens.width] + 0.5
    phase = np.stack([x, y, (x + y) / 2], -1) * 2 * np.pi / 64
    return (127.5 + 127 * np.sin(phase)).astype(np.uint8)


@pytest.mark.parametrize("lens", [BARREL, FISHEYE], ids=lambda lens: lens.model)
def test_a_lens_is_undone_at_any_size(lens):
    photo = Photo("a.png", waves(lens), lens=lens)
    small_first, small_last = undistorted(shrunk(photo, 64)), shrunk(undistorted(photo), 64)
    assert small_first.lens == small_last.lens
    both = np.ones((48, 64), bool)
    for side in (small_first, small_last):
        if side.coverage is not None:
            both &= side.coverage == 255
    both[[0, -1]], both[:, [0, -1]] = False, False  # at the border one has more to blend with
    assert both.mean() > 0.5
    apart = np.abs(small_first.rgb.astype(int) - small_last.rgb)[both]
    assert apart.max() <= 6  # a quarter of a pixel astray it is 13


def test_a_very_wide_photo_is_shrunk_before_its_lens_is_undone(tmp_path):
    rules = ViewRules()
    fields = {"fl_x": 33_000, "w": 33_000, "h": 96, "k1": 0.02}  # wider than OpenCV can look up
    frame = {"file_path": "views/a.png", "transform_matrix": synthetic.around(1)[0].tolist()}
    (tmp_path / "views").mkdir()
    Image.new("L", (33_000, 96), 200).save(tmp_path / "views/a.png")
    (tmp_path / "cameras.json").write_text(json.dumps({**fields, "frames": [frame]}))
    plan = plan_views(tmp_path, rules, Limits())
    (photo,), _ = read_photos(plan, rules, Limits(), 1024, silent, never)
    assert photo.size == (1024, 3)
    assert photo.lens is not None
    assert photo.lens.fx == 1024


def test_a_smaller_pixel_is_known_where_all_that_it_is_made_of_is():
    photo = padded(Photo("a.png", np.full((40, 50, 3), 200, np.uint8)), 80, 60)
    assert photo.known is not None
    assert (photo.known.sum(), photo.known[:40, :50].all()) == (40 * 50, True)
    small = shrunk(photo, 20)  # a quarter: 12.5 x 10 pixels of the photo
    assert small.known is not None
    assert (small.known.sum(), small.known[:10, :12].all()) == (10 * 12, True)


def test_what_a_lens_did_not_see_is_masked_out_without_a_mask_too():
    rgb = np.full((192, 256, 3), 200, np.uint8)
    seen = undistorted(Photo("a.png", rgb, lens=PINCUSHION))
    assert seen.coverage is not None
    assert seen.coverage[0, 0] == 0
    assert seen.coverage[96, 128] == 255
    assert (seen.rgb[seen.coverage == 255] > 99).all()
    assert seen.known is not None
    assert (seen.coverage[~seen.known] < 255).all()
    assert seen.known.mean() > 0.5
    full = undistorted(Photo("a.png", rgb, np.full((192, 256), 255, np.uint8), lens=PINCUSHION))
    np.testing.assert_array_equal(full.known, seen.known)  # which the mask alone would not say
    plain = undistorted(Photo("a.png", rgb, lens=BARREL))
    assert plain.coverage is None
    assert plain.known is None
    (found,) = within_photos([seen], [np.full((192, 256), 255, np.uint8)])
    np.testing.assert_array_equal(found.coverage, seen.coverage)


def test_no_background_bleeds_into_an_undistorted_object():
    rgb, mask = np.full((192, 256, 3), 255, np.uint8), np.zeros((192, 256), np.uint8)
    cv2.circle(mask, (140, 80), 50, 255, -1)
    rgb[mask > 0] = 40
    photo = undistorted(Photo("a.png", rgb, mask, lens=BARREL))
    assert photo.coverage is not None
    assert ((photo.coverage > 25) & (photo.coverage < 230)).any()
    assert photo.rgb[photo.coverage > 25].max() <= 41


@pytest.mark.parametrize("lens", [BARREL, FISHEYE], ids=lambda lens: lens.model)
def test_distances_to_a_plane_become_its_depth_under_any_lens(lens):
    y, x = np.mgrid[: lens.height, : lens.width].astype(np.float64) + 0.5
    xy = np.stack([x, y], -1).reshape(-1, 1, 2)
    k = np.array([[lens.fx, 0, lens.cx], [0, lens.fy, lens.cy], [0, 0, 1]])
    if lens.model == "fisheye":
        rays = cv2.fisheye.undistortPoints(xy, k, np.array(lens.radial))
    else:
        rays = cv2.undistortPoints(xy, k, np.array([*lens.radial[:2], 0, 0]))
    distance = 3.0 * np.sqrt(1 + (rays**2).sum(-1)).reshape(lens.height, lens.width).astype(np.float32)
    photo = undistorted(
        Photo("a.png", np.zeros((192, 256, 3), np.uint8), depth=distance, depth_along_ray=True, lens=lens)
    )
    assert photo.depth is not None
    assert not photo.depth_along_ray
    known = photo.depth > 0
    assert known.mean() > 0.9
    np.testing.assert_allclose(photo.depth[known], 3.0, rtol=0.01)  # looked up at the nearest pixel


LABEL = [0, 0, 0, 128, 0, 0] + [0] * 762
SQUARE = np.zeros((32, 32), np.uint8)
SQUARE[8:24, 8:24] = 1


def palette() -> Image.Image:
    image = Image.fromarray(SQUARE, "P")
    image.putpalette(LABEL)
    return image


@pytest.mark.parametrize(
    "mask",
    [
        Image.fromarray(SQUARE),
        Image.fromarray(SQUARE * 38),
        Image.fromarray(SQUARE * 255),
        Image.fromarray(SQUARE * 255).convert("1"),
        Image.fromarray(SQUARE.astype(np.uint16)),
        Image.fromarray(SQUARE.astype(np.uint16) * 65535),
        Image.merge("RGBA", [Image.new("L", (32, 32), 7)] * 3 + [Image.fromarray(SQUARE * 255)]),
        palette(),
    ],
    ids=["0 and 1", "0 and 38", "8 bit", "1 bit", "16 bit, 0 and 1", "16 bit", "alpha", "label's colour"],
)
def test_a_mask_of_two_values_is_one_in_every_mode(tmp_path, mask):
    mask.save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", "m.png", Limits()), SQUARE * 255)


def test_a_soft_mask_stays_soft(tmp_path):
    soft = np.linspace(0, 255, 1024).astype(np.uint8).reshape(32, 32)
    Image.fromarray(soft).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", "m.png", Limits()), soft)
