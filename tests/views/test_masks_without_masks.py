"""GrabCut with and without poses, and the floor under an object, on photographs made here."""

import math

import numpy as np
import synthetic_views as synthetic
import torch

from viewmesh.geometry.camera import pinhole
from viewmesh.progress import never, silent
from viewmesh.views.floor import fit_floor
from viewmesh.views.grabcut import clean, from_border
from viewmesh.views.multiview_masks import Sparse, multiview_masks


def photos(n: int):
    poses = synthetic.ring(n)
    images = [synthetic.photograph(p, 200.0, 160, 120) for p in poses]
    truth = [synthetic.render(p, 200.0, 160, 120)[0][..., 3] > 0 for p in poses]
    return images, truth, pinhole(torch.from_numpy(poses), 2 * math.atan(60 / 200.0), 120, 160)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_one_photo_from_its_border():
    images, truth, _ = photos(3)
    for image, mask in zip(images, truth, strict=True):
        assert iou(from_border(image) > 127, mask) > 0.8


def test_posed_photos_find_the_object_together():
    images, truth, cameras = photos(6)
    masks = multiview_masks(images, None, cameras, None, silent, never)
    scores = [iou(m > 127, t) for m, t in zip(masks, truth, strict=True)]
    assert min(scores) > 0.85
    assert all(m.shape == (120, 160) and m.dtype == np.uint8 for m in masks)


def test_sparse_points_and_the_floor_are_seeds():
    images, truth, cameras = photos(6)
    rng = np.random.default_rng(0)
    on_object = synthetic.surface_points(200).numpy()
    on_object = on_object[on_object[:, 1] > -0.2]
    on_floor = np.stack([rng.uniform(-1, 1, 500), np.full(500, synthetic.BOX_LOW[1]), rng.uniform(-1, 1, 500)], -1)
    on_floor = on_floor[np.abs(on_floor[:, [0, 2]]).max(1) > 0.4]
    points = np.concatenate([on_object, on_floor])
    pixels, _ = cameras.project(torch.from_numpy(points))
    seen = np.array([(n, p) for n in range(6) for p in range(0, len(points), 3)])
    sparse = Sparse(points, seen, pixels.numpy()[seen[:, 0], seen[:, 1]])
    masks = multiview_masks(images, None, cameras, sparse, silent, never)
    assert min(iou(m > 127, t) for m, t in zip(masks, truth, strict=True)) > 0.8


def test_floor_is_found_and_points_up():
    rng = np.random.default_rng(1)
    floor = np.stack([rng.uniform(-2, 2, 600), rng.normal(-0.3, 0.002, 600), rng.uniform(-2, 2, 600)], -1)
    thing = rng.uniform(-0.2, 0.3, (300, 3))
    eyes = np.array([[0, 1, 2], [2, 1, 0], [0, 1.5, -2.0]])
    plane = fit_floor(np.concatenate([floor, thing]), eyes, np.array([0.2, 1.0, 0.1]), 0.01)
    assert plane is not None
    np.testing.assert_allclose(plane, [0, 1, 0, 0.3], atol=0.01)


def test_no_floor_under_a_cloud_or_a_ceiling():
    rng = np.random.default_rng(2)
    eyes, up = np.array([[0, 1, 2], [2, 1, 0]]), np.array([0.0, 1.0, 0.0])
    assert fit_floor(rng.uniform(-1, 1, (500, 3)), eyes, up, 0.01) is None
    flat = np.stack([rng.uniform(-2, 2, 400), np.full(400, 0.5), rng.uniform(-2, 2, 400)], -1)
    hanging = np.concatenate([flat, rng.uniform(-0.3, 0.3, (300, 3))])  # much lies below it
    assert fit_floor(hanging, eyes, up, 0.01) is None
    assert fit_floor(flat[:10], eyes, up, 0.01) is None


def test_clean_keeps_the_largest_part_and_fills_it():
    mask = np.zeros((60, 60), bool)
    mask[10:40, 10:40] = True
    mask[20:23, 20:23] = False
    mask[50:55, 50:55] = True
    expected = np.zeros((60, 60), bool)
    expected[10:40, 10:40] = True
    np.testing.assert_array_equal(clean(mask), expected)
