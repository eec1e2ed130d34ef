"""The sample capture: its mesh, its depth and its cameras agree, and its ray tracer obeys the laws of light."""

import json
import math

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from viewmesh.errors import InputError, OptionError
from viewmesh.geometry.camera import canonical6, fibonacci_sphere
from viewmesh.sample import bounce, capture, light, marching, tracer
from viewmesh.sample.capture import photograph, write_sample
from viewmesh.sample.fields import distances, grid_distances, world_axis
from viewmesh.sample.robot import AABB


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    steps = []
    write_sample(folder, size=64, samples=4, mesh_cells=160, progress=lambda *step, **_: steps.append(step))
    assert steps == [("sample", i, 39) for i in range(1, 40)]
    return folder


@pytest.fixture(scope="module")
def mesh(sample):
    return trimesh.load(sample / "mesh_gt.ply", process=False)


def frames(sample, listing):
    data = json.loads((sample / listing).read_text())
    return data, [(frame, (sample / listing).parent) for frame in data["frames"]]


LISTINGS = {"six/cameras.json": 6, "transforms_train.json": 24, "transforms_test.json": 8}


def test_the_mesh_is_one_watertight_body_turned_outwards(mesh):
    assert mesh.is_watertight
    assert mesh.is_winding_consistent
    assert mesh.volume > 0.05
    assert mesh.body_count == 1  # neither a second part nor a cavity
    assert len(np.unique(mesh.vertices, axis=0)) == len(mesh.vertices)  # welded


def test_the_mesh_fills_the_stated_box_centred_with_longest_side_one(mesh):
    np.testing.assert_allclose(mesh.bounds, AABB, atol=5e-4)
    np.testing.assert_allclose(np.mean(AABB, axis=0), 0, atol=1e-12)
    assert np.ptp(AABB, axis=0).max() == pytest.approx(1.0)


def test_vertices_lie_on_the_field_and_normals_point_up_its_slope(mesh):
    away = np.abs(distances(mesh.vertices))
    assert np.mean(away < 1e-4) > 0.995
    outside = distances(mesh.triangles_center + 0.004 * mesh.face_normals)
    assert np.mean(outside > 0.001) > 0.99


@pytest.mark.parametrize("inside", range(1, 255))
def test_triangles_of_a_cell_are_bounded_by_its_faces(inside):
    """Within a cell every edge is shared by two triangles, but those that lie on the cell's faces."""
    table, count = marching.triangle_table()
    directed = [
        (t[i], t[(i + 1) % 3]) for t in table[inside, : count[inside]].tolist() for i in range(3)
    ]  # every edge in the sense of its triangle
    assert len(set(directed)) == len(directed)
    open_edges = [(a, b) for a, b in directed if (b, a) not in directed]
    assert all(marching._on_one_face(a, b) for a, b in open_edges)
    # each edge of the cell that changes sign is entered once and left once by the surface's rim
    crossing = {i for i, (c, axis) in enumerate(marching.EDGES) if (inside >> c ^ inside >> (c | 1 << axis)) & 1}
    assert sorted(a for a, _ in open_edges) == sorted(crossing) == sorted(b for _, b in open_edges)


def test_the_coarse_blocks_of_the_grid_hide_no_surface():
    axis = world_axis(48)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    exact = distances(points).reshape((49,) * 3)
    grid = grid_distances(axis)
    assert ((grid < 0) == (exact < 0)).all()
    near = np.abs(exact) < 0.02
    np.testing.assert_array_equal(grid[near], exact[near])
    assert (np.abs(grid) <= np.abs(exact) + 0.02).all()  # far values are bounds


@pytest.mark.parametrize("listing", LISTINGS)
def test_files_follow_the_conventions(sample, listing):
    data, entries = frames(sample, listing)
    assert len(entries) == LISTINGS[listing]
    assert (data["w"], data["h"], data["cx"], data["cy"]) == (64, 64, 32, 32)
    assert data["fl_x"] == data["fl_y"] == pytest.approx(32 / math.tan(math.radians(20)))
    assert data["camera_angle_x"] == pytest.approx(math.radians(40))
    assert data["depth_unit_scale"] == 1 / 16384
    for frame, folder in entries:
        pose = np.array(frame["transform_matrix"])
        np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-12)
        np.testing.assert_allclose(pose[:3, 3], 2.2 * pose[:3, 2], atol=1e-12)  # looks at the origin
        rgba = np.array(Image.open(folder / frame["file_path"]))
        depth = np.array(Image.open(folder / frame["depth_path"]))
        assert rgba.shape == (64, 64, 4)
        assert rgba.dtype == np.uint8
        assert depth.dtype == np.uint16
        assert (rgba[rgba[..., 3] == 0] == 0).all()
        assert (rgba[depth > 0, 3] > 0).all()
        assert (depth[rgba[..., 3] == 255] > 0).all()
        assert 0.05 < (depth > 0).mean() < 0.4
        z = depth[depth > 0] / 16384
        assert 2.2 - 0.87 < z.min() < z.max() < 2.2 + 0.87
        if frame["mask_path"]:
            np.testing.assert_array_equal(np.array(Image.open(folder / frame["mask_path"])), rgba[..., 3])


