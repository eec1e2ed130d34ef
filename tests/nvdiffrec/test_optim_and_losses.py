"""Adam against torch's, and the losses against their definitions written out naively."""

import pytest
import torch

from viewmesh.nvdiffrec import losses
from viewmesh.nvdiffrec.optim import adam, zero_moments


def test_adam_is_torchs_adam():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 3, generator=generator)
    theirs = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([theirs], lr=0.1, betas=(0.8, 0.95))
    ours = {"x": start.clone()}
    moments = zero_moments(ours)
    for _ in range(7):
        gradient = torch.randn(5, 3, generator=generator)
        theirs.grad = gradient.clone()
        optimiser.step()
        moments = adam(ours, {"x": gradient}, moments, {"x": 0.1}, betas=(0.8, 0.95))
    torch.testing.assert_close(ours["x"], theirs.detach())
    assert moments.count == 7


def test_adam_leaves_alone_what_has_no_gradient():
    ours = {"x": torch.ones(2), "y": torch.ones(2)}
    adam(ours, {"x": torch.ones(2), "y": None}, zero_moments(ours), {"x": 0.1, "y": 0.1})
    assert torch.equal(ours["y"], torch.ones(2))
    assert float(ours["x"][0]) == pytest.approx(0.9)


def test_laplacian_of_a_path():
    # offsets 0, 1, 5 on a path of three vertices: neighbours' means are 1, 2.5, 1
    offsets = torch.tensor([[0.0], [1.0], [5.0]])
    value = losses.laplacian(offsets, torch.tensor([[0, 1], [1, 2]]), torch.tensor([[1.0], [2.0], [1.0]]))
    assert float(value) == pytest.approx((1.0**2 + 1.5**2 + 4.0**2) / 3)


def test_field_smoothness_is_zero_for_linear_fields_only():
    x, y, z = torch.meshgrid(*(torch.arange(6.0),) * 3, indexing="ij")
    plane = lambda x, y, z: 0.3 * x - 0.2 * y + 0.1 * z - 0.5  # noqa: E731
    corner, center = plane(x, y, z), plane(x + 0.5, y + 0.5, z + 0.5)[:5, :5, :5]
    assert float(losses.field_smoothness(corner, center, band=1.0)) == pytest.approx(0, abs=1e-10)
    bumped = corner.clone()
    bumped[2, 2, 2] += 0.4
    assert float(losses.field_smoothness(bumped, center, band=10.0)) > 1e-4


def test_sign_entropy_is_the_cross_entropy_of_crossing_edges_with_their_other_end():
    field = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    number = torch.arange(field.numel()).reshape(field.shape)
    edges = [torch.stack([number.narrow(k, 0, n - 1), number.narrow(k, 1, n - 1)], -1).reshape(-1, 2)
             for k, n in enumerate(field.shape)]  # fmt: skip
    edges = torch.cat(edges)
    a, b = field.flatten()[edges].unbind(1)
    crossing = (a < 0) != (b < 0)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    a, b = a[crossing], b[crossing]
    naive = bce(a, (b > 0).to(a)) + bce(b, (a > 0).to(b))
    ours = losses.sign_entropy(field, losses.box_crossings(field))
    torch.testing.assert_close(ours, naive)
    torch.testing.assert_close(*(torch.autograd.grad(value, field)[0] for value in (ours, naive)))
    flat = field.detach().flatten()
    assert torch.equal(losses.crossings_of(flat, edges), losses.box_crossings(field.detach()).flatten())
    assert float(losses.sign_entropy(torch.ones(3), torch.zeros(3))) == 0


def test_box_smoothness_is_the_mean_square_of_the_laplacian_near_the_surface():
    field = torch.randn(5, 6, 7, generator=torch.Generator().manual_seed(0))
    squares = []
    for x in range(1, 4):
        for y in range(1, 5):
            for z in range(1, 6):
                steps = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
                around = sum(float(field[x + i, y + j, z + k]) for i, j, k in steps) / 6
                if abs(float(field[x, y, z])) < 0.5:
                    squares.append((around - float(field[x, y, z])) ** 2)
    assert float(losses.box_smoothness(field, band=0.5)) == pytest.approx(sum(squares) / len(squares), rel=1e-5)


def test_box_smoothness_has_the_gradient_of_its_value():
    field = torch.randn(4, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: losses.box_smoothness(f, band=10.0), field)


def test_depth_counts_only_what_both_know():
    ours = torch.tensor([[1.0, 0.0, 2.0, 3.0]])
    theirs = torch.tensor([[1.02, 5.0, 0.0, 9.0]])
    assert float(losses.depth_l1(ours, theirs, limit=0.1)) == pytest.approx((0.02 + 0.1) / 2, abs=1e-6)
    assert float(losses.depth_l1(ours, torch.zeros(1, 4))) == 0


def test_mask_loss_ignores_overshoot_of_antialiasing():
    assert float(losses.mask_l2(torch.tensor([1.3, -0.2]), torch.tensor([1.0, 0.0]))) == 0


def test_image_loss_is_zero_only_for_equal_images():
    a = torch.rand(2, 4, 4, 3, generator=torch.Generator().manual_seed(1))
    assert float(losses.log_srgb_l1(a, a)) == 0
    assert float(losses.log_srgb_l1(a, a + 0.1)) > 0.01


def test_image_loss_has_the_gradient_of_its_value():
    image = torch.tensor([-0.5, 0.001, 0.003, 0.01, 0.5, 3.0, 90.0], dtype=torch.float64, requires_grad=True)
    target = torch.linspace(0.2, 1, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: losses.log_srgb_l1(x, target), image)


def test_neutral_light_costs_nothing():
    assert float(losses.neutral(torch.full((6, 2, 2, 3), 0.7))) == pytest.approx(0, abs=1e-7)
    assert float(losses.neutral(torch.tensor([1.0, 0.5, 0.0]))) == pytest.approx(1 / 3)


def test_psnr():
    assert float(losses.psnr(torch.zeros(4), torch.full((4,), 0.1))) == pytest.approx(20.0)
