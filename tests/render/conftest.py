"""Every rasteriser that this machine can run."""

import importlib.util

import pytest
import torch

from viewmesh.render.rasterizer import Rasterizer, get_rasterizer

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
NVDIFFRAST = pytest.mark.skipif(importlib.util.find_spec("nvdiffrast") is None, reason="nvdiffrast is not installed")


@pytest.fixture(
    params=[
        "numba-cpu",
        "torch-cpu",
        pytest.param("torch-cuda", marks=[CUDA, pytest.mark.gpu]),
        pytest.param("nvdiffrast-cuda", marks=[CUDA, NVDIFFRAST, pytest.mark.gpu]),
    ]
)
def backend(request) -> tuple[Rasterizer, str]:
    name, device = request.param.split("-")
    return get_rasterizer(device, name), device
