"""Adam (Kingma & Ba 2015) over named tensors, with its state in plain sight so that a fit can be saved and resumed."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam

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
    for name, rate in rates.items():
        gradient = gradients.get(name)
        if gradient is None:
            continue
        seen = torch.full((), float(moments.count), device=gradient.device)
        torch_adam(
            [variables[name]], [gradient.contiguous()], [moments.first[name]], [moments.second[name]], [], [seen],
            fused=True, amsgrad=False, beta1=betas[0], beta2=betas[1], lr=rate, weight_decay=0.0, eps=eps,
            maximize=False,
        )  # fmt: skip
    return Moments(moments.first, moments.second, moments.count + 1)
