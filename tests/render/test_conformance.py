"""Every back-end that this machine can run against the naive twin: values, gradients, laws, known pitfalls."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from scipy.spatial import ConvexHull
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import naive

from viewmesh.errors import MissingModel, OptionError
from viewmesh.geometry.camera import look_at, pinhole
from viewmesh.render.mipmap import halved
from viewmesh.render.rasterizer import Rasterizer, get_rasterizer, topology

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
NVDIFFRAST = pytest.mark.skipif(importlib.util.find_spec("nvdiffrast") is None, reason="nvdiffrast is not installed")


@pytest.fixture(
    params=[
        "numba-cpu",
        "torch-cpu",
        pytest.param("torch-cuda", marks=[CUDA, pytest.mark.gpu]),
        pytest.param("nvdiffrast-cuda", marks=[CUDA, NVDIFFRAST, pytest.mark.gpu]),
    ]
)
def backend(request) -> tuple[Rasterizer, str]:
    name, device = request.param.split("-")
    return get_rasterizer(device, name), device


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scene(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two images of 9 random triangles over 12 shared vertices, in front of the camera; one of them degenerate."""
    g = generator(seed)
    xyz = torch.rand(2, 12, 3, generator=g, dtype=torch.float64) * 2.4 - 1.2
    w = 0.5 + torch.rand(2, 12, 1, generator=g, dtype=torch.float64) * 2
    clip = torch.cat([xyz * w * torch.tensor([1, 1, 0.7]), w], -1)
    faces = torch.stack([torch.randperm(12, generator=g)[:3] for _ in range(9)])
    faces[4, 2] = faces[4, 1]
    return clip.float(), faces  # float32 values: every back-end sees exactly the same vertices


