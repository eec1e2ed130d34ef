"""Requests that run together give what they give alone; who leaves or fails harms nobody."""

import pytest
import torch
from PIL import Image, ImageDraw

from viewmesh.errors import Cancelled, EmptyReconstruction
from viewmesh.trellis import batch as batches
from viewmesh.trellis import pipeline, stages
from viewmesh.trellis.batch import Batch, Request, groups, room, sample_latents, sample_structures
from viewmesh.trellis.pipeline import Generated, Trellis
from viewmesh.trellis.sparse import Voxels
from viewmesh.trellis.tiny import write_tiny_trellis


@pytest.fixture(scope="module")
def trellis(tmp_path_factory):
    return Trellis.load(write_tiny_trellis(tmp_path_factory.mktemp("tiny")))


def photos(seed: int, n: int = 1) -> list[Image.Image]:
    images = []
    for i in range(n):
        image = Image.new("RGBA", (90, 70))
        ImageDraw.Draw(image).ellipse((20 + 9 * i, 10, 70, 60), fill=(220, 60 * seed, 90 + 40 * i, 255))
        images.append(image)
    return images


def request(trellis, seed: int, views: int = 1, **more) -> Request:
    return Request(trellis.encode(photos(seed, views)), torch.Generator().manual_seed(seed), **more)


def ball(radius: float, resolution: int = 16) -> Voxels:
    axis = torch.arange(resolution)
    coords = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    coords = coords[((coords + 0.5) / resolution - 0.5).norm(dim=1) < radius]
    return Voxels(torch.cat([torch.zeros_like(coords[:, :1]), coords], 1).int(), resolution, (len(coords),))


@torch.no_grad()
def test_noise_structure_and_latents_are_each_requests_own(trellis):
    """Unlike sizes, unlike numbers of views: (B) together against one at a time, before anything is thresholded."""
    options, networks, views = trellis.options(steps=3), trellis.networks, (1, 2, 3)
    sets = {i: ball(0.25 + 0.06 * i) for i in range(3)}
    together = Batch([request(trellis, i, n) for i, n in enumerate(views)], [0, 1, 2])
    latents = []
    original = stages.occupied
    stages.occupied = lambda networks, latent: latents.append(latent) or sets[len(latents) - 1]
    try:
        assert list(sample_structures(networks, together, options.structure)) == [0, 1, 2]
    finally:
        stages.occupied = original
    feats = sample_latents(networks, together, sets, options.latents)
    for i, n in enumerate(views):
        alone, hooks = request(trellis, i, n), (lambda *a, **k: None, lambda: False)
        noise = stages.structure_noise(networks, alone.generator)
        velocity = stages.stochastic_views(networks.structure_flow, alone.condition)
        torch.testing.assert_close(latents[i], stages.sample(velocity, noise, options.structure), rtol=1e-4, atol=1e-4)
        velocity = stages.stochastic_views(networks.latent_flow, alone.condition, sets[i])
        one = stages.sample_latents(networks, sets[i], velocity, options.latents, alone.generator, *hooks)
        torch.testing.assert_close(feats[i].feats, one.feats, rtol=1e-4, atol=1e-4)
        assert feats[i].voxels is sets[i]


def test_a_batch_gives_the_meshes_of_single_requests(trellis):
    options = trellis.options(steps=2)
    seen: dict[int, list] = {0: [], 1: [], 2: []}
    requests = [
        request(trellis, i, 1 + i, gaussians=i == 1, progress=lambda stage, *at, i=i: seen[i].append((stage, *at)))
        for i in range(3)
    ]
    made = trellis.generate_batch(requests, options)
    for i, one in enumerate(made):
        alone = trellis.generate(photos(i, 1 + i), options, generator=torch.Generator().manual_seed(i))
        assert isinstance(one, Generated)
        assert one.voxels == alone.voxels
        torch.testing.assert_close(one.mesh.vertices, alone.mesh.vertices, rtol=1e-4, atol=1e-5)
        assert torch.equal(one.mesh.faces, alone.mesh.faces)
        assert (one.gaussians is not None) == (i == 1)
        assert one.warnings == alone.warnings
        assert set(one.seconds) - {"gaussians"} == {"structure", "latents", "mesh"}
        assert seen[i] == [(s, k, 2) for s in ("structure", "latents") for k in (1, 2)] + [("mesh", 1, 1)]


