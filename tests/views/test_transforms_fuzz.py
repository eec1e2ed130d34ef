"""Any JSON as a camera file: a ViewSet or a ViewmeshError, never another exception."""

import copy
import json
import math

import pytest
import synthetic_views as synthetic
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from viewmesh.errors import ViewmeshError
from viewmesh.options import ViewRules
from viewmesh.views.load import load_views

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([0, -1, 1e-300, 1e300, 10**400, math.nan, math.inf, "views/view_01", "../x", "\ud800", "ray"])
)  # fmt: skip
ANYTHING = st.recursive(
    SCALARS, lambda x: st.lists(x, max_size=5) | st.dictionaries(st.text(max_size=5), x, max_size=4)
)
NEAR = st.floats(-3, 3) | st.sampled_from([0, 1, -1, 1e5, 1e-9])
KEYS = ["w", "h", "fl_x", "fl_y", "cx", "cy", "k1", "k2", "k3", "k4", "p1", "p2", "camera_angle_x", "camera_model",
        "aabb", "depth_unit_scale", "depth_kind", "frames", "applied_transform",
        "is_fisheye", "train_filenames"]  # fmt: skip
FRAME_KEYS = ["file_path", "transform_matrix", "mask_path", "depth_path", *KEYS[:14]]


@pytest.fixture(scope="module")
def good_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    top = synthetic.write_views(folder, synthetic.around(4), size=(32, 24), f=40.0, depth=True)
    return folder, top


def outcome(folder, cameras) -> None:
    text = cameras if isinstance(cameras, bytes) else json.dumps(cameras).encode()
    (folder / "cameras.json").write_bytes(text)
    try:
        views = load_views(folder, ViewRules(), max_size=24)
    except ViewmeshError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    assert views.cameras is not None
    assert torch.isfinite(views.world_from_scene).all()
    assert torch.isfinite(views.cameras.world_from_camera).all()
    assert torch.linalg.det(views.world_from_scene) > 0


COMMON = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@settings(COMMON, max_examples=60)
@given(cameras=ANYTHING | st.binary(max_size=40))
def test_any_json(good_set, cameras):
    outcome(good_set[0], cameras)


@settings(COMMON, max_examples=150)
@given(data=st.data())
def test_a_good_file_with_odd_values(good_set, data):
    folder, top = good_set
    cameras = copy.deepcopy(top)
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.sampled_from(["top", "frame", "pose"]))
        frame = data.draw(st.integers(0, 3))
        if where == "top":
            cameras[data.draw(st.sampled_from(KEYS))] = data.draw(ANYTHING | NEAR)
            if not isinstance(cameras["frames"], list) or cameras["frames"] != top["frames"]:
                break
        elif where == "frame":
            cameras["frames"][frame][data.draw(st.sampled_from(FRAME_KEYS))] = data.draw(ANYTHING | NEAR)
            break
        else:
            row, column = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
            cameras["frames"][frame]["transform_matrix"][row][column] = data.draw(SCALARS | NEAR)
    outcome(folder, cameras)