def tetrahedra(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two images of two closed tetrahedra, one before the other."""
    g = generator(seed)
    corners = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    faces = torch.tensor([[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]])
    clips = []
    for _ in range(2):
        turn = torch.linalg.qr(torch.randn(3, 3, generator=g))[0]
        a, b = (
            corners @ turn * 0.5 + torch.tensor([0.2, 0.1, 3.0]),
            corners @ turn.T * 0.6 + torch.tensor([-0.3, 0, 4.5]),
        )
        p = torch.cat([a, b])
        clips.append(torch.stack([p[:, 0] * 2.5, p[:, 1] * 2.5, p[:, 2] - 2, p[:, 2]], -1))
    return torch.stack(clips), torch.cat([faces, faces + 4])


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-4) -> None:
    """Within a tolerance of the largest value: float32 against float64."""
    scale = max(float(expected.detach().abs().max()), 1e-6)
    error = float((actual.detach().cpu().double() - expected.detach()).abs().max()) / scale
    assert error < tolerance, f"relative error {error:.2e}"


H, W = 12, 17


def test_rasterize_agrees_with_the_twin(backend):
    rasterizer, device = backend
    for clip, faces in (scene(), tetrahedra()):
        exact = clip.double().requires_grad_()
        rast, db = naive.rasterize(exact, faces, H, W)
        ours = clip.to(device).requires_grad_()
        raster = rasterizer.rasterize(ours, faces.to(device), H, W, derivatives=True)
        assert raster.rast_db is not None
        same = raster.rast[..., 3].cpu() == rast[..., 3]
        # nvdiffrast snaps vertices to a grid of subpixels; ours must agree on every pixel
        assert int((~same).sum()) <= (0 if rasterizer.name != "nvdiffrast" else 8)
        assert 0.1 < float((rast[..., 3] > 0).double().mean()) < 0.95
        keep = same[..., None]
        close(raster.rast.cpu() * keep, rast * keep)
        close(raster.rast_db.cpu() * keep, db * keep)
        g1, g2 = (torch.randn(2, H, W, 4, generator=generator(i), dtype=torch.float64) * keep for i in (1, 2))
        g1[..., 2:] = 0  # z/w and the id have no gradient
        ((rast * g1).sum() + (db * g2).sum()).backward()
        ((raster.rast * g1.to(raster.rast)).sum() + (raster.rast_db * g2.to(raster.rast)).sum()).backward()
        close(ours.grad, exact.grad, 1e-3)


def test_z_and_id_carry_no_gradient(backend):
    rasterizer, device = backend
    clip, faces = scene()
    clip = clip.to(device).requires_grad_()
    rasterizer.rasterize(clip, faces.to(device), H, W).rast[..., 2:].sum().backward()
    assert float(clip.grad.abs().max()) == 0


def test_triangles_across_the_camera_plane(backend):
    """A floor that passes under the camera: covered where it is in front, as the twin has it."""
    rasterizer, device = backend
    clip = torch.tensor([[[-8.0, 1.0, -1.5, -2.0], [8.0, 1.0, -1.5, -2.0], [0.3, 1.0, 2.8, 4.0], [0, 0, 0, -1.0]]])
    faces = torch.tensor([[0, 1, 2], [0, 1, 3]])
    rast, _ = naive.rasterize(clip, faces, H, W)
    ours = clip.to(device).requires_grad_()
    out = rasterizer.rasterize(ours, faces.to(device), H, W).rast
    assert 10 < int((rast[..., 3] > 0).sum()) < H * W
    same = out[..., 3].cpu() == rast[..., 3]
    assert int((~same).sum()) <= (0 if rasterizer.name != "nvdiffrast" else 3)
    close(out.cpu() * same[..., None], rast * same[..., None], 1e-3)
    out[..., :2].sum().backward()
    assert bool(torch.isfinite(ours.grad).all())


def test_a_pixel_centre_on_a_shared_edge_is_drawn_once(backend):
    """A grid whose vertices are pixel centres: drawn one triangle at a time, the interior is covered exactly once."""
    rasterizer, device = backend
    n = 8
    x = (2 * torch.arange(n) + 1) / n - 1
    xy = torch.stack(torch.meshgrid(x, x, indexing="xy"), -1).reshape(-1, 2)
    clip = torch.cat([xy, torch.zeros(n * n, 1), torch.ones(n * n, 1)], -1)[None].to(device)
    a = (torch.arange(n - 1)[:, None] * n + torch.arange(n - 1)).reshape(-1, 1)
    faces = torch.cat([a + torch.tensor([0, 1, n + 1]), a + torch.tensor([0, n + 1, n])]).to(device)
    count = sum((rasterizer.rasterize(clip, f[None], n, n).rast[0, ..., 3] > 0).int() for f in faces)
    assert isinstance(count, Tensor)
    assert int(count[1:-1, 1:-1].min()) == 1
    assert int(count.max()) == 1


def test_both_windings_are_seen_and_the_lower_index_wins_a_tie(backend):
    rasterizer, device = backend
    clip = torch.tensor([[[-0.9, -0.8, 0.0, 1], [0.9, -0.7, 0, 1], [0.1, 0.9, 0, 1]]], device=device)
    one, other = torch.tensor([[0, 1, 2]], device=device), torch.tensor([[2, 1, 0]], device=device)
    a, b = (rasterizer.rasterize(clip, f, H, W).rast[..., 3] for f in (one, other))
    assert torch.equal(a, b)
    assert float(a.sum()) > 20
    if rasterizer.name != "nvdiffrast":  # which leaves ties open
        assert torch.equal(rasterizer.rasterize(clip, torch.cat([one, other]), H, W).rast[..., 3], a)


def test_nothing_to_draw(backend):
    rasterizer, device = backend
    clip, faces = scene()
    clip = clip.to(device).requires_grad_()
    none = faces[:0].to(device)
    raster = rasterizer.rasterize(clip, none, 8, 16, derivatives=True)
    assert float(raster.rast.abs().sum()) == 0
    out, _ = rasterizer.interpolate(torch.ones(12, 3, device=device), raster.rast, none)
    aa = rasterizer.antialias(out, raster.rast, clip, none)
    assert aa.shape == (2, 8, 16, 3)
    empty, _ = rasterizer.interpolate(torch.ones(12, 3, device=device), raster.rast[raster.rast[..., 3] > 0], none)
    assert empty.shape == (0, 3)


@pytest.mark.parametrize("name", ["numba", "torch"])
def test_gradcheck(name):
    rasterizer = get_rasterizer("cpu", name)
    clip, faces = tetrahedra()
    clip = clip[:1].double().requires_grad_()

    def uv_and_derivatives(c: Tensor) -> Tensor:
        raster = rasterizer.rasterize(c, faces, 6, 7, derivatives=True)
        assert raster.rast_db is not None
        return torch.cat([raster.rast[..., :2], raster.rast_db], -1)

    assert float((uv_and_derivatives(clip) != 0).sum()) > 30
    torch.autograd.gradcheck(uv_and_derivatives, (clip,), eps=1e-7, atol=1e-5)


def sphere(level: int = 3) -> tuple[Tensor, Tensor]:
    import trimesh

    mesh = trimesh.creation.icosphere(level)
    return torch.tensor(mesh.vertices, dtype=torch.float32), torch.tensor(mesh.faces)


def project(points: Tensor, eye: Tensor, size: int) -> Tensor:
    camera = pinhole(look_at(eye, torch.zeros(3), torch.tensor([0.0, 1, 0]))[None], math.radians(45), size, size)
    m = (camera.clip_from_camera(0.1, 10) @ camera.camera_from_world).to(points)
    return torch.cat([points, torch.ones_like(points[:, :1])], -1) @ m.mT


def test_numba_and_torch_agree_to_the_bit():
    vertices, faces = sphere()
    clip = project(vertices, torch.tensor([1.0, 2.0, 2.5]), 96)
    a, b = (get_rasterizer("cpu", n).rasterize(clip, faces, 96, 96, derivatives=True) for n in ("numba", "torch"))
    assert torch.equal(a.rast, b.rast)
    assert torch.equal(a.rast_db, b.rast_db)
    assert torch.equal(topology(faces).opposite, _opposite_twin(faces))


def _opposite_twin(faces: Tensor) -> Tensor:
    out = torch.full_like(faces, -1)
    edges: dict[frozenset, list[tuple[int, int]]] = {}
    for f, face in enumerate(faces.tolist()):
        for k in range(3):
            edges.setdefault(frozenset((face[(k + 1) % 3], face[(k + 2) % 3])), []).append((f, k))
    for pair in edges.values():
        if len(pair) == 2:
            (f, k), (g, m) = pair
            out[f, k], out[g, m] = faces[g, m], faces[f, k]
    return out


def test_topology_of_borders_and_fans():
    from viewmesh.render.backend_torch import opposite_vertices

    faces = torch.tensor([[0, 1, 2], [2, 1, 3], [4, 1, 2], [5, 6, 7], [7, 6, 8]])  # three faces share the edge 1-2
    assert torch.equal(topology(faces).opposite, _opposite_twin(faces))
    assert torch.equal(opposite_vertices(faces), _opposite_twin(faces))
    assert int((topology(faces).opposite >= 0).sum()) == 2


def test_gradients_do_not_depend_on_the_number_of_threads():
    rasterizer = get_rasterizer("cpu", "numba")
    vertices, faces = sphere()
    image = torch.rand(32, 32, 3, generator=generator())
    before, gradients = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            v, t = vertices.clone().requires_grad_(), image.clone().requires_grad_()
            clip = project(v, torch.tensor([1.0, 2.0, 2.5]), 96)
            raster = rasterizer.rasterize(clip, faces, 96, 96)
            out, _ = rasterizer.interpolate(v, raster.rast, faces)
            out = rasterizer.texture(t, out[..., :2]) * out
            rasterizer.antialias(out, raster.rast, clip, faces).square().sum().backward()
            gradients.append((v.grad, t.grad))
    finally:
        torch.set_num_threads(before)
    for g in gradients[1:]:
        assert torch.equal(g[0], gradients[0][0])
        assert torch.equal(g[1], gradients[0][1])


# ----------------------------------------------------------------------------------------- interpolate


def test_interpolate_agrees_with_the_twin(backend):
    rasterizer, device = backend
    clip, faces = scene()
    rast, db = (t.detach() for t in naive.rasterize(clip, faces, 8, 9))
    rast, db = rast.reshape(-1, 4), db.reshape(-1, 4)
    attributes = torch.randn(12, 5, generator=generator(), dtype=torch.float64)
    g_out = torch.randn(len(rast), 5, generator=generator(1), dtype=torch.float64)
    g_da = torch.randn(len(rast), 10, generator=generator(2), dtype=torch.float64)
    inputs = [t.clone().requires_grad_() for t in (attributes, rast, db)]
    out, da = naive.interpolate(inputs[0], inputs[1], faces, inputs[2])
    ((out * g_out).sum() + (da * g_da).sum()).backward()
    ours = [t.to(device, torch.float32).requires_grad_() for t in (attributes, rast, db)]
    out2, da2 = rasterizer.interpolate(ours[0], ours[1], faces.to(device), rast_db=ours[2])
    assert da2 is not None
    ((out2 * g_out.to(out2)).sum() + (da2 * g_da.to(out2)).sum()).backward()
    close(out2, out)
    close(da2, da)
    close(ours[0].grad, inputs[0].grad)
    close(ours[1].grad[:, :2], inputs[1].grad[:, :2])
    close(ours[2].grad, inputs[2].grad)
    batch, _ = rasterizer.interpolate(ours[0], ours[1].reshape(2, 8, 9, 4), faces.to(device))
    assert torch.equal(batch.reshape(-1, 5), out2)  # an image batch and a flat list are the same thing


def test_partition_of_unity(backend):
    rasterizer, device = backend
    clip, faces = scene()
    clip, faces = clip.to(device), faces.to(device)
    raster = rasterizer.rasterize(clip, faces, H, W, derivatives=True)
    one, slope = rasterizer.interpolate(torch.ones(12, 1, device=device), raster.rast, faces, rast_db=raster.rast_db)
    assert slope is not None
    covered = (raster.rast[..., 3:] > 0).float()
    torch.testing.assert_close(one, covered)
    assert float(slope.abs().max()) == 0
    w, _ = rasterizer.interpolate(clip[0, :, 3:], raster.rast[:1], faces)
    z, _ = rasterizer.interpolate(clip[0, :, 2:3], raster.rast[:1], faces)
    torch.testing.assert_close(z, raster.rast[:1, ..., 2:3] * w, atol=1e-5, rtol=1e-4)


# --------------------------------------------------------------------------------------------- texture


@pytest.mark.parametrize("boundary", ["wrap", "clamp", "zero", "cube"])
@pytest.mark.parametrize("filter", ["nearest", "linear", "trilinear"])
def test_texture_agrees_with_the_twin(backend, boundary, filter):
    rasterizer, device = backend
    g = generator(3)
    cube = boundary == "cube"
    shape = (6, 4, 4, 3) if cube else ((8, 16, 3) if filter == "trilinear" else (5, 7, 3))
    image = torch.randn(shape, generator=g, dtype=torch.float64)
    uv = torch.randn(60, 3 if cube else 2, generator=g, dtype=torch.float64).float().double()
    level = torch.rand(60, generator=g, dtype=torch.float64) * 2
    smaller = (halved(image), halved(halved(image))) if filter == "trilinear" else ()
    mips = [torch.randn(m.shape, generator=g, dtype=torch.float64) for m in smaller]
    inputs = [t.clone().requires_grad_() for t in (image, uv, level, *mips)]

    def sample(m: Tensor) -> Tensor:
        if cube and filter != "nearest":
            return naive.cube_texture(m, inputs[1])
        if cube:  # the nearest texel is the one whose weight is largest
            R = m.shape[1]
            points = torch.tensor([naive.cube_point(f, r, c, R) for f in range(6) for r in range(R) for c in range(R)])
            frames = torch.tensor(naive.CUBE_FACES, dtype=torch.float64)
            on_plane = uv / (uv @ frames[:, 0].T).amax(1, keepdim=True)
            return m.reshape(-1, 3)[torch.cdist(on_plane, points, p=torch.inf).argmin(1)]
        return naive.texture(m, inputs[1], boundary, filter)

    expected = sample(inputs[0])
    if mips:
        expected = sum(
            (1 - (inputs[2] - n).abs()).clamp_min(0)[:, None] * sample(m)
            for n, m in enumerate([inputs[0], *inputs[3:]])
        )
    cotangent = torch.randn(60, 3, generator=g, dtype=torch.float64)
    (expected * cotangent).sum().backward()
    ours = [t.detach().to(device, torch.float32).requires_grad_() for t in (image, uv, level, *mips)]
    out = rasterizer.texture(
        ours[0], ours[1].reshape(3, 20, -1), boundary=boundary, filter=filter,
        mips=ours[3:] or None, level=ours[2].reshape(3, 20) if mips else None,
    ).reshape(60, 3)  # fmt: skip
    (out * cotangent.to(out)).sum().backward()
    # nvdiffrast filters across the corners of a cube its own way: 0.17 of the largest gradient on an H100
    loose = (0.25 if cube else 2e-2) if rasterizer.name == "nvdiffrast" else 1e-4
    close(out, expected, loose)
    for mine, twin in zip(ours, inputs, strict=True):
        if twin.grad is not None:
            close(mine.grad, twin.grad, loose)


def test_mips_are_averages_and_the_level_is_the_footprint(backend):
    rasterizer, device = backend
    image = torch.randn(16, 32, 2, generator=generator()).to(device).requires_grad_()
    uv = torch.rand(200, 2, generator=generator(1)).to(device)
    da = torch.zeros(200, 4, device=device)
    da[:, 0], da[:, 3] = 2 / 32, 4 / 16  # 2 texels wide, 4 high: the long axis decides, level 2
    by_footprint = rasterizer.texture(image, uv, uv_da=da, filter="trilinear")
    level2 = rasterizer.texture(halved(halved(image)), uv)
    torch.testing.assert_close(by_footprint, level2, atol=2e-3, rtol=1e-3)
    whole = rasterizer.texture(image, uv, filter="trilinear", level=torch.full((200,), 9.0, device=device))
    torch.testing.assert_close(whole, image.mean((0, 1)).expand(200, 2), atol=1e-5, rtol=1e-4)
    (g,) = torch.autograd.grad(whole[0, 0], image)
    torch.testing.assert_close(g[..., 0], torch.full((16, 32), 1 / 512, device=device))
    odd = torch.zeros(6, 5, 1, device=device)
    with pytest.raises(ValueError, match="powers of two"):
        rasterizer.texture(odd, uv, uv_da=da, filter="trilinear")
    assert rasterizer.texture(odd, uv).shape == (200, 1)


def test_the_top_left_corner_is_uv_zero(backend):
    rasterizer, device = backend
    image = torch.zeros(4, 4, 1, device=device)
    image[0, 1] = 1
    uv = torch.tensor([[1.5 / 4, 0.5 / 4]], device=device)
    assert float(rasterizer.texture(image, uv)) == pytest.approx(1)


def test_cube_maps_are_continuous_across_edges_and_corners(backend):
    rasterizer, device = backend
    cube = torch.randn(6, 4, 4, 3, generator=generator()).to(device)
    g = generator(1)
    edge = torch.randn(400, 3, generator=g).sign()
    edge[:300, 0] *= torch.rand(300, generator=g)  # edges between y and z faces; the rest are corners
    edge = torch.cat([edge, edge.roll(1, 1), edge.roll(2, 1)])
    nudge = torch.randn(1200, 3, generator=g) * 1e-4
    a, b = (rasterizer.texture(cube, (edge + s * nudge).to(device), boundary="cube") for s in (1, -1))
    assert float((a - b).abs().max()) < 0.01
    assert float((a[:300] - a[300:600]).abs().mean()) > 0.1


# ------------------------------------------------------------------------------------------- antialias


def test_antialias_agrees_with_the_twin(backend):
    rasterizer, device = backend
    for seed in range(2):
        clip, faces = tetrahedra(seed)
        rast, _ = naive.rasterize(clip, faces, H, W)
        rast = rast.detach().float().double()
        color = torch.randn(2, H, W, 3, generator=generator(1), dtype=torch.float64)
        g = torch.randn(2, H, W, 3, generator=generator(2), dtype=torch.float64)
        exact = [color.clone().requires_grad_(), clip.double().requires_grad_()]
        out = naive.antialias(exact[0], rast, exact[1], faces)
        (out * g).sum().backward()
        assert float((out - color).detach().abs().max()) > 0.1
        ours = [color.float().to(device).requires_grad_(), clip.to(device).requires_grad_()]
        out2 = rasterizer.antialias(
            ours[0], rast.float().to(device), ours[1], faces.to(device), topology(faces.to(device))
        )
        (out2 * g.to(out2)).sum().backward()
        close(out2, out, 1e-3)
        close(ours[0].grad, exact[0].grad, 1e-3)
        if rasterizer.name == "nvdiffrast":  # it decides single crossings otherwise; values and colours still agree
            a, b = ours[1].grad.cpu().double().flatten(), exact[1].grad.flatten()
            assert float(torch.nn.functional.cosine_similarity(a, b, dim=0)) > 0.97
        else:
            close(ours[1].grad, exact[1].grad, 2e-3)
        assert float(exact[1].grad.abs().max()) > 0


def coverage(rasterizer: Rasterizer, clip: Tensor, faces: Tensor, size: int) -> Tensor:
    raster = rasterizer.rasterize(clip, faces, size, size)
    return rasterizer.antialias((raster.rast[..., 3:] > 0).float(), raster.rast, clip, faces, topology(faces))


CUBE = torch.tensor([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])
CUBE_TRIANGLES = torch.tensor(
    [[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1],
     [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]]
)  # fmt: skip


def test_the_gradient_of_an_area_is_that_of_the_area(backend):
    """An edge counted by both directions of pairs gives exactly twice the gradient; one lost gives less."""
    rasterizer, device = backend
    size, ratios = 256, []
    for eye in (torch.tensor([1.7, 1.1, 1.4]), torch.tensor([-0.9, 0.6, 2.1]), torch.tensor([0.2, -2.0, 1.3])):
        scale = torch.tensor(1.0, device=device, requires_grad=True)
        clip = project(CUBE.to(device) * scale, eye, size)
        coverage(rasterizer, clip, CUBE_TRIANGLES.to(device), size).sum().backward()

        def area(s: float, eye: Tensor = eye) -> float:  # a cube's outline is convex
            p = project(CUBE.double() * s, eye, size)[0]
            return float(ConvexHull((p[:, :2] / p[:, 3:] * size / 2).numpy()).volume)

        ratios.append(float(scale.grad) / ((area(1 + 1e-4) - area(1 - 1e-4)) / 2e-4))
    assert all(0.9 < r < 1.1 for r in ratios), ratios


def test_antialiased_values_may_leave_the_range_of_the_colours(backend):
    """Documented: a pixel blended across three edges loses more than it has, so an alpha is clamped before a loss."""
    rasterizer, device = backend
    pixels = torch.tensor([[8.3, 8.6], [8.7, 8.6], [8.5, 8.2]])  # a triangle around the centre of one pixel
    clip = torch.cat([pixels / 8 - 1, torch.tensor([[0.0, 1]] * 3)], -1)[None].to(device)
    values = coverage(rasterizer, clip, torch.tensor([[0, 1, 2]], device=device), 16)
    assert float(values[0, 8, 8]) == pytest.approx(1 - 0.35 - 0.35 - 0.4, abs=1e-3)
    assert int((values != 0).sum()) == 1


def test_shared_vertices_have_no_inner_silhouettes_and_duplicated_ones_do(backend):
    rasterizer, device = backend
    x = torch.tensor([[-0.8, -0.7, 0, 1], [0.9, -0.8, 0, 1], [0.7, 0.8, 0, 1], [-0.75, 0.9, 0, 1.0]], device=device)
    shared, split = torch.tensor([[0, 1, 2], [0, 2, 3]]), torch.tensor([[0, 1, 2], [3, 4, 5]])
    changed = []
    for p, faces in ((x, shared), (x[[0, 1, 2, 0, 2, 3]], split)):
        raster = rasterizer.rasterize(p[None], faces.to(device), 32, 32)
        color = raster.rast[..., 3:] * 1.0  # a colour per triangle
        aa = rasterizer.antialias(color, raster.rast, p[None].contiguous(), faces.to(device))
        inner = torch.nn.functional.max_pool2d((color == 0).float().permute(0, 3, 1, 2), 3, 1, 1)[0, 0] == 0
        changed.append(int(((aa - color)[0, ..., 0].abs() > 1e-6)[inner].sum()))
    assert changed[0] == 0
    assert changed[1] > 5


# ------------------------------------------------------------------------------- the cube sample's protocol


@pytest.mark.parametrize("continuous", [True, False])
def test_a_cube_is_fitted_from_16_pixels(continuous):
    """Positions and colours of a cube from random 16 x 16 views: 500 iterations bring the vertex error below 0.01."""
    rasterizer = get_rasterizer("cpu")
    g = generator(0)
    faces = CUBE_TRIANGLES
    if continuous:
        colors, color_faces = CUBE + 0.5, faces
    else:  # a colour per side, hence own colour vertices per triangle
        palette = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]])
        colors, color_faces = palette[torch.arange(12) // 2].repeat_interleave(3, 0), torch.arange(36).reshape(12, 3)
    v = (CUBE + (torch.rand(8, 3, generator=g) - 0.5)).requires_grad_()
    c = torch.rand(colors.shape, generator=g).requires_grad_()
    optimizer = torch.optim.Adam([v, c], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda it: max(0.01, 10 ** (-0.0005 * it)))
    around = topology(faces)

    def render(vertices: Tensor, vertex_colors: Tensor, eye: Tensor) -> Tensor:
        clip = project(vertices, eye, 16)
        raster = rasterizer.rasterize(clip, faces, 16, 16)
        color, _ = rasterizer.interpolate(vertex_colors, raster.rast, color_faces)
        return rasterizer.antialias(color, raster.rast, clip, faces, around)

    for _ in range(500):
        eye = torch.nn.functional.normalize(torch.randn(3, generator=g), dim=0) * 2.2
        loss = (render(v, c, eye) - render(CUBE, colors, eye)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    error = float((v.detach() - CUBE).norm(dim=1).mean())
    assert error < 0.01


# --------------------------------------------------------------------------------------- choosing a back-end


def test_choosing_a_back_end():
    assert get_rasterizer("cpu").name == "numba"
    with pytest.raises(OptionError, match="no rasterizer 'numba' for cuda"):
        get_rasterizer("cuda", "numba")
    with pytest.raises(OptionError, match="no rasterizer 'opengl'"):
        get_rasterizer("cpu", "opengl")


@pytest.mark.skipif(importlib.util.find_spec("nvdiffrast") is not None, reason="nvdiffrast is installed")
def test_a_missing_nvdiffrast_says_how_to_get_it():
    with pytest.raises(MissingModel) as error:
        get_rasterizer("cuda", "nvdiffrast")
    assert "--no-build-isolation" in error.value.hint
    assert "non-commercial" in error.value.hint
