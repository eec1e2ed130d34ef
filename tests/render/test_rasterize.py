"""Rasterising by every back-end against the naive twin: values, gradients, laws, known pitfalls."""

import naive
import pytest
import torch
from scenes import H, W, close, generator, project, scene, sphere, tetrahedra
from torch import Tensor

from viewmesh.render.rasterizer import get_rasterizer, topology


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
