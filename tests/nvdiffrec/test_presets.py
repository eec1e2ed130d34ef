"""The presets' numbers make sense together, on both kinds of device."""

from dataclasses import fields
from typing import get_args

import pytest
import torch

from viewmesh.nvdiffrec.memory import memory_free, memory_needed
from viewmesh.nvdiffrec.presets import Preset, preset
from viewmesh.options import PresetName

NAMES = get_args(PresetName)
ALL = [preset(name, device) for name in NAMES for device in ("cpu", "cuda")]


@pytest.mark.parametrize("numbers", ALL, ids=lambda p: f"{p.name}-{p.surface}")
def test_a_preset_is_well_formed(numbers: Preset):
    for field in fields(Preset):
        value = getattr(numbers, field.name)
        values = value if isinstance(value, tuple) else (value,)
        assert all(isinstance(v, str) or v >= 0 for v in values), field.name
    counts = (
        numbers.lattice, numbers.shape_steps, numbers.shape_size, numbers.shape_batch, numbers.light_size,
        numbers.texture_steps, numbers.texture_crop, numbers.texture_batch, numbers.target_faces, numbers.texture_size,
        *numbers.volume,
    )  # fmt: skip
    assert all(isinstance(n, int) and n > 0 for n in counts)
    assert numbers.texture_size & (numbers.texture_size - 1) == 0
    assert numbers.light_size & (numbers.light_size - 1) == 0
    assert list(numbers.volume) == sorted(set(numbers.volume))
    assert 0 < numbers.final_rate <= 1
    assert numbers.lattice >= 8  # FlexiShape keeps five cells of it as a margin
    assert numbers.unwrap_timeout_s >= 60


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_higher_preset_has_more_of_everything(device: str):
    lower, middle, higher = (preset(name, device) for name in ("preview", "standard", "high"))
    for a, b in ((lower, middle), (middle, higher)):
        for name in ("lattice", "shape_steps", "shape_size", "texture_steps", "texture_crop", "target_faces"):
            assert getattr(a, name) < getattr(b, name), name
        assert a.texture_size <= b.texture_size


@pytest.mark.parametrize("name", NAMES)
def test_each_device_gets_its_own_surface(name):
    assert preset(name, "cpu").surface == "dmtet"
    assert preset(name, torch.device("cuda")).surface == "flexicubes"
    assert preset(name, "cuda").name == preset(name, "cpu").name == name


def test_the_caller_may_choose_faces_and_texture_and_camera_refinement():
    chosen = preset("preview", "cpu", target_faces=777, texture_size=512, refine_cameras=True)
    assert (chosen.target_faces, chosen.texture_size) == (777, 512)
    assert chosen.refine_pose
    assert chosen.refine_exposure
    plain = preset("preview", "cpu")
    assert not plain.refine_pose
    assert not plain.refine_exposure


@pytest.mark.parametrize("name", NAMES)
def test_a_cpu_preset_fits_in_four_gib(name):
    """The most that a ViewSet holds: 64 views of 1024 pixels."""
    assert memory_needed(preset(name, "cpu"), 64, 1024, 1024) < 4 * 2**30


def test_memory_grows_with_what_is_asked_for():
    small = preset("preview", "cpu")
    needed = memory_needed(small, 24, 512, 512)
    assert memory_needed(small, 48, 512, 512) > needed
    assert memory_needed(small, 24, 1024, 512) > needed
    assert memory_needed(preset("preview", "cpu", texture_size=4096), 24, 512, 512) > needed + 2**30
    assert memory_needed(preset("high", "cpu"), 24, 512, 512) > needed


def test_free_memory_is_a_plausible_figure():
    assert 2**26 < memory_free(torch.device("cpu")) <= 2**62
