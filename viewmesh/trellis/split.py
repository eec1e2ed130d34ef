"""Float32 products on a GPU's half-precision matrix units, several times as fast as in float32.

A float32 number is the sum of two halves up to 2⁻²² of it, x = x₁ + x₂, so that x w = x₁ w₁ + x₁ w₂ + x₂ w₁ up to that;
sums are float32, rounded less well than elsewhere: errors stay below 1e-6 of the magnitudes that are added up. Ootomo
and Yokota 2022, "Recovering single precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak
performance". The two halves of the weights take the memory of the float32 ones.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)
LARGEST = torch.finfo(torch.float16).max


class SplitLinear(nn.Module):
    """What a float32 nn.Linear computes, (..., K) to (..., N), both float32."""

    def __init__(self, of: nn.Linear) -> None:
        super().__init__()
        weight = of.weight.data
        first = weight.half()
        self.halves: Tensor
        self.register_buffer("halves", torch.cat([first, (weight - first).half()], 1))  # (N, 2 K): w₁, w₂
        self.bias = of.bias

    def forward(self, x: Tensor) -> Tensor:
        K = x.shape[-1]
        parts = _parts(x.float().reshape(-1, K))
        y = _product(parts[:, : 2 * K], self.halves, self.bias)
        return _product(parts[:, 2 * K :], self.halves[:, :K], y).unflatten(0, x.shape[:-1])


def fast_on(device: torch.device, network: Network) -> Network:
    """The network as it runs fastest there: in halves on an NVIDIA GPU with matrix units, Volta or later. In place."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < (7, 0):
        return network
    return in_halves(network)


def in_halves(network: Network) -> Network:
    """The network, every Linear in it replaced by its SplitLinear. In place."""
    for name, child in network.named_children():
        if isinstance(child, nn.Linear):
            setattr(network, name, SplitLinear(child))
        else:
            in_halves(child)
    return network


def _parts(x: Tensor) -> Tensor:
    """(M, K) float32 to (M, 3 K) halves: x₁, x₁, x₂. What a half cannot hold is left to x₂."""
    K = x.shape[1]
    parts = torch.empty(len(x), 3 * K, dtype=torch.float16, device=x.device)
    first, again, second = parts.split(K, 1)
    first.copy_(x).clamp_(-LARGEST, LARGEST)
    again.copy_(first)
    torch.sub(x, first, out=second)
    return parts


def _product(a: Tensor, b: Tensor, plus: Tensor) -> Tensor:
    """a bᵀ + plus in float32, a and b halves. A CPU has no such product and makes it of float32 ones."""
    if a.is_cuda:
        return torch.addmm(plus, a, b.T, out_dtype=torch.float32)
    return torch.addmm(plus, a.float(), b.float().T)
