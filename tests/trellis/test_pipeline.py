"""Load and generate with the tiny checkpoint: everything that the published one goes through, on the CPU."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image, ImageDraw

from viewmesh.errors import Cancelled, InputError, OptionError
from viewmesh.geometry.camera import Y_UP_FROM_Z_UP
from viewmesh.trellis import stages
from viewmesh.trellis.batch import Request
from viewmesh.trellis.decoders import Gaussians
from viewmesh.trellis.pipeline import Trellis
from viewmesh.trellis.reconviagen import ReconViaGen, cameras_of
from viewmesh.trellis.tiny import write_tiny_reconviagen


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_reconviagen(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def trellis(folder):
    return Trellis.load(folder)


def photo(i: int = 0) -> Image.Image:
    image = Image.new("RGBA", (90, 70))
    ImageDraw.Draw(image).ellipse((20 + i, 10, 70, 60), fill=(220, 60 * i, 90, 255))
    return image


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_photo_becomes_a_closed_coloured_mesh(trellis):
    steps = []
    result = trellis.generate(
        [photo()],
        trellis.options(steps=4, gaussians=True),
        generator=seeded(),
        progress=lambda stage, step, total, **_: steps.append((stage, step, total)),
    )
    mesh = result.mesh.validate()
    V, F = len(mesh.vertices), len(mesh.faces)
    edges = torch.cat([mesh.faces[:, [0, 1]], mesh.faces[:, [1, 2]], mesh.faces[:, [2, 0]]])
    key, back = edges[:, 0] * V + edges[:, 1], edges[:, 1] * V + edges[:, 0]
    assert torch.equal(key.sort().values, back.sort().values)  # every edge once in each direction: closed
    assert F > 1000
    assert mesh.vertices.abs().max() <= 0.5
    assert mesh.vertex_colors is not None
    assert mesh.vertex_colors.min() >= 0
    assert mesh.vertex_colors.max() <= 1
    assert steps == [(s, i, 4) for s in ("structure", "latents") for i in (1, 2, 3, 4)] + [("mesh", 1, 1)]
    assert set(result.seconds) == {"encode", "structure", "latents", "mesh", "gaussians"}
    assert result.gaussians is not None
    assert len(result.gaussians.centers) == 4 * result.voxels


def test_the_seed_decides(trellis):
    options = trellis.options(steps=2)
    first, again, other = (trellis.generate([photo()], options, generator=seeded(s)).mesh for s in (1, 1, 2))
    assert torch.equal(first.vertices, again.vertices)
    assert not torch.equal(first.vertices, other.vertices[: len(first.vertices)])


def test_concurrent_calls_give_what_single_calls_give(trellis):
    options = trellis.options(steps=2)
    run = lambda seed: trellis.generate([photo(seed)], options, generator=seeded(seed)).mesh.vertices  # noqa: E731
    alone = [run(seed) for seed in (1, 2, 3)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(run, (1, 2, 3)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_the_result_can_be_optimised_further(trellis):
    mesh = trellis.generate([photo()], trellis.options(steps=1)).mesh
    offset = torch.zeros_like(mesh.vertices, requires_grad=True)
    (mesh.vertices + offset).square().sum().backward()
    assert offset.grad is not None


@pytest.mark.parametrize("stage", ["structure", "latents"])
def test_cancelling_stops_within_a_step(trellis, stage):
    seen = []
    with pytest.raises(Cancelled):
        trellis.generate(
            [photo()],
            trellis.options(steps=5),
            progress=lambda s, step, total, **_: seen.append((s, step)),
            cancelled=lambda: (stage, 2) in seen,
        )
    assert seen[-1] == (stage, 2)


def velocities(trellis, views, conditions, step=0, guided=True):
    flow = trellis.networks.structure_flow
    x = torch.randn(1, 8, 4, 4, 4, generator=seeded())
    with torch.no_grad():
        return views(flow, conditions)(x, torch.tensor([400.0]), guided=guided, step=step)


def test_stochastic_takes_the_views_in_turn(trellis):
    conditions = torch.randn(3, 21, 32, generator=seeded())
    for step in range(5):
        many = velocities(trellis, stages.stochastic_views, conditions, step)
        one = velocities(trellis, stages.stochastic_views, conditions[step % 3 : step % 3 + 1], 0)
        torch.testing.assert_close(many[0], one[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(many[1], one[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("n", [3, 6])  # one group, and two
def test_multidiffusion_is_the_mean_velocity(trellis, n, guided):
    conditions = torch.randn(n, 21, 32, generator=seeded())
    singles = [velocities(trellis, stages.fused_views, conditions[i : i + 1], 0, guided) for i in range(n)]
    positive, negative = velocities(trellis, stages.multidiffusion_views, conditions, 0, guided)
    torch.testing.assert_close(positive, sum(v for v, _ in singles) / n, rtol=1e-4, atol=1e-5)
    if guided:
        torch.testing.assert_close(negative, singles[0][1], rtol=1e-4, atol=1e-5)
    else:
        assert negative is None


def test_views_beyond_the_steps_are_reported(trellis):
    images = [photo(i) for i in range(3)]
    assert "the first 2 are seen" in trellis.generate(images, trellis.options(steps=2)).warnings[0]
    assert trellis.generate(images, trellis.options(steps=2, multiimage="multidiffusion")).warnings == ()


def test_options_override_what_they_name(trellis):
    options = trellis.options(steps=5, cfg=2.0)
    assert (options.structure.steps, options.latents.strength) == (5, 2.0)
    assert options.structure.interval == trellis.defaults.structure.interval
    assert (trellis.options().structure.strength, trellis.options().latents.strength) == (7.5, 3.0)
    with pytest.raises(OptionError, match="multiimage"):
        trellis.options(multiimage="both")
    with pytest.raises(OptionError, match="steps"):
        trellis.options(steps=0)


def test_bad_images_are_refused(trellis):
    with pytest.raises(InputError, match="1 to 64 views"):
        trellis.generate([])
    with pytest.raises(InputError, match=r"\(N, H, W, 4\) uint8"):
        trellis.generate(torch.zeros(1, 8, 8, 3))
    with pytest.raises(InputError, match="view 1: the mask leaves nothing"):
        trellis.generate([photo(), Image.new("RGBA", (9, 9))])


def test_a_tensor_of_views_is_the_same_as_images(trellis):
    pixels = torch.frombuffer(bytearray(photo().tobytes()), dtype=torch.uint8).reshape(1, 70, 90, 4)
    torch.testing.assert_close(trellis.encode(pixels), trellis.encode([photo()]))


HALF_TURNS = [torch.tensor(d).diag() for d in ([1.0, -1, -1], [-1.0, 1, -1], [-1.0, -1, 1])]
ALMOST = torch.linalg.matrix_exp(torch.tensor([[0, -3.0, 0.9], [3, 0, -0.2], [-0.9, 0.2, 0]], dtype=torch.float64))


@pytest.mark.parametrize("turn", [Y_UP_FROM_Z_UP[:3, :3], *HALF_TURNS, ALMOST])
def test_gaussians_turn_with_their_frame(turn):
    generator = seeded()
    g = Gaussians(
        torch.randn(5, 3, generator=generator),
        torch.rand(5, 3),
        torch.rand(5, 3, generator=generator) + 0.1,
        torch.nn.functional.normalize(torch.randn(5, 4, generator=generator), dim=-1),
        torch.rand(5),
    )

    def covariance(g: Gaussians) -> torch.Tensor:
        w, x, y, z = g.rotations.unbind(-1)
        r = torch.stack(
            [
                torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)], -1),
                torch.stack([2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)], -1),
                torch.stack([2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)], -1),
            ],
            -2,
        )
        return r @ torch.diag_embed(g.scales**2) @ r.mT

    turned, turn = g.rotated(turn), turn.float()
    torch.testing.assert_close(turned.centers, g.centers @ turn.T)
    torch.testing.assert_close(covariance(turned), turn @ covariance(g) @ turn.T)


def test_reconviagen_fuses_views_into_one_mesh(folder):
    model = ReconViaGen.load(folder, vggt=folder / "vggt")
    result = model.generate([photo(i) for i in range(3)], model.options(steps=3), generator=seeded())
    result.mesh.validate()
    cameras = model.cameras([photo(i) for i in range(2)])
    assert len(cameras) == 2
    torch.testing.assert_close(cameras.world_from_camera[:, :3, :3].det(), torch.ones(2, dtype=torch.float64))
    with pytest.raises(InputError, match="1 to 32 views"):
        model.generate([photo()] * 33)


def test_vggt_poses_are_turned_to_our_axes():
    """A camera one unit along its own view direction (OpenCV +z) from the world's origin, unrotated."""
    pose = torch.tensor([[0, 0, 1.0, 0, 0, 0, 1, torch.pi / 2, torch.pi / 2]])
    cameras = cameras_of(pose, 100)
    torch.testing.assert_close(cameras.centers, torch.tensor([[0, 0, 1.0]], dtype=torch.float64))
    assert cameras.fy.item() == pytest.approx(50)
    pixel, depth = cameras.project(torch.zeros(1, 3, dtype=torch.float64))
    torch.testing.assert_close(pixel[0, 0], torch.tensor([50.0, 50.0], dtype=torch.float64))
    assert depth.item() == pytest.approx(1)


