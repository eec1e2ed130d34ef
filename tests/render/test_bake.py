import torch

from viewmesh.render.bake import dilate, sample_at, texel_map


def grid_mesh(n: int, seed: int):
    """A jittered triangulated square in the middle of UV space, with 3D positions an affine map of uv."""
    g = torch.Generator().manual_seed(seed)
    t = torch.linspace(0.2, 0.8, n)
    uv = torch.stack(torch.meshgrid(t, t, indexing="xy"), -1)
    uv[1:-1, 1:-1] += (torch.rand(n - 2, n - 2, 2, generator=g) - 0.5) * 0.3 / n
    i = torch.arange(n * n).view(n, n)
    a, b, c, d = (x.reshape(-1) for x in (i[:-1, :-1], i[:-1, 1:], i[1:, 1:], i[1:, :-1]))
    return uv.view(-1, 2), torch.cat([torch.stack([a, b, c], 1), torch.stack([a, c, d], 1)])


def test_a_chart_is_covered_once_and_shows_the_right_points():
    uv, faces = grid_mesh(9, 0)
    size = 64
    texels = texel_map(uv, faces, size)
    at = sample_at(texels, uv.double(), faces)
    rows, cols = torch.nonzero(texels.inside, as_tuple=True)
    assert abs(len(rows) / size**2 - 0.36) < 0.02
    centre = torch.stack([cols, rows], 1) + 0.5
    assert torch.allclose(at[rows, cols] * size, centre.double(), atol=1e-3)
    assert bool((texels.barycentric >= 0).all())
    assert torch.allclose(texels.barycentric[texels.valid].sum(-1), torch.ones(int(texels.valid.sum())))
    assert bool((texels.face[~texels.valid] == -1).all())


def test_bilinear_lookups_anywhere_inside_see_only_the_surface():
    uv, faces = grid_mesh(9, 1)
    size = 64
    values = torch.cat([uv * 3 - 1, uv.prod(-1, keepdim=True)], 1)[:, :2]  # affine in uv: bilinear lookups are exact
    texels = texel_map(uv, faces, size)
    image = sample_at(texels, values, faces)
    g = torch.Generator().manual_seed(0)
    face = torch.randint(len(faces), (4000,), generator=g)
    w = torch.rand(4000, 3, generator=g)
    w = w / w.sum(1, keepdim=True)
    at = (uv[faces[face]] * w[..., None]).sum(1)
    truth = (values[faces[face]] * w[..., None]).sum(1)
    seen = torch.nn.functional.grid_sample(image.permute(2, 0, 1)[None], (at * 2 - 1)[None, None], align_corners=False)[
        0, :, 0
    ].T
    # the border repeats the nearest surface point, so at most one texel's worth of slope is lost at the rim
    assert float((seen - truth).abs().max()) < 1.5 * 3 / size
    inner = ((at - 0.5).abs() < 0.3 - 1.5 / size).all(1)
    assert float((seen - truth)[inner].abs().max()) < 1e-4


def test_dilation_fills_everything_and_touches_nothing_valid():
    g = torch.Generator().manual_seed(0)
    image = torch.rand(48, 64, 3, generator=g)
    valid = torch.zeros(48, 64, dtype=torch.bool)
    valid[10:20, 12:30] = True
    valid[30:40, 40:50] = True
    out = dilate(image, valid, 4)
    assert torch.equal(out[valid], image[valid])
    assert torch.equal(out[9, 12:30], image[10, 12:30])  # the nearest
    assert torch.equal(out[20:24, 20], image[19, 20].expand(4, 3))
    low, high = image[valid].amin(0), image[valid].amax(0)
    assert bool((out >= low - 1e-5).all())
    assert bool((out <= high + 1e-5).all())


def test_dilation_of_one_colour_is_that_colour_at_every_mip():
    color = torch.tensor([0.2, 0.5, 0.7])
    valid = torch.zeros(64, 64, dtype=torch.bool)
    valid[5, 9] = valid[40:44, 30] = True
    out = dilate(torch.where(valid[..., None], color, torch.zeros(3)), valid)
    assert torch.allclose(out, color.expand(64, 64, 3), atol=1e-5)


def test_nothing_valid_or_everything_valid_is_left_alone():
    image = torch.rand(8, 8, 3)
    assert dilate(image, torch.zeros(8, 8, dtype=torch.bool)) is image
    assert dilate(image, torch.ones(8, 8, dtype=torch.bool)) is image
