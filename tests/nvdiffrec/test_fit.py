"""The optimiser on a ball and a box of 64 pixels: what it finds, that a state is a value, and what it refuses."""

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import safetensors.torch
import synthetic_views as synthetic
import tiny
import torch
from tiny import TINY, started

from viewmesh.errors import Cancelled, EmptyReconstruction, InputError, InvalidMesh, OutOfMemory
from viewmesh.geometry.camera import canonical6
from viewmesh.geometry.mesh import Mesh, TexturedMesh
from viewmesh.nvdiffrec import fit, memory
from viewmesh.nvdiffrec import match as gate
from viewmesh.nvdiffrec.fit import State, advance, finish, load, save
from viewmesh.nvdiffrec.match import Match, match
from viewmesh.nvdiffrec.problem import Problem
from viewmesh.nvdiffrec.rendering import _twist
from viewmesh.nvdiffrec.targets import crop_to_object
from viewmesh.views.viewset import ViewSet


@pytest.fixture(autouse=True, scope="module")
def coarse() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        tiny.coarse_field(patch)
        yield


@pytest.fixture(scope="module")
def views() -> ViewSet:
    return synthetic.viewset(synthetic.around(12))


@pytest.fixture(scope="module")
def heard() -> list[tuple[str, int, int]]:
    """What `whole` reported while it ran."""
    return []


@pytest.fixture(scope="module")
def whole(views: ViewSet, heard: list) -> State:
    """A fit that nobody stopped."""
    return advance(started(views), progress=lambda stage, step, steps, **metrics: heard.append((stage, step, steps)))[0]


@pytest.fixture(scope="module")
def mesh(whole: State) -> TexturedMesh:
    return finish(whole)


def tensors(state: State) -> dict[str, torch.Tensor]:
    named = {f"variables/{k}": v for k, v in state.variables.items()}
    named |= {f"first/{k}": v for k, v in state.moments.first.items()}
    named |= {f"second/{k}": v for k, v in state.moments.second.items()}
    if state.band is not None:
        named["band"] = state.band
    if state.cleaned is not None:
        dense, light = state.cleaned.dense, state.cleaned.light
        named |= {"dense": dense.vertices, "dense_faces": dense.faces, "light": light.vertices, "faces": light.faces}
    if state.surface is not None:
        named |= {f"surface/{k}": v for k, v in vars(state.surface).items()}
    if state.initial is not None:
        named |= {f"initial/{k}": v for k, v in fit._flat(state.initial).items()}
    return named


def assert_same(a: State, b: State) -> None:
    """Bit for bit."""
    assert (a.phase, a.step, a.seed, a.moments.count) == (b.phase, b.step, b.seed, b.moments.count)
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# what it finds


def test_the_object_is_recovered(views: ViewSet, mesh: TexturedMesh):
    mesh.validate()
    assert len(mesh.mesh.faces) <= TINY.target_faces
    assert tiny.held_out_iou(mesh) > 0.95
    assert tiny.chamfer(mesh.mesh.vertices, mesh.mesh.faces) < tiny.CELL / 4
    grey = replace(mesh, material=replace(mesh.material, base_color=torch.full_like(mesh.material.base_color, 0.4)))
    assert tiny.held_out_psnr(mesh) > tiny.held_out_psnr(grey) + 3


def test_a_start_that_is_too_big_shrinks_onto_the_object(views: ViewSet):
    state = started(views, numbers=replace(TINY, shape_steps=40))
    swollen = replace(state, variables={**state.variables, "sdf": state.variables["sdf"] - 0.7})
    before = tiny.chamfer(*swollen.problem.shape.final(swollen.variables))
    state, metrics = advance(swollen, steps=40)
    after = tiny.chamfer(*state.problem.shape.final(state.variables))
    assert after < before / 2
    assert metrics.keys() == {"loss", "psnr", "faces"}


def test_flexicubes_recovers_it_too(views: ViewSet):
    found = tiny.fitted(views, replace(TINY, surface="flexicubes"))
    assert tiny.held_out_iou(found) > 0.95
    assert tiny.chamfer(found.mesh.vertices, found.mesh.faces) < tiny.CELL / 4


def test_depth_helps_where_views_are_few():
    rig = canonical6(64, 64)
    chamfers = []
    for depth in (False, True):
        views = synthetic.viewset(rig.world_from_camera.numpy(), f=float(rig.fx[0]), depth=depth)
        found = tiny.fitted(views)
        chamfers.append(tiny.chamfer(found.mesh.vertices, found.mesh.faces))
    assert chamfers[1] < 0.6 * chamfers[0]


