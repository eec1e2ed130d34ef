"""Rectified-flow sampling with classifier-free guidance on an interval.

`sample` is a pure function of a velocity function, a noise and numbers. Knows nothing about networks or conditions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from viewmesh.progress import Progress, check, never, silent


@dataclass(frozen=True)
class SamplerOptions:
    """steps: Euler steps from t = 1 to 0. rescale_t: bends the schedule towards noise.

    formula: "trellis", (1 + s) positive - s negative; or "reconviagen", s positive + (1 - s) negative.
    interval: guidance where lo <= t <= hi. rescale: how far the guided estimate is pulled back to the positive
    one's standard deviation (Lin et al. 2023, "Common diffusion noise schedules", section 3.4).
    """

    steps: int = 25
    strength: float = 5.0
    interval: tuple[float, float] = (0.5, 1.0)
    rescale_t: float = 3.0
    rescale: float = 0.0
    formula: str = "trellis"
    sigma_min: float = 1e-5


class Velocity(Protocol):
    """Velocities at x: the conditioned one, and the unconditioned one if `guided`. `t` is a tensor (1,), 1000 t."""

    def __call__(self, x: Tensor, t: Tensor, *, guided: bool, step: int) -> tuple[Tensor, Tensor | None]: ...


def timesteps(steps: int, rescale_t: float) -> np.ndarray:
    """steps + 1 times from 1 to 0, float64: guidance bounds are met exactly."""
    t = np.linspace(1, 0, steps + 1)
    return rescale_t * t / (1 + (rescale_t - 1) * t)


def guided_evaluations(options: SamplerOptions) -> int:
    """In how many steps guidance is on."""
    t = timesteps(options.steps, options.rescale_t)[:-1]
    lo, hi = options.interval
    return int(((lo <= t) & (t <= hi)).sum())


@torch.no_grad()
def sample(
    velocity: Velocity,
    noise: Tensor,
    options: SamplerOptions,
    *,
    std: Callable[[Tensor], Tensor] | None = None,
    stage: str = "sample",
    progress: Progress = silent,
    cancelled: Callable[[], bool] = never,
    on_step: Callable[[Tensor], None] | None = None,
    staying: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Integrates from noise at t = 1 to a sample at t = 0.

    std: the standard deviation per item used by `rescale`, shaped to broadcast against x. Default: over all but the
    first dimension, unbiased. on_step receives the estimate of the sample after each step (tests, previews). staying is
    asked before each step for what remains of x; `velocity` and `std` must follow it.
    """
    times = timesteps(options.steps, options.rescale_t)
    on_device = torch.tensor(1000 * times, dtype=torch.float32).to(noise.device)  # one copy, no sync in the loop
    lo, hi = options.interval
    x = noise
    for i, (t, t_next) in enumerate(zip(times[:-1].tolist(), times[1:].tolist(), strict=True)):
        check(cancelled)
        x = x if staying is None else staying(x)
        guided = lo <= t <= hi
        positive, negative = velocity(x, on_device[i : i + 1], guided=guided, step=i)
        v = positive
        if guided:
            assert negative is not None
            v = guide(x, t, positive, negative, options, std or dense_std)
        if on_step is not None:
            s = options.sigma_min
            on_step((1 - s) * x - (s + (1 - s) * t) * v)
        x = x - (t - t_next) * v
        progress(stage, i + 1, options.steps)
    return x


def guide(
    x: Tensor,
    t: float,
    positive: Tensor,
    negative: Tensor,
    options: SamplerOptions,
    std: Callable[[Tensor], Tensor],
) -> Tensor:
    """The guided velocity by either project's formula."""
    w = options.strength
    if options.formula == "trellis":
        return (1 + w) * positive - w * negative
    if options.formula != "reconviagen":
        raise ValueError(f"formula must be 'trellis' or 'reconviagen', got {options.formula!r}.")
    v = w * positive + (1 - w) * negative
    if options.rescale > 0:
        s = options.sigma_min
        sigma = s + (1 - s) * t
        x0_positive, x0 = (1 - s) * x - sigma * positive, (1 - s) * x - sigma * v
        pulled = x0 * std(x0_positive) / std(x0)
        x0 = options.rescale * pulled + (1 - options.rescale) * x0
        v = ((1 - s) * x - x0) / sigma
    return v


def dense_std(x: Tensor) -> Tensor:
    """Unbiased, over all but the first dimension, kept for broadcasting."""
    return x.std(dim=list(range(1, x.ndim)), keepdim=True)


def sparse_std(counts: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Per item over its voxels and channels, biased, as ReconViaGen computes it; for x (L, C)."""

    def std(x: Tensor) -> Tensor:
        parts = x.split(list(counts))
        stds = [(p.square().mean() - p.mean().square()).clamp(min=0).sqrt().expand(len(p), 1) for p in parts]
        return torch.cat(stds)

    return std
