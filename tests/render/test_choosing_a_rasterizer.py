"""Which back-end one gets, and what is said where it is missing."""

import importlib.util

import pytest

from viewmesh.errors import MissingModel, OptionError
from viewmesh.render.rasterizer import get_rasterizer


def test_choosing_a_back_end():
    assert get_rasterizer("cpu").name == "numba"
    with pytest.raises(OptionError, match="no rasterizer 'numba' for cuda"):
        get_rasterizer("cuda", "numba")
    with pytest.raises(OptionError, match="no rasterizer 'opengl'"):
        get_rasterizer("cpu", "opengl")


@pytest.mark.skipif(importlib.util.find_spec("nvdiffrast") is not None, reason="nvdiffrast is installed")
def test_a_missing_nvdiffrast_says_how_to_get_it():
    with pytest.raises(MissingModel) as error:
        get_rasterizer("cuda", "nvdiffrast")
    assert "--no-build-isolation" in error.value.hint
    assert "non-commercial" in error.value.hint