# a state is a value


def test_advance_leaves_the_given_state_as_it_was(views: ViewSet, whole: State):
    shape = started(views)
    texture = replace(whole, phase="texture", step=3)
    for state in (shape, texture):
        before = {name: t.clone() for name, t in tensors(state).items()}
        after, _ = advance(state, steps=2)
        assert all(torch.equal(t, before[name]) for name, t in tensors(state).items())
        assert not torch.equal(after.variables["light"], state.variables["light"])
        assert after.steps_done == state.steps_done + 2


STOPS = (7, 20, 23, 24, 25, 26, 27, 30, 35)  # in a band, on its border, around each step between the passes, texture


def test_slices_and_saved_states_go_on_bit_for_bit(views: ViewSet, whole: State, tmp_path):
    """Sliced: what slicing changes. Restored: what saving and loading changes. At every stop, not only at the end."""
    sliced = started(views)
    restored = started(views)
    assert STOPS[-1] == sliced.steps
    for n, stop in enumerate(STOPS):
        sliced, _ = advance(sliced, steps=stop - sliced.steps_done)
        restored, _ = advance(restored, steps=stop - restored.steps_done)
        save(restored, tmp_path / f"{n}.fit")
        restored = load(tmp_path / f"{n}.fit", views)
        assert sliced.steps_done == stop
        assert_same(restored, sliced)
    assert_same(sliced, whole)
    assert [p.name for p in sorted(tmp_path.iterdir())] == [f"{n}.fit" for n in range(len(STOPS))]
    assert torch.equal(finish(restored).mesh.vertices, finish(whole).mesh.vertices)


def test_single_steps_are_one_long_advance(views: ViewSet):
    single = started(views)
    for _ in range(5):
        single, _ = advance(single, steps=1)
    assert_same(single, advance(started(views), steps=5)[0])


