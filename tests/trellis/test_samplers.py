"""The sampler: its schedule's exact numbers, its guidance formulas, an equation it must solve."""

import pytest
import torch

from viewmesh.errors import Cancelled
from viewmesh.trellis.samplers import SamplerOptions, guide, guided_evaluations, sample, sparse_std, timesteps


def test_the_schedule_meets_the_guidance_bounds_exactly():
    assert timesteps(12, 3.0)[9] == 0.5
    assert timesteps(12, 3.0)[8] == 0.6
    # steps, rescale_t, interval: evaluations with guidance
    published = [
        (25, 3.0, (0.5, 1.0), 19),
        (12, 3.0, (0.5, 1.0), 10),
        (30, 5.0, (0.6, 1.0), 24),
        (12, 3.0, (0.6, 1.0), 9),
    ]
    for steps, rescale_t, interval, count in published:
        assert guided_evaluations(SamplerOptions(steps, 3.0, interval, rescale_t)) == count


def test_a_straight_flow_is_integrated_exactly():
    """x(t) = (1 - t) a + t b has the constant velocity b - a."""
    a, b = torch.randn(2, 1, 4, dtype=torch.float64)
    velocity = lambda x, t, *, guided, step: (b - a, b - a if guided else None)  # noqa: E731
    torch.testing.assert_close(sample(velocity, b, SamplerOptions(7)), a)


def test_the_two_formulas_are_one_strength_apart():
    x, positive, negative = torch.randn(3, 2, 5, dtype=torch.float64)
    std = lambda v: v.std(1, keepdim=True)  # noqa: E731
    trellis = guide(x, 0.7, positive, negative, SamplerOptions(strength=7.5), std)
    other = guide(x, 0.7, positive, negative, SamplerOptions(strength=8.5, formula="reconviagen"), std)
    torch.testing.assert_close(trellis, other)


def test_full_rescaling_gives_the_estimate_the_positive_ones_deviation():
    x, positive, negative = torch.randn(3, 2, 50, dtype=torch.float64)
    options = SamplerOptions(strength=5, formula="reconviagen", rescale=1.0)
    std = lambda v: v.std(1, keepdim=True)  # noqa: E731
    v = guide(x, 0.7, positive, negative, options, std)
    s = options.sigma_min
    sigma = s + (1 - s) * 0.7
    torch.testing.assert_close(std((1 - s) * x - sigma * v), std((1 - s) * x - sigma * positive))


def test_sparse_deviation_is_per_item():
    x = torch.randn(10, 3, dtype=torch.float64)
    std = sparse_std((4, 6))(x)
    torch.testing.assert_close(std[:4], x[:4].std(correction=0).expand(4, 1))
    torch.testing.assert_close(std[4:], x[4:].std(correction=0).expand(6, 1))


def test_progress_and_cancelling_are_per_step():
    seen = []
    velocity = lambda x, t, *, guided, step: (x, x if guided else None)  # noqa: E731
    with pytest.raises(Cancelled):
        sample(
            velocity,
            torch.zeros(1, 1),
            SamplerOptions(9),
            progress=lambda stage, step, steps, **_: seen.append((step, steps)),
            cancelled=lambda: len(seen) == 4,
        )
    assert seen == [(i, 9) for i in (1, 2, 3, 4)]