@pytest.mark.parametrize("stage", ["structure", "latents"])
def test_who_is_cancelled_leaves_at_the_next_step_and_the_others_go_on(trellis, stage):
    options, seen = trellis.options(steps=4), []
    leaver = request(
        trellis, 1, progress=lambda s, step, total: seen.append((s, step)), cancelled=lambda: (stage, 2) in seen
    )
    made = trellis.generate_batch([request(trellis, 0), leaver, request(trellis, 2, 2)], options)
    assert isinstance(made[1], Cancelled)
    assert seen[-1] == (stage, 2)
    for i, views in ((0, 1), (2, 2)):
        alone = trellis.generate(photos(i, views), options, generator=torch.Generator().manual_seed(i))
        assert isinstance(made[i], Generated)
        torch.testing.assert_close(made[i].mesh.vertices, alone.mesh.vertices, rtol=1e-4, atol=1e-5)


def test_when_all_leave_nothing_is_left_to_do(trellis):
    steps = []
    gone = [request(trellis, i, cancelled=lambda: len(steps) >= 2, progress=lambda *a: steps.append(a)) for i in (0, 1)]
    made = trellis.generate_batch(gone, trellis.options(steps=9))
    assert [type(one) for one in made] == [Cancelled, Cancelled]
    assert len(steps) == 2  # one step of both


@pytest.mark.parametrize("stage", ["occupied", "decode_mesh"])
def test_the_failure_of_one_is_its_own(trellis, monkeypatch, stage):
    original, calls = getattr(stages, stage), []

    def second_fails(*args):
        calls.append(args)
        if len(calls) == 2:
            raise EmptyReconstruction("nothing")
        return original(*args)

    monkeypatch.setattr(stages, stage, second_fails)
    made = trellis.generate_batch([request(trellis, i) for i in range(3)], trellis.options(steps=1))
    assert [type(one) for one in made] == [Generated, EmptyReconstruction, Generated]


def test_what_is_nobodys_own_is_raised(trellis, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(stages, "decode_mesh", full)
    with pytest.raises(torch.OutOfMemoryError):
        trellis.generate_batch([request(trellis, i) for i in range(2)], trellis.options(steps=1))


def test_multidiffusion_and_single_requests_go_one_by_one(trellis, monkeypatch):
    monkeypatch.setattr(pipeline, "sample_structures", lambda *a: pytest.fail("ran together"))
    monkeypatch.setattr(Trellis, "_generated_together", lambda *a: pytest.fail("ran together"))
    two = [request(trellis, i, 2) for i in range(2)]
    options = trellis.options(steps=1, multiimage="multidiffusion")
    assert all(isinstance(one, Generated) for one in trellis.generate_batch(two, options))
    assert all(isinstance(one, Generated) for one in trellis.generate_batch(two[:1], trellis.options(steps=1)))


def test_large_sets_are_not_packed_together(monkeypatch):
    monkeypatch.setattr(batches, "PACKED_VOXELS", 1000)
    sets = {i: Voxels(torch.zeros(n, 4).int(), 64, (n,)) for i, n in enumerate((400, 500, 200, 3000, 10))}
    assert groups([0, 1, 2, 3, 4], sets) == [[0, 1], [2], [3], [4]]
    assert groups([1, 2], sets) == [[1, 2]]


def test_a_batch_is_as_large_as_the_free_memory_allows(monkeypatch):
    device = torch.device("cuda")
    for free, most in ((0, 1), (2 << 30, 1), (3 << 30, 3), (70 << 30, 137)):
        monkeypatch.setattr(batches, "free_bytes", lambda device, free=free: free)
        assert room(device, 2 << 30) == most
