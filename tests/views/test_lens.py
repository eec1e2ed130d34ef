"""Lenses: our closed forms against OpenCV's projection, and what happens where a polynomial folds back."""

import cv2
import numpy as np
import pytest

from viewmesh.views.lens import Lens, distorted_pixels, resample, seen

K = np.array([[90.0, 0, 33.0], [0, 95.0, 22.0], [0, 0, 1]])


def rays(lens: Lens) -> np.ndarray:
    x = (np.arange(lens.width) + 0.5 - lens.cx) / lens.fx
    y = (np.arange(lens.height) + 0.5 - lens.cy) / lens.fy
    x, y = np.meshgrid(x, y)
    return np.stack([x, y, np.ones_like(x)], -1).reshape(-1, 1, 3)


def lens(model, radial, tangential=(0.0, 0.0)) -> Lens:
    return Lens(90.0, 95.0, 33.0, 22.0, 64, 48, model, radial, tangential)


def test_brown_conrady_is_opencvs():
    ours = lens("opencv", (-0.2, 0.06, 0.01, 0.0), (0.004, -0.003))
    theirs, _ = cv2.projectPoints(
        rays(ours), np.zeros(3), np.zeros(3), K, np.array([-0.2, 0.06, 0.004, -0.003, 0.01])
    )  # OpenCV's order is k1 k2 p1 p2 k3
    np.testing.assert_allclose(np.stack(distorted_pixels(ours), -1).reshape(-1, 2), theirs[:, 0], atol=2e-5)


def test_fisheye_is_opencvs():
    ours = lens("fisheye", (0.05, -0.02, 0.003, 0.001))
    theirs, _ = cv2.fisheye.projectPoints(
        rays(ours), np.zeros(3), np.zeros(3), K, np.array([0.05, -0.02, 0.003, 0.001])
    )
    np.testing.assert_allclose(np.stack(distorted_pixels(ours), -1).reshape(-1, 2), theirs[:, 0], atol=2e-5)


def test_no_distortion_is_the_identity():
    ours = lens("opencv", (0.0,) * 4)
    image = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    np.testing.assert_array_equal(resample(image, distorted_pixels(ours)), image)
    assert not ours.distorted
    assert lens("fisheye", (0.0,) * 4).distorted  # equidistant is not a pinhole


def test_where_the_polynomial_folds_back_nothing_was_seen():
    ours = Lens(20.0, 20.0, 32.0, 24.0, 64, 48, "opencv", (-0.3, 0.0, 0.0, 0.0))
    u, v = distorted_pixels(ours)
    folded = np.hypot((np.arange(64) + 0.5 - 32) / 20, (24.5 - 24) / 20) > 1 / np.sqrt(0.9) + 0.02
    assert folded.any()
    assert not seen(ours, (u, v))[24][folded].any()
    assert seen(ours, (u, v))[24][~folded][2:-2].all()


@pytest.mark.parametrize("size", [(32, 24), (128, 96)])
def test_resizing_keeps_the_rays(size):
    ours = lens("opencv", (-0.2, 0.06, 0.0, 0.0))
    scaled = ours.resized(*size)
    s = size[0] / 64
    assert (scaled.fx, scaled.fy, scaled.cx, scaled.cy) == (90 * s, 95 * s, 33 * s, 22 * s)
