import math

import cv2
import numpy as np
import pytest
import torch

from viewmesh.errors import InputError
from viewmesh.export.hdr import environment_bytes, hdr_bytes, read_environment, read_hdr
from viewmesh.render.light import latlong_directions


def picture(scale: float) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.rand(16, 32, 3, generator=g) * scale


@pytest.mark.parametrize("scale", [1e-6, 1.0, 5e4])
def test_what_is_written_is_read_to_a_part_in_256(scale):
    image = picture(scale)
    again = read_hdr(hdr_bytes(image))
    error = (again - image).abs() / image.amax(-1, keepdim=True)
    assert float(error.max()) <= 1 / 256 + 1e-6
    assert torch.equal(read_hdr(hdr_bytes(again)), again)  # nothing is lost twice


def test_black_and_negative_are_black():
    assert torch.equal(read_hdr(hdr_bytes(torch.tensor([[[0.0, 0, 0], [-1, -2, -3]]]))), torch.zeros(1, 2, 3))


def test_opencv_reads_ours_and_we_read_opencvs(tmp_path):
    image = picture(3.0)
    ours, theirs = tmp_path / "ours.hdr", tmp_path / "theirs.hdr"
    ours.write_bytes(hdr_bytes(image))
    read = cv2.imread(str(ours), cv2.IMREAD_UNCHANGED)[..., ::-1]
    assert np.allclose(read, image.numpy(), atol=3 / 128)
    cv2.imwrite(str(theirs), np.ascontiguousarray(image.numpy()[..., ::-1]))  # run-length encoded
    assert np.allclose(read_hdr(theirs.read_bytes()).numpy(), image.numpy(), atol=3 / 64)


def test_viewers_are_lit_from_where_the_mesh_was_lit(tmp_path):
    environment = latlong_directions(16) + 1  # the colour of a pixel says where its light comes from
    path = tmp_path / "environment.hdr"
    path.write_bytes(environment_bytes(environment))
    picture = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)[..., ::-1]
    for x, y, z in [[0.9, 0.1, 0.2], [-0.3, 0.2, 0.9], [-0.8, -0.5, 0.1], [0.2, 0.4, -0.8]]:
        length = math.hypot(x, y, z)
        u, v = math.atan2(z, x) / math.tau + 0.5, math.acos(y / length) / math.pi  # three.js' equirectUv, from the top
        pixel = picture[int(v * 16), int(u * 32)] - 1
        assert np.abs(pixel - np.array([x, y, z]) / length).max() < 0.15
    assert torch.allclose(read_environment(path.read_bytes()), environment, atol=2 / 128)


@pytest.mark.parametrize("data", [b"", b"PNG", b"#?RADIANCE\n\n-Y 4 +X 4\nabc", hdr_bytes(picture(1))[:-9]])
def test_damaged_pictures_are_refused(data):
    with pytest.raises(InputError, match="environment"):
        read_hdr(data)
