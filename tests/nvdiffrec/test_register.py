"""Laws of registration: the grid of rotations is even, poses compose, a moved mesh is found again."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import synthetic_views as synthetic
import torch
import trimesh

from viewmesh.errors import Cancelled, InputError
from viewmesh.geometry.camera import similarity_scale
from viewmesh.geometry.mesh import Mesh
from viewmesh.nvdiffrec.register import Plan, Registration, register
from viewmesh.nvdiffrec.register_align import Agreement, Aligner, moved
from viewmesh.nvdiffrec.register_proxy import proxy_of, sights_of
from viewmesh.nvdiffrec.register_search import angle_between, correlation, rotation_matrices, search, super_fibonacci
from viewmesh.progress import never
from viewmesh.render.rasterizer import get_rasterizer
from viewmesh.render.shading import srgb_to_linear
from viewmesh.views.viewset import ViewSet

QUICK = Plan(
    rotations=512, candidates=4, coarse_steps=4, finalists=2, fine_views=6, fine_size=64, fine_steps=5, polish_views=8,
    polish_size=64, polish_steps=4,
)  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_rotations(count: int) -> torch.Tensor:
    q = torch.randn(count, 4, generator=generator(), dtype=torch.float64)
    return rotation_matrices(torch.nn.functional.normalize(q, dim=-1))


def test_the_grid_of_rotations_leaves_no_gap():
    grid = super_fibonacci(1536)
    torch.testing.assert_close(grid @ grid.mT, torch.eye(3, dtype=torch.float64).expand(1536, 3, 3))
    nearest = angle_between(random_rotations(500)[:, None], grid[None]).amin(1)
    assert float(nearest.max()) < math.radians(20)


def test_a_move_is_about_the_meshs_centre():
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = 1.3 * random_rotations(1)[0]
    pose[:3, 3] = torch.tensor([0.1, -0.2, 0.3])
    center = torch.tensor([0.5, 0.2, -0.1], dtype=torch.float64)
    twists = torch.tensor([[0.1, -0.2, 0.3, 0, 0, 0, 0], [0, 0, 0, 0.5, 0, -0.25, 0], [0, 0, 0, 0, 0, 0, 0.2]]).double()
    turned, shifted, scaled = moved(pose, twists, center, 2.0)
    at = lambda m: m[:3, :3] @ center + m[:3, 3]  # noqa: E731
    torch.testing.assert_close(at(turned), at(pose))
    torch.testing.assert_close(at(scaled), at(pose))
    torch.testing.assert_close(at(shifted) - at(pose), torch.tensor([1.0, 0, -0.5], dtype=torch.float64))
    angle = angle_between(turned[:3, :3] / similarity_scale(turned), pose[:3, :3] / 1.3)
    assert float(angle) == pytest.approx(math.sqrt(0.14))
    assert float(similarity_scale(scaled)) == pytest.approx(1.3 * math.exp(0.2))


def test_correlation_is_blind_to_gain_and_tint():
    g = generator()
    ours, where = torch.rand(1, 2, 50, 3, generator=g), torch.rand(1, 2, 50, generator=g) > 0.3
    assert float(correlation(ours, 0.4 * ours[0] + torch.tensor([0.1, 0.2, 0.3]), where)) == pytest.approx(1, abs=1e-4)
    assert float(correlation(ours, -ours[0], where)) == pytest.approx(-1, abs=1e-4)
    noise = torch.where(where[..., None], ours, 7.0)  # what is not compared has no say
    assert float(correlation(noise, ours[0], where)) == pytest.approx(1, abs=1e-4)


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    """The synthetic object in its scene frame, coloured as the views show it."""
    ball = trimesh.creation.icosphere(subdivisions=4, radius=synthetic.BALL_RADIUS)
    ball.apply_translation(synthetic.BALL_CENTER)
    box = trimesh.creation.box(bounds=[synthetic.BOX_LOW, synthetic.BOX_HIGH]).subdivide().subdivide().subdivide()
    both = trimesh.util.concatenate([ball, box])
    vertices = torch.from_numpy(np.array(both.vertices, np.float32))
    colors = srgb_to_linear(torch.from_numpy(synthetic.texture(vertices.numpy())).float() / 255)
    return Mesh(vertices, torch.from_numpy(np.array(both.faces, np.int64)), colors)


@pytest.mark.parametrize("depth", [False, True])
def test_a_moved_mesh_is_found(mesh: Mesh, depth: bool):
    views = synthetic.viewset(synthetic.around(8), depth=depth)
    there = torch.eye(4, dtype=torch.float64)
    there[:3, :3] = 0.8 * random_rotations(3)[2]
    there[:3, 3] = torch.tensor([0.1, -0.15, 0.05])
    told = []
    found = register(
        mesh.transformed(there), views, generator(), plan=QUICK, progress=lambda _, step, of: told.append((step, of))
    )
    left = found.scene_from_mesh @ there  # the identity if all went well
    scale = float(similarity_scale(left))
    assert math.degrees(float(angle_between(left[:3, :3] / scale, torch.eye(3, dtype=torch.float64)))) < 2
    assert abs(scale - 1) < 0.02
    assert float(left[:3, 3].norm()) < 0.02
    assert found.good
    assert found.silhouette_iou > 0.95
    assert (found.depth_error is not None) == depth
    assert told == sorted(told)
    assert told[-1] == (100, 100)


def agreement_in_place(mesh: Mesh, views: ViewSet) -> Agreement:
    """Of a mesh that lies where the views show it."""
    cpu = torch.device("cpu")
    aligner = Aligner(proxy_of(mesh, generator(), cpu), sights_of(views, 4, 64, cpu), get_rasterizer("cpu"), 1.0)
    return aligner.agreement(torch.eye(4, dtype=torch.float64))


def test_cameras_with_long_lenses_see_the_mesh(mesh: Mesh):
    """From forty scene units away."""
    views = synthetic.viewset(synthetic.around(4, 40.0), f=96 * 40 / 2.2, depth=True)
    found = agreement_in_place(mesh, views)
    assert found.iou > 0.97
    assert found.depth is not None
    assert found.depth < 0.01


def test_a_photo_that_cuts_the_object_says_nothing_of_the_rest(mesh: Mesh):
    views = synthetic.cut_off(synthetic.viewset(synthetic.around(4), depth=True), 30)
    assert agreement_in_place(mesh, views).iou > 0.97
    proxy, sights = proxy_of(mesh, generator(), torch.device("cpu")), sights_of(views, 4, 40, torch.device("cpu"))
    found = search(proxy, sights, torch.eye(3)[None], lambda share: None, never)
    assert float(found.score) > 0.8
    assert float(found.scale) == pytest.approx(1, abs=0.1)
    assert float((found.position - proxy.center).norm()) < 0.05


def test_nothing_to_register_with_is_a_sentence():
    cube = Mesh(torch.rand(4, 3), torch.tensor([[0, 1, 2], [0, 2, 3]]))
    views = synthetic.viewset(synthetic.around(4))
    with pytest.raises(InputError, match="no cameras"):
        register(cube, replace(views, cameras=None), generator())
    with pytest.raises(InputError, match="no masks"):
        register(cube, replace(views, mask_source="none"), generator())
    with pytest.raises(Cancelled):
        register(cube, views, generator(), cancelled=lambda: True)


def test_it_survives_json():
    found = Registration(torch.eye(4, dtype=torch.float64), 1.0, 0.9, None, 0.01)
    again = Registration.from_json(json.loads(json.dumps(found.json())))
    assert torch.equal(again.scene_from_mesh, found.scene_from_mesh)
    assert (again.scale, again.silhouette_iou, again.color_correlation, again.depth_error) == (1.0, 0.9, None, 0.01)
