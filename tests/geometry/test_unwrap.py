import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from solids import ball, bumpy, cube, spiral, together, torus

from viewmesh.errors import Cancelled
from viewmesh.geometry import charts
from viewmesh.geometry import unwrap as module
from viewmesh.geometry.mesh import Mesh
from viewmesh.geometry.simplify import simplify
from viewmesh.geometry.texels import texels_inside
from viewmesh.geometry.unwrap import unwrap

SIZE = 256
MESHES = {
    "cube": cube,
    "bumpy": lambda: bumpy(3),
    "torus": lambda: simplify(torus(), 800),
    "spiral": spiral,
    "together": lambda: together(cube(), ball(1), spiral()),
}


def corners_of(mesh, atlas) -> torch.Tensor:
    """(F, 3, 2) float64 texels, v up."""
    uv = atlas.uvs.double()
    assert float(uv.min()) >= 0
    assert float(uv.max()) <= 1
    assert torch.equal(atlas.vertex_of_uv[atlas.uv_faces], mesh.faces)
    return (uv * torch.tensor([1.0, -1]) + torch.tensor([0.0, 1]))[atlas.uv_faces] * SIZE


def areas(corners: torch.Tensor) -> torch.Tensor:
    a, b = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    return (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]) / 2


def check(mesh, atlas, allowed_double=0.0):
    corners = corners_of(mesh, atlas)
    assert float(areas(corners).min()) > 0
    _, x, y, _ = texels_inside(corners, margin=0.05)
    texels, times = np.unique((y * SIZE + x).numpy(), return_counts=True)
    assert (times > 1).sum() <= allowed_double * len(texels)
    return corners


@pytest.mark.parametrize("fallback", [False, True], ids=["xatlas", "fallback"])
@pytest.mark.parametrize("name", MESHES)
def test_every_face_has_its_own_texels(name, fallback):
    mesh = MESHES[name]()
    atlas = unwrap(mesh, SIZE, fallback_only=fallback)
    # charts are checked for overlap on a texel grid before they are packed: a texel in a thousand may still differ
    corners = check(mesh, atlas, allowed_double=0.002)
    assert float(areas(corners).sum()) > (0.12 if name == "spiral" else 0.25) * SIZE**2


def test_charts_keep_their_distance():
    mesh = bumpy(3)
    atlas = unwrap(mesh, SIZE, padding=4, fallback_only=True)
    chart = torch.from_numpy(_chart_labels(atlas))
    face, x, y, _ = texels_inside(corners_of(mesh, atlas))
    owner = torch.full((SIZE, SIZE), -1)
    owner[y, x] = chart[face]
    for dy, dx in [(0, 1), (1, 0), (0, 2), (2, 0), (1, 1), (1, -1), (0, 3), (3, 0)]:
        here, there = owner[: SIZE - dy], owner[dy:]
        here, there = (
            (here[:, :-dx], there[:, dx:]) if dx > 0 else (here, there) if dx == 0 else (here[:, 1:], there[:, :-1])
        )
        touching = (here >= 0) & (there >= 0) & (here != there)
        assert not bool(touching.any())


def _chart_labels(atlas):
    from viewmesh.geometry.clean import components

    return components(Mesh(torch.cat([atlas.uvs, atlas.uvs[:, :1]], 1), atlas.uv_faces)).numpy()


def test_degenerate_faces_get_texels_too():
    m = cube()
    flat = torch.tensor([[0, 0, 1], [2, 2, 2], [0, 1, 0]])
    mesh = Mesh(m.vertices, torch.cat([m.faces, flat]))
    check(mesh, unwrap(mesh, SIZE))
    check(mesh, unwrap(mesh, SIZE, fallback_only=True))


def test_more_charts_than_a_small_texture_holds_with_padding():
    soup = bumpy(2)
    soup = Mesh(soup.vertices[soup.faces].reshape(-1, 3), torch.arange(3 * len(soup.faces)).reshape(-1, 3))
    atlas = unwrap(soup, 64, padding=8, fallback_only=True)
    uv = atlas.uvs.double()[atlas.uv_faces] * torch.tensor([1.0, -1])
    assert float(areas(uv).min()) > 0


@pytest.mark.parametrize(("size", "padding"), [(64, 12), (128, 4), (512, 4)])
def test_an_atlas_is_filled_and_padding_takes_no_charts_place(size, padding):
    mesh = simplify(bumpy(3), 600)
    atlas = unwrap(mesh, size, padding=padding, fallback_only=True)
    border = 2 * padding / size
    assert float(atlas.uvs[:, 1].max() - atlas.uvs[:, 1].min()) > 0.97 - border
    assert float(areas(atlas.uvs.double()[atlas.uv_faces]).abs().sum()) > 0.1


def test_slivers_are_laid_out_on_as_few_texels_as_others(monkeypatch):
    """A hundred needles of nearly no area: measured by that, each would be some ten million texels long."""
    generator = torch.Generator().manual_seed(0)
    start, along, across = (torch.randn(100, 3, generator=generator) for _ in range(3))
    corners = torch.stack([start, start + along, start + along / 2 + 1e-7 * across], 1)
    looked_at = []

    def counted(corners, margin):
        looked_at.append(float((corners.amax(1) - corners.amin(1)).amax()))
        return texels_inside(corners, margin)

    monkeypatch.setattr(charts, "texels_inside", counted)
    needles = Mesh(corners.reshape(-1, 3), torch.arange(300).reshape(-1, 3))
    atlas = unwrap(needles, SIZE, fallback_only=True)
    assert max(looked_at) < 2 * SIZE
    assert float(areas(corners_of(needles, atlas)).min()) > 0


