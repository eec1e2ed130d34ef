"""Crops around the object: a crop's camera sees in the crop what the view's camera sees in the view."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import synthetic_views as synthetic
import torch
from tiny import TINY

from viewmesh.errors import InputError
from viewmesh.nvdiffrec.rendering import Picture
from viewmesh.nvdiffrec.shape_pass import image_loss
from viewmesh.nvdiffrec.targets import crop_to_object
from viewmesh.render.shading import srgb_to_linear
from viewmesh.views.viewset import ViewSet


@pytest.fixture(scope="module")
def views() -> ViewSet:
    return synthetic.viewset(synthetic.around(5), size=96, f=110.0, depth=True)


@pytest.mark.parametrize("size", [40, 64, 150])
def test_crop_cameras_project_to_the_same_content(views: ViewSet, size: int):
    """The crop's depth, unprojected by the crop's camera, lies on the object; so does its mask project onto it."""
    targets = crop_to_object(views, size, "cpu")
    assert targets.depths is not None
    assert (targets.cameras.height, targets.cameras.width) == (size, size)
    pixel = 2 * 2.2 / float(targets.cameras.fx.min()) + 2 * 2.2 / 110  # of crop and of view, scene units
    for n in range(len(targets)):
        depth = targets.depths[n]
        points = targets.cameras[n].unproject(depth[None])[0][depth > 0]
        assert len(points) > 0.2 * size**2  # the object fills the crop
        assert float(synthetic.signed_distance(points).abs().quantile(0.95)) < pixel
        pixels, _ = targets.cameras[n].project(synthetic.surface_points(2000).float())
        col, row = pixels[0].floor().long().unbind(-1)
        assert bool((col >= 0).all() & (col < size).all() & (row >= 0).all() & (row < size).all())
        alpha = targets.images[n, ..., 3].float() / 255
        wide = torch.nn.functional.max_pool2d(alpha[None], 5, 1, 2)[0]
        assert bool((wide[row, col] > 0.5).all())


def test_a_crop_that_is_the_whole_view_changes_nothing(views: ViewSet):
    full = ViewSet(views.names, views.images.clone(), views.cameras, views.depths)
    full.images[..., 3] = 255
    targets = crop_to_object(full, 96, "cpu")
    assert torch.equal(targets.images, full.images)
    assert full.depths is not None
    assert targets.depths is not None
    assert torch.equal(targets.depths, full.depths)
    assert full.cameras is not None
    assert torch.equal(targets.cameras.cx, full.cameras.cx)
    assert torch.equal(targets.cameras.fy, full.cameras.fy)


@pytest.mark.parametrize("size", [30, 64, 96, 150])
def test_what_a_crop_knows_comes_from_the_photo_alone(views: ViewSet, size: int):
    whole = crop_to_object(views, size, "cpu")
    assert whole.known is None
    assert whole.batch(torch.tensor([0])).known is None
    photos = synthetic.cut_off(replace(views, images=views.images.clone()), 44)
    photos.images[..., 3] = 255
    targets = crop_to_object(photos, size, "cpu")
    known, scale = targets.known, size / views.height
    assert known is not None
    assert bool((targets.images[..., 3][known] == 255).all())  # none of the nothing outside was mixed in
    share = known.float().mean((1, 2)) * size
    assert bool((share <= photos.width * scale + 1).all() & (share >= photos.width * scale - 4).all())
    batch = targets.batch(torch.tensor([3, 1]))
    assert batch.known is not None
    assert torch.equal(batch.known[..., 0], known[[3, 1]])


@pytest.mark.parametrize("size", [30, 96])
def test_photos_on_a_larger_canvas_are_the_same_targets(views: ViewSet, size: int):
    """What a smaller photo has no pixel of is what a crop has beyond a photo's edge."""
    alone, padded = (
        crop_to_object(made(views, 44), size, "cpu", margin=0.0) for made in (synthetic.cut_off, synthetic.blanked)
    )
    assert alone.known is not None
    assert padded.known is not None
    assert float((alone.known != padded.known).float().mean()) < 0.02
    both = alone.known & padded.known
    assert torch.equal(alone.images[both], padded.images[both])


