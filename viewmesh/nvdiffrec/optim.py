"""Adam (Kingma & Ba 2015) over named tensors, with its state in plain sight so that a fit can be saved and resumed."""

from dataclasses import dataclass

import torch
from torch import Tensor

Variables = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Moments:
    """First and second moments by variable name, and how many updates they have seen."""

    first: Variables
    second: Variables
    count: int = 0


def zero_moments(variables: Variables) -> Moments:
    return Moments(
        {k: torch.zeros_like(v) for k, v in variables.items()}, {k: torch.zeros_like(v) for k, v in variables.items()}
    )


@torch.no_grad()
def adam(
    variables: Variables,
    gradients: dict[str, Tensor | None],
    moments: Moments,
    rates: dict[str, float],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Moments:
    """One update, IN PLACE on the tensors of `variables` and `moments`; returns the moments with the next count.

    A variable without a gradient, or without a rate, is left alone.
    """
    count = moments.count + 1
    b1, b2 = betas
    for name, rate in rates.items():
        gradient = gradients.get(name)
        if gradient is None:
            continue
        m, v = moments.first[name], moments.second[name]
        m.lerp_(gradient, 1 - b1)
        v.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        scale = (v / (1 - b2**count)).sqrt_().add_(eps)
        variables[name].addcdiv_(m, scale, value=-rate / (1 - b1**count))
    return Moments(moments.first, moments.second, count)