def test_large_meshes_are_cut_into_parts_and_put_together(monkeypatch):
    monkeypatch.setattr(module, "PART_FACES", 300)
    mesh = bumpy(3)
    assert len(module._spatial_parts(mesh.vertices[mesh.faces].mean(1).numpy())) >= 4
    check(mesh, unwrap(mesh, SIZE), allowed_double=0.002)


@pytest.mark.parametrize(
    "child",
    [
        (sys.executable, "-c", "import os; os.abort()"),
        (sys.executable, "-c", "import time; time.sleep(60)"),
        (sys.executable, "-c", "import sys; open(sys.argv[1] + '/0000.out.npz', 'w').write('garbage')"),
        ("/not/there",),
    ],
    ids=["crash", "time", "garbage", "no process"],
)
def test_what_is_not_xatlas_charts_is_not_taken_for_them(monkeypatch, child):
    monkeypatch.setattr(module, "CHILD", child)
    mesh = bumpy(3)
    atlas = unwrap(mesh, SIZE, timeout_s=0.5)
    check(mesh, atlas, allowed_double=0.002)
    assert torch.equal(atlas.uvs, unwrap(mesh, SIZE, fallback_only=True).uvs)


def test_a_crash_of_xatlas_costs_only_its_own_part(monkeypatch):
    work = """
import os, sys
from pathlib import Path
from viewmesh.geometry import xatlas_child as module
charted = module.charted
module.charted = lambda source, target: os.abort() if source.name == "0001.in.npz" else charted(source, target)
module.main(Path(sys.argv[1]), 2)
"""
    read, found = module._read, []
    monkeypatch.setattr(module, "_read", lambda *args: (found.append(read(*args)), found[-1])[1])
    monkeypatch.setattr(module, "CHILD", (sys.executable, "-c", work))
    monkeypatch.setattr(module, "PART_FACES", 300)
    mesh = bumpy(3)
    check(mesh, unwrap(mesh, SIZE), allowed_double=0.002)
    assert len(found) >= 4
    assert [part is None for part in found] == [i == 1 for i in range(len(found))]


def test_xatlas_is_asked_where_the_system_pins_no_process(monkeypatch):
    mesh = bumpy(2)
    pinned, ours = unwrap(mesh, SIZE), unwrap(mesh, SIZE, fallback_only=True)
    work = """
import os, sys
from pathlib import Path
del os.sched_getaffinity, os.sched_setaffinity
from viewmesh.geometry import xatlas_child as module
module.main(Path(sys.argv[1]), int(sys.argv[2]))
"""
    for name in ("sched_getaffinity", "sched_setaffinity"):
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(module, "CHILD", (sys.executable, "-c", work))
    assert torch.equal(unwrap(mesh, SIZE).uvs, pinned.uvs)
    assert pinned.uvs.shape != ours.uvs.shape or not torch.equal(pinned.uvs, ours.uvs)


def test_no_time_means_our_own_charts():
    mesh = bumpy(2)
    assert torch.equal(unwrap(mesh, SIZE, timeout_s=0).uvs, unwrap(mesh, SIZE, fallback_only=True).uvs)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"  # killed, and not yet buried
    except FileNotFoundError:
        return False


def test_cancelling_ends_the_children_at_once(monkeypatch, tmp_path):
    """A child and those that it forks, which would work for a minute."""
    begun = tmp_path / "pids"
    work = f"import os, time; os.fork(); open({str(begun)!r}, 'a').write(f'{{os.getpid()}} '); time.sleep(60)"
    monkeypatch.setattr(module, "CHILD", (sys.executable, "-c", work))
    monkeypatch.setattr(module, "PART_FACES", 300)
    stopped: list[float] = []

    def cancelled() -> bool:
        if begun.exists() and len(begun.read_text().split()) == 2 and not stopped:
            stopped.append(time.monotonic())
        return bool(stopped)

    with pytest.raises(Cancelled):
        unwrap(bumpy(3), SIZE, cancelled=cancelled)
    assert time.monotonic() - stopped[0] < 2
    assert not any(alive(int(pid)) for pid in begun.read_text().split())


@pytest.mark.parametrize("part", ["repaired", "pack"])
def test_what_comes_after_the_children_is_stopped_too(monkeypatch, part):
    reached, whole = [], getattr(module, part)
    monkeypatch.setattr(module, part, lambda *args: (reached.append(True), whole(*args))[1])
    with pytest.raises(Cancelled):
        unwrap(bumpy(3), SIZE, fallback_only=True, cancelled=lambda: bool(reached))


def test_same_mesh_same_atlas():
    a, b = unwrap(bumpy(3), SIZE), unwrap(bumpy(3), SIZE)
    assert torch.equal(a.uvs, b.uvs)
    assert torch.equal(a.uv_faces, b.uv_faces)


def test_scale_is_even_over_the_surface():
    mesh = bumpy(3)
    corners = corners_of(mesh, unwrap(mesh, SIZE))
    p = mesh.vertices.double()[mesh.faces]
    true = torch.linalg.cross(p[:, 1] - p[:, 0], p[:, 2] - p[:, 0]).norm(dim=-1) / 2
    density = areas(corners) / true
    assert float(density.quantile(0.95) / density.quantile(0.05)) < 3