def test_what_is_drawn_outside_the_photos_costs_nothing(views: ViewSet):
    problem = SimpleNamespace(preset=TINY, device=torch.device("cpu"))
    targets = crop_to_object(synthetic.cut_off(replace(views, depths=None), 44), 40, "cpu")
    batch = targets.batch(torch.arange(5))
    assert batch.known is not None
    g = torch.Generator().manual_seed(0)
    drawn = torch.rand(5, 40, 40, 4, generator=g)

    def loss(values: torch.Tensor) -> torch.Tensor:
        image = Picture(*values.split((3, 1), -1), torch.zeros(5, 40, 40))
        return image_loss(problem, {}, image, batch, torch.Generator().manual_seed(1))

    leaf = drawn.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    assert bool((gradient * ~batch.known == 0).all())
    assert bool((gradient != 0)[batch.known[..., 0]].all())
    other = torch.where(batch.known, drawn, torch.rand(drawn.shape, generator=g))
    assert float(loss(other)) == float(loss(drawn))


def test_an_empty_mask_keeps_the_whole_view(views: ViewSet):
    blank = ViewSet(views.names, views.images.clone(), views.cameras)
    blank.images[..., 3] = 0
    targets = crop_to_object(blank, 48, "cpu")
    assert views.cameras is not None
    torch.testing.assert_close(targets.cameras.fx, views.cameras.fx / 2)
    assert int(targets.images[..., 3].max()) == 0


def test_depth_is_never_mixed(views: ViewSet):
    targets = crop_to_object(views, 37, "cpu")
    assert views.depths is not None
    assert targets.depths is not None
    assert torch.isin(targets.depths, views.depths).all()


def test_shrinking_keeps_the_light_of_an_image():
    """A checkerboard of black and white halves to the grey of half the light, not of half the sRGB value."""
    views = synthetic.viewset(synthetic.around(1), size=64)
    images = torch.full((1, 64, 64, 4), 255, dtype=torch.uint8)
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2
    images[0, ..., :3] = (board * 255)[..., None].to(torch.uint8)
    grey = crop_to_object(ViewSet(views.names, images, views.cameras), 16, "cpu").images[0, 4:-4, 4:-4, :3]
    torch.testing.assert_close(srgb_to_linear(grey.float() / 255), torch.full((8, 8, 3), 0.5), atol=0.02, rtol=0)


def test_a_transparent_neighbour_does_not_bleed_its_colour():
    views = synthetic.viewset(synthetic.around(1), size=64)
    images = torch.zeros(1, 64, 64, 4, dtype=torch.uint8)
    images[0, ..., 0] = 255  # red where nothing is
    images[0, 8:-8, 8:-8] = torch.tensor([0, 200, 0, 255], dtype=torch.uint8)
    batch = crop_to_object(ViewSet(views.names, images, views.cameras), 23, "cpu").batch(torch.tensor([0]))
    assert float(batch.color[..., 0].max()) < 0.01
    assert (
        float((batch.color[..., 1] - batch.alpha[..., 0] * srgb_to_linear(torch.tensor(200 / 255))).abs().max()) < 0.02
    )


def test_a_batch_is_linear_and_premultiplied(views: ViewSet):
    targets = crop_to_object(views, 40, "cpu")
    index = torch.tensor([3, 0])
    batch = targets.batch(index)
    rgba = targets.images[index].double() / 255
    curve = torch.where(rgba[..., :3] <= 0.04045, rgba[..., :3] / 12.92, ((rgba[..., :3] + 0.055) / 1.055) ** 2.4)
    torch.testing.assert_close(batch.color.double(), curve * rgba[..., 3:], atol=1e-5, rtol=0)
    assert torch.equal(batch.index, index)
    assert torch.equal(batch.cameras.cx, targets.cameras.cx[index])


def test_views_without_cameras(views: ViewSet):
    with pytest.raises(InputError, match="no cameras"):
        crop_to_object(ViewSet(views.names, views.images, None), 32, "cpu")