def test_threads_change_nothing_from_run_to_run():
    """At a size at which torch spreads its sums over threads, in both passes."""
    large = synthetic.viewset(synthetic.around(4), size=256, f=384.0)
    numbers = replace(
        TINY, lattice=40, shape_size=224, texture_crop=256, texture_size=256, target_faces=3000, shape_steps=4,
        texture_steps=4,
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        start = started(large, numbers=numbers)
        shape = advance(start, steps=4)[0]
        assert_same(advance(start, steps=4)[0], shape)
        texture = advance(shape, steps=1)[0]
        assert_same(advance(texture)[0], advance(texture)[0])
    finally:
        torch.set_num_threads(threads)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_slice_ends_with_its_phase(views: ViewSet):
    """So a slice that dies in a step between the passes loses that step alone."""
    state, ends = started(views), []
    while not state.done:
        state, _ = advance(state, seconds=600)
        ends.append((state.phase, state.steps_done))
    assert ends == [("clean", 24), ("unwrap", 25), ("bake", 26), ("texture", 27), ("done", 35)]


@pytest.mark.parametrize("phase", fit.BETWEEN)
def test_the_steps_between_the_passes_are_stopped_in_their_midst(views: ViewSet, phase: str):
    state = started(views)
    while state.phase != phase:
        state, _ = advance(state, seconds=600)
    asked = []

    def cancelled() -> bool:
        asked.append(True)
        return len(asked) > 2

    with pytest.raises(Cancelled):
        advance(state, cancelled=cancelled)


@pytest.mark.parametrize("asks", [0, 5, 13, 17, 26])  # while it looks at the masks, makes the lattice, crops the views
def test_a_start_is_stopped_in_its_midst(views: ViewSet, asks: int):
    left = iter(range(asks))
    with pytest.raises(Cancelled):
        started(views, cancelled=lambda: next(left, None) is None)


@pytest.mark.parametrize("phase", ["shape", "clean", "texture"])
def test_what_a_resumed_fit_computes_of_the_views_is_stopped_in_its_midst(views: ViewSet, phase: str, tmp_path):
    state, _ = advance(started(views), steps=3)
    while state.phase != phase:
        state, _ = advance(state, seconds=600)
    save(state, tmp_path / "saved")
    state = load(tmp_path / "saved", views)
    left = iter(range(8))
    with pytest.raises(Cancelled):
        advance(state, cancelled=lambda: next(left, None) is None)
    assert {"field", "shape", "shape_targets", "texture_targets"}.isdisjoint(vars(state.problem))
    other, _ = advance(state, steps=1)  # and can be gone on with
    whole, _ = advance(load(tmp_path / "saved", views), steps=1)
    assert_same(other, whole)


def test_another_seed_is_another_fit(views: ViewSet):
    one, other = (advance(started(views, seed), steps=3)[0] for seed in (0, 1))
    assert not torch.equal(one.variables["sdf"], other.variables["sdf"])
    assert_same(one, advance(started(views, 0), steps=3)[0])


def test_no_time_is_one_step(views: ViewSet):
    state, metrics = advance(started(views), seconds=0)
    assert state.steps_done == 1
    assert "loss" in metrics


def test_a_fit_that_is_done_stays_done(whole: State):
    state, metrics = advance(whole, seconds=0)
    assert metrics == {}
    assert_same(state, whole)


def test_finish_wants_a_finished_fit(views: ViewSet):
    with pytest.raises(ValueError, match="0 of 35"):
        finish(started(views))


def test_cancelled_between_steps(views: ViewSet):
    asked = []

    def cancelled() -> bool:
        asked.append(True)
        return len(asked) > 2

    state = started(views)
    before = state.variables["sdf"].clone()
    with pytest.raises(Cancelled):
        advance(state, cancelled=cancelled)
    assert len(asked) == 3
    assert torch.equal(state.variables["sdf"], before)


def test_progress_names_the_passes_and_ends_at_the_last_step(heard: list[tuple[str, int, int]], whole: State):
    assert whole.steps == 35
    assert list(dict.fromkeys(stage for stage, _, _ in heard)) == ["shape", "clean", "unwrap", "bake", "texture"]
    assert [step for _, step, _ in heard] == sorted({step for _, step, _ in heard})
    assert heard[0][1] == 1
    assert heard[-1] == ("texture", 35, 35)


@pytest.mark.parametrize("batch", [1, 2, 5, 12, 30])
def test_every_view_is_seen_once_before_any_is_seen_twice(views: ViewSet, batch: int):
    state = started(views)
    for phase in ("shape", "texture"):
        drawn = torch.cat([fit._draw(replace(state, phase=phase, step=step), batch)[1] for step in range(60 // batch)])
        rounds = drawn[: len(drawn) // 12 * 12].reshape(-1, 12)
        assert torch.equal(rounds.sort(-1).values, torch.arange(12).expand(len(rounds), 12))
        assert len(rounds) < 2 or not torch.equal(rounds[0], rounds[1])


@pytest.mark.parametrize("phase", ["shape", "texture"])
def test_a_step_whose_views_do_not_show_the_object_has_finite_figures(views: ViewSet, whole: State, phase: str):
    assert views.cameras is not None
    turn = torch.diag(torch.tensor([-1.0, 1, -1, 1], dtype=torch.float64))
    away = replace(views.cameras, world_from_camera=views.cameras.world_from_camera @ turn)
    blank = replace(views, images=views.images * 0, cameras=away)
    state = started(views)
    if phase == "texture":
        state = replace(whole, problem=state.problem, phase="texture", step=3)
    state.problem.shape_targets = crop_to_object(blank, TINY.shape_size, "cpu")
    state.problem.texture_targets = crop_to_object(blank, TINY.texture_crop, "cpu")
    state, metrics = advance(state, steps=1)
    assert metrics.keys() == {"loss", "psnr", "faces"}
    assert all(math.isfinite(value) for value in metrics.values())
    assert all(bool(t.isfinite().all()) for t in tensors(state).values())


def test_an_empty_surface_is_seeded_again(views: ViewSet):
    state = started(views)
    dead = replace(state, variables={**state.variables, "sdf": torch.ones_like(state.variables["sdf"])})
    state, metrics = advance(dead, steps=1)
    assert metrics == {"reseeded": 1.0}
    state, metrics = advance(state, steps=12)
    assert metrics["faces"] > 100
    assert tiny.chamfer(*state.problem.shape.final(state.variables)) < tiny.CELL


# what it refuses


def test_views_without_cameras(views: ViewSet):
    with pytest.raises(InputError, match="no cameras") as caught:
        started(replace(views, cameras=None))
    assert caught.value.hint


def test_masks_that_agree_on_nothing(views: ViewSet):
    images = views.images.clone()
    images[..., 3] = 0
    images[0::2, :20, :20, 3] = 255
    images[1::2, -20:, -20:, 3] = 255
    with pytest.raises(EmptyReconstruction, match="agree on no volume") as caught:
        started(replace(views, images=images))
    assert "masks" in caught.value.hint


def test_memory_is_checked_with_both_figures(views: ViewSet, monkeypatch):
    monkeypatch.setattr(memory, "memory_free", lambda device: 300 * 2**20)
    with pytest.raises(OutOfMemory, match=r"needs about \d+\.\d GiB on cpu, 0\.3 GiB are free") as caught:
        started(views)
    assert caught.value.needed > caught.value.free == 300 * 2**20
    assert caught.value.hint


def test_load_refuses_what_is_not_this_views_fit(views: ViewSet, tmp_path):
    path = tmp_path / "state.fit"
    state = started(views)
    save(state, path)
    data = path.read_bytes()
    others = {
        "other names": replace(views, names=tuple(f"other/{n}" for n in views.names)),
        "fewer": views.select(list(range(11))),
        "same names, other pictures": replace(views, images=255 - views.images),
        "same names, other cameras": views.moved(torch.diag(torch.tensor([1.1, 1.1, 1.1, 1.0]))),
    }
    for other in others.values():
        with pytest.raises(InputError, match=r"state\.fit: belongs to another view set"):
            load(path, other)
    damaged = {"truncated": data[: len(data) // 2], "garbage": b"\x00garbage" * 9, "empty": b"", "header": data[:50]}
    for content in damaged.values():
        (tmp_path / "damaged.fit").write_bytes(content)
        with pytest.raises(InputError, match=r"damaged\.fit: is not a saved fit"):
            load(tmp_path / "damaged.fit", views)
    with pytest.raises(InputError):
        load(tmp_path / "absent.fit", views)


def test_load_refuses_another_format(views: ViewSet, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fit, "FORMAT", fit.FORMAT + 1)
        save(started(views), tmp_path / "newer.fit")
    with monkeypatch.context() as patch:
        patch.setattr(fit, "asdict", lambda numbers: {**asdict(numbers), "a_number_of_tomorrow": 1})
        save(started(views), tmp_path / "tomorrow.fit")
    for name in ("newer.fit", "tomorrow.fit"):
        with pytest.raises(InputError, match=rf"{name}: was saved by another version"):
            load(tmp_path / name, views)
    for header in ('{"views": 3}', "[]", f'{{"format": {fit.FORMAT}}}', "null"):
        safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "odd.fit", metadata={"viewmesh": header})
        with pytest.raises(InputError):
            load(tmp_path / "odd.fit", views)


# refinement of a given mesh

REFINE = replace(TINY, texture_steps=24, texture_batch=4)


@pytest.mark.parametrize("garbage", [{"lr_vertices": 0.05, "laplacian": 0.0}, {"lr_texture": 5.0}])
def test_a_worse_result_gives_the_given_mesh_back(views: ViewSet, mesh: TexturedMesh, garbage: dict[str, float]):
    still = replace(REFINE, texture_steps=4, lr_vertices=0.0, lr_texture=0.0, lr_light=0.0)
    kept = tiny.fitted(views, replace(still, **garbage), initial=mesh)
    assert torch.equal(kept.mesh.vertices, mesh.mesh.vertices)
    assert torch.equal(kept.material.base_color, mesh.material.base_color)


@pytest.mark.parametrize(
    ("psnr", "iou", "kept"), [(25.0, 0.9, True), (26.0, 0.8995, True), (26.0, 0.898, False), (24.9, 0.95, False)]
)
def test_the_gate_lets_the_iou_fall_by_a_thousandth_and_the_psnr_by_nothing(
    mesh: TexturedMesh, monkeypatch, psnr: float, iou: float, kept: bool
):
    monkeypatch.setattr(gate, "match", lambda _, of: Match(psnr, iou) if of is fitted else Match(25.0, 0.9))
    fitted, problem = replace(mesh), SimpleNamespace()
    found = gate.compare(problem, mesh, fitted)
    assert found.kept == kept
    assert (found.mesh is fitted) == kept


def test_what_a_photo_cuts_off_does_not_count(views: ViewSet, mesh: TexturedMesh):
    whole, cut = (match(Problem(v, TINY, torch.device("cpu")), mesh) for v in (views, synthetic.cut_off(views, 28)))
    assert cut.iou > whole.iou - 0.02
    assert cut.psnr > whole.psnr - 2


def test_a_better_result_is_kept(views: ViewSet, mesh: TexturedMesh):
    grey = replace(mesh, material=replace(mesh.material, base_color=torch.full_like(mesh.material.base_color, 0.4)))
    better = tiny.fitted(views, REFINE, initial=grey)
    assert not torch.equal(better.material.base_color, grey.material.base_color)
    assert torch.equal(better.mesh.faces, grey.mesh.faces)
    assert tiny.held_out_psnr(better) > tiny.held_out_psnr(grey) + 2


def test_a_mesh_without_texture_is_unwrapped_and_coloured(views: ViewSet, mesh: TexturedMesh):
    plain = Mesh(mesh.mesh.vertices, mesh.mesh.faces, torch.full_like(mesh.mesh.vertices, 0.4))
    found = tiny.fitted(views, REFINE, initial=plain)
    found.validate()
    assert len(found.mesh.faces) <= TINY.target_faces
    assert tiny.held_out_psnr(found) > 20


def test_a_mesh_that_is_not_sound_is_refused(views: ViewSet, mesh: TexturedMesh):
    empty = Mesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64))
    for bad in (empty, Mesh(mesh.mesh.vertices * float("nan"), mesh.mesh.faces), replace(mesh, uvs=mesh.uvs + 2)):
        with pytest.raises(InvalidMesh):
            started(views, initial=bad)


def test_a_refinement_is_resumed_bit_for_bit(views: ViewSet, mesh: TexturedMesh, tmp_path):
    state = started(views, initial=mesh)
    assert (state.phase, state.steps_done) == ("texture", 27)
    save(state, tmp_path / "0.fit")
    state, _ = advance(state, steps=3)
    save(state, tmp_path / "3.fit")
    undisturbed, _ = advance(state)
    again, _ = advance(load(tmp_path / "0.fit", views), steps=3)
    assert_same(advance(again)[0], undisturbed)
    assert_same(advance(load(tmp_path / "3.fit", views))[0], undisturbed)


def test_the_pose_of_a_view_is_corrected(views: ViewSet, mesh: TexturedMesh):
    assert views.cameras is not None
    angle = torch.tensor(0.03, dtype=torch.float64)
    error = torch.eye(4, dtype=torch.float64)
    error[0, 0], error[0, 2], error[2, 0], error[2, 2] = angle.cos(), angle.sin(), -angle.sin(), angle.cos()
    poses = views.cameras.world_from_camera.clone()
    poses[4] = poses[4] @ error
    wrong = replace(views.cameras, world_from_camera=poses)
    numbers = replace(
        TINY, refine_pose=True, lr_pose=3e-3, lr_vertices=0, texture_steps=60, texture_batch=6, lr_texture=0.0,
        lr_light=0.0,
    )  # fmt: skip
    state, _ = advance(started(replace(views, cameras=wrong), numbers=numbers, initial=mesh))
    pose = state.variables["pose"] - state.variables["pose"].mean(0)
    corrected = torch.matrix_exp(_twist(pose.double())) @ wrong.camera_from_world
    points = synthetic.surface_points()
    true, _ = views.cameras.project(points)
    before, _ = wrong.project(points)
    after, _ = replace(wrong, world_from_camera=torch.linalg.inv(corrected)).project(points)
    off = lambda pixels: (pixels - true).norm(dim=-1).mean(-1)  # noqa: E731
    assert float(off(after)[4]) < float(off(before)[4]) / 2
    assert float(off(after).mean()) < 1


def test_the_exposure_of_a_view_is_corrected(views: ViewSet, mesh: TexturedMesh):
    images = views.images.clone()
    linear = (images[4, ..., :3].float() / 255) ** 2.2
    images[4, ..., :3] = ((0.5 * linear) ** (1 / 2.2) * 255).round().to(torch.uint8)
    numbers = replace(
        TINY, refine_exposure=True, lr_exposure=0.05, lr_vertices=0, texture_steps=60, texture_batch=6,
        lr_texture=0.0, lr_light=0.0, final_rate=0.2,
    )  # fmt: skip
    state, _ = advance(started(replace(views, images=images), numbers=numbers, initial=mesh))
    exposure = state.variables["exposure"]
    others = torch.cat([exposure[:4], exposure[5:]]).mean(0)
    gain = torch.exp(exposure[4] - others)
    assert torch.allclose(gain, torch.tensor(0.5), atol=0.1)
