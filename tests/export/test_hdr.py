import cv2
import numpy as np
import pytest
import torch

from viewmesh.errors import InputError
from viewmesh.export.hdr import hdr_bytes, read_hdr


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


@pytest.mark.parametrize("data", [b"", b"PNG", b"#?RADIANCE\n\n-Y 4 +X 4\nabc", hdr_bytes(picture(1))[:-9]])
def test_damaged_pictures_are_refused(data):
    with pytest.raises(InputError, match="environment"):
        read_hdr(data)
