"""Both projects' image rules: what is kept, where it lands, what is refused."""

import numpy as np
import pytest
from PIL import Image

from viewmesh.errors import InputError
from viewmesh.trellis.preprocess import image_tensor, reconviagen_image, trellis_image


def square(left: int, top: int, side: int, size: tuple[int, int] = (200, 160)) -> Image.Image:
    pixels = np.zeros((size[1], size[0], 4), np.uint8)
    pixels[...] = (10, 200, 30, 0)
    pixels[top : top + side, left : left + side] = (200, 100, 50, 255)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("left", "top"), [(40, 30), (0, 0), (139, 99)])  # in the middle, and cut by each border
def test_trellis_scales_the_object_to_five_sixths_of_the_frame(left, top):
    image = np.asarray(trellis_image(square(left, top, 61), size=240))
    bright = image.sum(-1) > 100
    rows, columns = np.nonzero(bright.any(1))[0], np.nonzero(bright.any(0))[0]
    for ends in (rows, columns):
        assert ends[-1] - ends[0] + 1 == pytest.approx(240 * 61 / 72, abs=4)
        assert (ends[0] + ends[-1]) / 2 == pytest.approx(119.5, abs=3)
    assert image.shape == (240, 240, 3)
    assert (image[0, 0] == 0).all()  # the colour under alpha 0 is gone


def test_trellis_multiplies_by_alpha():
    pixels = np.full((50, 50, 4), 255, np.uint8)
    pixels[..., 3] = 210
    pixels[..., 0] = 101
    image = np.asarray(trellis_image(Image.fromarray(pixels), size=20))
    assert int(image[10, 10, 0]) == pytest.approx(101 * 210 / 255, abs=1.2)


def test_reconviagen_keeps_the_aspect_and_cuts_at_the_border():
    image = np.asarray(reconviagen_image(square(0, 50, 61), size=240))
    assert image.shape == (240, 240, 4)
    assert (image[..., :3][image[..., 3] <= 200] == 0).all()
    columns = np.nonzero((image[..., 3] > 200).any(0))[0]
    rows = np.nonzero((image[..., 3] > 200).any(1))[0]
    # 61 pixels in a frame of 66, of which the three beyond the left border do not exist
    assert len(rows) == pytest.approx(240 * 61 / 66, abs=4)
    assert len(columns) == pytest.approx(240 * 61 / 66, abs=4)


@pytest.mark.parametrize("rule", [trellis_image, reconviagen_image])
def test_an_empty_mask_is_refused_by_name(rule):
    with pytest.raises(InputError, match=r"views/view_03\.png: the mask leaves nothing"):
        rule(Image.new("RGBA", (8, 8)), name="views/view_03.png")


@pytest.mark.parametrize("rule", [trellis_image, reconviagen_image])
def test_one_opaque_pixel_is_enough(rule):
    image = Image.new("RGBA", (9, 9))
    image.putpixel((4, 4), (255, 0, 0, 255))
    assert image_tensor(rule(image, size=28)).shape == (3, 28, 28)
