"""Float32 products of halves: nearly as exact as float32 ones, whatever the factors' size."""

import pytest
import torch
from torch import nn

from viewmesh.trellis.split import LARGEST, SplitLinear, in_halves
from viewmesh.trellis.vit import DinoVisionTransformer

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def factors(device, *, inner=1024, size=1.0):
    torch.manual_seed(3)
    layer = nn.Linear(inner, 96).to(device)
    nn.init.normal_(layer.weight, std=0.03)
    return layer, size * torch.randn(2, 33, inner, device=device)


def error(layer, found, x):
    """The largest, in units of the sum of the magnitudes that were added up."""
    weight, bias = layer.weight.double(), layer.bias.double()
    exact = x.double() @ weight.T + bias
    return ((found.double() - exact).abs() / (x.double().abs() @ weight.abs().T + bias.abs())).max().item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1.0, 300.0])
@torch.no_grad()
def test_a_product_of_halves_is_a_float32_product(device, size):
    layer, x = factors(device, size=size)
    found = SplitLinear(layer)(x)
    assert found.shape == (2, 33, 96)
    assert found.dtype == torch.float32
    assert error(layer, found, x) < 1e-6  # 2e-7 on a CPU; matrix units round their sums less well
    rounded = nn.functional.linear(x.half().float(), layer.weight.half().float(), layer.bias)
    assert error(layer, rounded, x) > 5 * error(layer, found, x)  # what the second halves are for


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_what_a_half_cannot_hold_is_not_lost(device):
    layer, x = factors(device, size=20_000.0)
    assert x.abs().max() > LARGEST
    assert error(layer, SplitLinear(layer)(x), x) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_an_encoder_of_halves_is_the_float32_encoder(device):
    torch.manual_seed(0)
    encoder = DinoVisionTransformer(56, 14, 64, 3, 4).to(device)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    images = torch.randn(2, 3, 56, 56, device=device)
    with torch.no_grad():
        before, exact = encoder(images), encoder.double()(images.double()) if device == "cpu" else None
        split = in_halves(encoder.float())
        after = split(images)
    assert not any(isinstance(module, nn.Linear) for module in split.modules())
    assert (after - before).abs().max() < 2e-5 * before.abs().max()
    if exact is not None:
        assert (after - exact).abs().max() < 3 * (before - exact).abs().max() + 1e-6 * exact.abs().max()