@pytest.mark.gpu
def test_the_compiled_networks_give_what_the_uncompiled_give(folder):
    model = Trellis.load(folder, device="cuda", dtype=torch.float32)
    conditions = torch.randn(3, 21, 32, generator=seeded()).cuda()

    def all_velocities():
        flow, x = model.networks.structure_flow, torch.randn(1, 8, 4, 4, 4, generator=seeded()).cuda()
        with torch.no_grad():
            for views in (stages.fused_views, stages.multidiffusion_views):
                for guided in (True, False):
                    yield views(flow, conditions)(x, torch.tensor([400.0]).cuda(), guided=guided, step=0)[0]

    before = list(all_velocities())
    batch = [Request(conditions[:n], seeded(n)) for n in (1, 2, 3)]
    options = model.options(steps=2)
    together = [one.mesh.vertices for one in model.generate_batch(batch, options)]
    assert {"structure_flow", "latent_flow in batches"} <= set(model.warm(multidiffusion=True, batches=True))
    torch.testing.assert_close(list(all_velocities()), before, rtol=1e-3, atol=1e-3)
    batch = [Request(conditions[:n], seeded(n)) for n in (1, 2, 3)]
    compiled = [one.mesh.vertices for one in model.generate_batch(batch, options)]
    torch.testing.assert_close(compiled, together, rtol=1e-3, atol=1e-3)


def test_warming_up_without_a_compiler_is_nothing(trellis):
    assert trellis.warm() == {}