def test_the_six_views_are_the_canonical_rig(sample):
    data, entries = frames(sample, "six/cameras.json")
    assert data["rig"] == "canonical6"
    poses = np.array([frame["transform_matrix"] for frame, _ in entries])
    np.testing.assert_allclose(poses, canonical6(64, 64).world_from_camera, atol=1e-12)
    assert [frame["name"] for frame, _ in entries] == ["front", "right", "back", "left", "top", "bottom"]


def test_no_test_camera_is_near_a_training_camera():
    train, test = fibonacci_sphere(24), fibonacci_sphere(8, capture.test_turn_rad())
    nearest = torch.rad2deg(torch.acos((test @ train.T).max()))
    assert nearest > 12


@pytest.mark.parametrize("i", range(6))
def test_depth_agrees_with_the_mesh(i, mesh):
    """Vertices that the depth image says are visible project onto its surface."""
    size = 256
    cameras = canonical6(size, size)[i]
    _, depth = photograph(cameras, samples=1)
    points = torch.tensor(np.asarray(mesh.vertices))
    (pixels,), (z,) = cameras.project(points)
    facing = (torch.tensor(np.asarray(mesh.vertex_normals)) * (cameras.centers[0] - points)).sum(-1) > 0.6 * 2.2
    column, row = (pixels.numpy() - 0.5).T  # in units of pixel centres
    c, r = np.floor(column).astype(int), np.floor(row).astype(int)
    u, v = column - c, row - r
    four = np.stack([depth[r, c], depth[r, c + 1], depth[r + 1, c], depth[r + 1, c + 1]])
    weight = np.stack([(1 - u) * (1 - v), u * (1 - v), (1 - u) * v, u * v])
    smooth = (four.min(0) > 0) & (np.ptp(four, axis=0) < 0.006)  # no edge between the four pixels
    error = (weight * four).sum(0) - z.numpy()
    visible = smooth & facing.numpy() & (error > -0.03)  # further ones lie behind something
    assert visible.sum() > 1000
    assert np.mean(np.abs(error[visible]) < 0.002) > 0.99


def test_the_same_call_gives_the_same_files(sample, tmp_path):
    write_sample(tmp_path, size=64, samples=4, parts=("six",))
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 6 * 3 + 2
    for file in files:
        assert (tmp_path / file).read_bytes() == (sample / file).read_bytes()


def test_depth_points_lie_on_the_field():
    camera = canonical6(96, 96)[3]
    depth = torch.tensor(photograph(camera, samples=1)[1])
    points = camera.unproject(depth[None])[0][depth > 0].numpy()
    assert len(points) > 500
    assert np.abs(distances(points)).max() < 1e-4


def linear_view(samples: int, size: int = 40) -> np.ndarray:
    camera = canonical6(size, size)[0]
    rgba, depth = np.zeros((size, size, 4)), np.zeros((size, size))
    pose = camera.world_from_camera[0].numpy()
    tracer.photograph(bounce.studio(), pose, float(camera.fx[0]), size, samples, 7, range(size), rgba, depth)
    return rgba


def test_more_samples_only_take_noise_away():
    """Few and many samples agree on average, so the estimator's mean does not depend on their number."""
    few, many = linear_view(25), linear_view(800)
    solid = many[..., 3] > 0
    np.testing.assert_array_equal(few[..., 3], many[..., 3])
    assert few[solid][:, :3].mean() == pytest.approx(many[solid][:, :3].mean(), rel=0.02)
    assert np.abs(few - many)[solid].mean() > 1e-3  # they are different samples


def test_light_samples_have_the_density_they_claim():
    """The mean of 1 / density over samples is the sphere's solid angle; a lookup gives the same density."""
    table = light.sampling_table()
    generator = np.random.default_rng(0)
    uv = generator.random((20000, 2))
    drawn = np.array([light.sample(table, u, v) for u, v in uv])
    np.testing.assert_allclose(np.linalg.norm(drawn[:, :3], axis=1), 1, atol=1e-12)
    assert np.mean(1 / drawn[:, 3]) == pytest.approx(4 * math.pi, rel=0.02)
    looked_up = np.array([light.density(table, *direction) for direction in drawn[:, :3]])
    assert np.mean(np.isclose(looked_up, drawn[:, 3], rtol=1e-6)) > 0.999
    brightness = np.array([sum(light.radiance(*direction)) for direction in drawn[:, :3]])
    uniform = generator.normal(size=(20000, 3))
    uniform /= np.linalg.norm(uniform, axis=1, keepdims=True)
    expected = 4 * math.pi * np.mean([sum(light.radiance(*direction)) for direction in uniform])
    assert np.mean(brightness / drawn[:, 3]) == pytest.approx(expected, rel=0.03)


def test_bounced_light_stays_below_what_the_studio_shines():
    glow = bounce.studio().glow
    brightest = light.panorama(64, 128).max()
    assert glow.min() >= 0
    assert 0 < glow.max() < brightest
    assert glow[:2].max() == 0  # nothing glows away from the robot


def test_refusals_say_what_would_be_right(tmp_path):
    file = tmp_path / "taken"
    file.write_text("")
    with pytest.raises(InputError, match="taken: is a file"):
        write_sample(file)
    with pytest.raises(OptionError, match="between 16 and 4096"):
        write_sample(tmp_path / "new", size=4)
    with pytest.raises(OptionError, match="no part 'seven'"):
        write_sample(tmp_path / "new", parts=("seven",))
    assert not (tmp_path / "new").exists()
