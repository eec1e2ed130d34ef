"""From dense meshes with colours to light textured ones: the laws; and the whole way, tiny checkpoint to files."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import grid_sample, normalize

from viewmesh.errors import Cancelled, MissingModel, OptionError
from viewmesh.geometry.clean import components, is_watertight
from viewmesh.geometry.dense import DenseSurface
from viewmesh.geometry.flexicubes import FlexiMesh
from viewmesh.geometry.gaussians import Gaussians
from viewmesh.geometry.mesh import Mesh
from viewmesh.geometry.nearest import NearestSurface
from viewmesh.geometry.normals import face_normals, vertex_normals, vertex_tangents
from viewmesh.options import Options
from viewmesh.render.tangent_space import from_tangent_space
from viewmesh.trellis.surface import surface_mesh
from viewmesh.trellis.texturing import clean, texture
from viewmesh.trellis.tiny import write_tiny_trellis

RADIUS = 0.4


def ball(rows: int, radius: float = RADIUS, center=(0.0, 0.0, 0.0), inward: bool = False) -> Mesh:
    """A closed sphere of 4 rows² faces or so, its colours a smooth function of position."""
    theta = math.pi * torch.arange(1, rows) / rows
    phi = math.pi * torch.arange(2 * rows) / rows
    t, p = torch.meshgrid(theta, phi, indexing="ij")
    ring = torch.stack([t.sin() * p.cos(), t.cos(), -t.sin() * p.sin()], -1).reshape(-1, 3)
    vertices = torch.cat([ring, torch.tensor([[0.0, 1, 0], [0, -1, 0]])]) * radius
    around, n = 2 * rows, len(ring)
    i, j = torch.meshgrid(torch.arange(rows - 2) * around, torch.arange(around), indexing="ij")
    a, b, c, d = i + j, i + (j + 1) % around, i + around + j, i + around + (j + 1) % around
    sides = torch.stack([a, c, b, b, c, d], -1).reshape(-1, 3)
    k = torch.arange(around)
    top = torch.stack([torch.full_like(k, n), k, (k + 1) % around], -1)
    last = (rows - 2) * around
    bottom = torch.stack([torch.full_like(k, n + 1), last + (k + 1) % around, last + k], -1)
    faces = torch.cat([sides, top, bottom])
    return Mesh(vertices + torch.tensor(center), faces.flip(-1) if inward else faces, color_at(vertices))


def color_at(points: torch.Tensor) -> torch.Tensor:
    """Linear RGB."""
    return 0.5 + 0.45 * torch.sin(points * torch.tensor([9.0, 7.0, 8.0]) + torch.tensor([0.0, 1.0, 2.0]))


def joined(*meshes: Mesh) -> Mesh:
    starts = np.cumsum([0] + [len(m.vertices) for m in meshes])
    return Mesh(
        torch.cat([m.vertices for m in meshes]),
        torch.cat([m.faces + int(s) for m, s in zip(meshes, starts, strict=False)]),
        torch.cat([m.vertex_colors for m in meshes if m.vertex_colors is not None]),
    )


def lookup(image: torch.Tensor, uv: torch.Tensor) -> torch.Tensor:
    at = grid_sample(image.permute(2, 0, 1)[None], (uv * 2 - 1)[None, None], align_corners=False, padding_mode="border")
    return at[0, :, 0].T


def on_faces(textured, weights=(0.2, 0.3, 0.5)) -> tuple[torch.Tensor, torch.Tensor]:
    """A point inside each face, and its UV."""
    w = torch.tensor(weights)[None, :, None]
    points = (textured.mesh.vertices[textured.mesh.faces] * w).sum(1)
    return points, (textured.uvs[textured.uv_faces] * w).sum(1)


@pytest.fixture(scope="module")
def textured():
    return texture(ball(120), target_faces=1500, texture_size=512).mesh  # from 57,000 faces


def test_the_texture_shows_the_dense_meshs_colours_where_they_were(textured):
    points, uv = on_faces(textured)
    error = (lookup(textured.material.base_color, uv) - color_at(normalize(points, dim=-1) * RADIUS)).abs()
    assert error.max() < 0.03
    assert error.mean() < 0.004
    # better than what the corners alone could say
    corners = color_at(normalize(textured.mesh.vertices, dim=-1) * RADIUS)[textured.mesh.faces]
    blended = (corners * torch.tensor([0.2, 0.3, 0.5])[None, :, None]).sum(1)
    assert error.mean() < 0.5 * (blended - color_at(normalize(points, dim=-1) * RADIUS)).abs().mean()


def test_the_light_mesh_is_the_dense_one_within_a_tolerance_and_as_closed(textured):
    assert is_watertight(textured.mesh)
    assert len(textured.mesh.faces) <= 1500
    points, _ = on_faces(textured)
    off = (points.norm(dim=-1) - RADIUS).abs()
    assert off.median() < 0.0015  # an edge is 0.06 long, its sagitta 0.001
    assert off.quantile(0.95) < 0.004
    assert off.max() < 0.01  # the poles are made of slivers
    assert (face_normals(textured.mesh.vertices, textured.mesh.faces) * points).sum(-1).min() > 0


def test_the_normal_map_brings_back_the_dense_meshs_normals(textured):
    mesh = textured.mesh
    points, uv = on_faces(textured)
    normals = vertex_normals(mesh.vertices, mesh.faces)
    tangents = vertex_tangents(mesh.vertices, mesh.faces, normals, textured.uvs, textured.uv_faces)
    w = torch.tensor([0.2, 0.3, 0.5])[None, :, None]
    n, t = (normals[mesh.faces] * w).sum(1), (tangents[textured.uv_faces] * w).sum(1)
    shading = from_tangent_space(normalize(lookup(textured.material.normal, uv), dim=-1), n, t)
    truth = normalize(points, dim=-1)
    mapped, bare = ((torch.linalg.cross(v, truth)).norm(dim=-1).mean() for v in (shading, normalize(n, dim=-1)))
    assert mapped < 0.6 * bare
    assert mapped < 0.01


def test_it_is_a_rough_dielectric(textured):
    assert textured.material.orm.reshape(-1, 3).unique(dim=0).tolist() == [[1.0, 1.0, 0.0]]


def test_floaters_and_what_no_camera_sees_are_dropped_and_small_holes_closed():
    outer, inner, crumb = ball(40), ball(30, 0.3, inward=True), ball(8, 0.01, (0.45, 0.45, 0.45))
    holed = Mesh(outer.vertices, outer.faces[3:], outer.vertex_colors)
    kept = clean(joined(holed, inner, crumb))
    assert int(components(kept).max()) == 0
    assert is_watertight(kept)
    assert kept.vertices.norm(dim=-1).min() > 0.39
    beside = joined(ball(20, 0.2, (0.25, 0, 0)), ball(20, 0.2, (-0.25, 0, 0)))
    assert int(components(clean(beside)).max()) == 1  # two parts that are seen both stay


def test_nearest_points_on_dense_meshes_are_those_of_the_exact_search():
    mesh, generator = ball(50), torch.Generator().manual_seed(0)
    directions = normalize(torch.randn(2000, 3, generator=generator), dim=-1)
    points = directions * (RADIUS + 0.01 * torch.randn(2000, 1, generator=generator))
    there, distance = DenseSurface(mesh).query(points, directions)
    exact, truth = NearestSurface(mesh).query(points)
    assert (distance - truth).max() < 2e-4
    assert (there.of(mesh.vertices, mesh.faces) - exact.of(mesh.vertices, mesh.faces)).norm(dim=-1).max() < 0.01
    assert there.barycentric.min() >= 0


def test_the_two_sides_of_a_thin_wall_do_not_bleed():
    front, back = ball(60, 0.4), ball(60, 0.398, inward=True)
    both = joined(front, back)
    colors = torch.zeros_like(both.vertices)
    colors[len(front.vertices) :, 0] = 1
    points = normalize(torch.randn(500, 3, generator=torch.Generator().manual_seed(1)), dim=-1)
    surface = DenseSurface(Mesh(both.vertices, both.faces, colors), candidates=8)
    for sign, red in ((1, 0.0), (-1, 1.0)):
        there, _ = surface.query(points * 0.399, points * sign)
        assert ((there.of(colors, both.faces)[:, 0] - red).abs() < 1e-5).float().mean() > 0.99


def test_it_can_be_stopped_between_its_parts():
    seen = []
    with pytest.raises(Cancelled):
        texture(ball(30), target_faces=500, texture_size=256, progress=lambda *a: seen.append(a),
                cancelled=lambda: len(seen) == 2)  # fmt: skip
    assert seen == [("texture", 1, 4), ("texture", 2, 4)]


# --- Gaussians as a file ---------------------------------------------------------------------------------------------


def test_gaussian_ply_reads_back_as_its_authors_code_reads_it(tmp_path):
    from viewmesh.export.splats import PROPERTIES, SH_DC, gaussian_ply_bytes

    g = torch.Generator().manual_seed(0)
    gaussians = Gaussians(
        torch.randn(50, 3, generator=g), torch.rand(50, 3, generator=g), torch.rand(50, 3, generator=g) * 0.01 + 1e-4,
        normalize(torch.randn(50, 4, generator=g), dim=-1), torch.rand(50, generator=g) * 0.9 + 0.05,
    )  # fmt: skip
    header, _, body = gaussian_ply_bytes(gaussians).partition(b"end_header\n")
    assert [line.split()[-1] for line in header.decode().splitlines() if line.startswith("property")] == [*PROPERTIES]
    rows = dict(zip(PROPERTIES, np.frombuffer(body, "<f4").reshape(50, -1).T, strict=True))

    def columns(*names):
        return torch.tensor(np.stack([rows[n] for n in names], 1))

    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(columns("x", "y", "z"), gaussians.centers, **close)
    torch.testing.assert_close(columns("f_dc_0", "f_dc_1", "f_dc_2") * SH_DC + 0.5, gaussians.colors, **close)
    torch.testing.assert_close(columns("scale_0", "scale_1", "scale_2").exp(), gaussians.scales, **close)
    torch.testing.assert_close(columns("opacity").sigmoid()[:, 0], gaussians.opacities, **close)
    torch.testing.assert_close(columns("rot_0", "rot_1", "rot_2", "rot_3"), gaussians.rotations, **close)


def test_nvdiffrec_refuses_gaussians():
    with pytest.raises(OptionError, match="gaussian_ply"):
        Options(formats=("glb", "gaussian_ply")).for_model("nvdiffrec")
    assert Options(formats=("gaussian_ply",)).for_model("trellis").model == "trellis"
    assert Options(refine=True).for_model("trellis").refine


# --- the whole way ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_tiny_trellis(tmp_path_factory.mktemp("tiny-trellis"))


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "capture" / "views"
    folder.mkdir(parents=True)
    y, x = np.mgrid[:64, :64]
    disc = (x - 32) ** 2 + (y - 30) ** 2 < 22**2
    for i in range(3):
        pixels = np.zeros((64, 64, 4), np.uint8)
        pixels[disc] = (40 * i, 200 - 30 * i, 90, 255)
        Image.fromarray(pixels).save(folder / f"view_{i:02d}.png")
    return folder.parent


def test_from_photos_without_cameras_to_files(weights, photos, tmp_path):
    from viewmesh.export.store import load_reconstruction
    from viewmesh.reconstruct import reconstruct

    told = []
    options = Options(
        model="trellis", steps=2, target_faces=400, texture_size=256, formats=("glb", "gaussian_ply"), seed=3
    )
    files = reconstruct(
        photos, tmp_path / "out", options, device="cpu", weights={"trellis": weights},
        progress=lambda stage, step, steps, **_: told.append((stage, step, steps)),
    )  # fmt: skip
    report = json.loads(files["report.json"].read_text())
    assert (report["model"], report["faces"], report["watertight"]) == ("trellis", 400, True)
    assert any("MIT" in note for note in report["licence_notes"])
    assert report["quality"] is None  # there are no cameras to compare with
    assert any("2 of the 3 views are used, evenly spaced" in warning for warning in report["warnings"])
    generated = [(step, steps) for stage, step, steps in told if stage == "generate"]
    assert generated == [(i, 9) for i in range(1, 10)]  # two samplers of two steps, the mesh, four of the texture
    stored = load_reconstruction(files["reconstruction.safetensors"])
    assert stored.gaussians is not None
    assert files["gaussians.ply"].read_bytes().startswith(b"ply")


def test_more_views_than_steps_are_thinned_evenly(weights, photos):
    """The sampler alone would look at the first ones: on a turntable, at one side of the object."""
    from viewmesh.generate import draft, load_model
    from viewmesh.views.load import load_views

    model = load_model("trellis", "cpu", {"trellis": weights})
    options = Options(model="trellis", steps=2)
    views = load_views(photos, options.view_rules)
    made, ends = draft(model, views, options), draft(model, views.select([0, 2]), options)
    assert torch.equal(made.mesh.vertices, ends.mesh.vertices)
    assert not torch.equal(made.mesh.vertices, draft(model, views.select([0, 1]), options).mesh.vertices)
    assert len(made.warnings) == len(ends.warnings) + 1


def test_missing_weights_are_a_sentence_with_the_command(photos, tmp_path):
    from viewmesh.reconstruct import reconstruct

    with pytest.raises(MissingModel) as caught:
        reconstruct(photos, tmp_path / "out", Options(model="trellis"), device="cpu", weights={"trellis": tmp_path})
    assert caught.value.hint == "viewmesh weights download trellis"


def test_a_reconviagen_result_says_that_it_is_not_for_commerce():
    from viewmesh.weights.ready import licence_notes

    assert "non-commercial" in licence_notes("reconviagen")[0]
    assert not any("non-commercial" in note for note in licence_notes("trellis"))


def test_auto_goes_by_cameras_views_and_what_is_there():
    from viewmesh.choose import choose

    assert choose(4, "file", generative=True).model == "nvdiffrec"
    assert choose(6, "canonical6", generative=True).model == "nvdiffrec"
    assert choose(20, "sfm", generative=True).model == "nvdiffrec"
    assert choose(4, "sfm", generative=True).model == "trellis"
    assert choose(4, "sfm", generative=False).model == "nvdiffrec"
    assert choose(20, None, generative=True).model == "trellis"
    with pytest.raises(MissingModel, match="without cameras"):
        choose(20, None, generative=False)


def test_auto_falls_back_to_trellis_when_no_poses_are_found(weights, photos, tmp_path, monkeypatch):
    from viewmesh import reconstruct as sentence
    from viewmesh.errors import PoseError

    def read(source, options, choice, progress, cancelled):
        if choice.model == "nvdiffrec":
            raise PoseError("2 of 9 views could not be posed.")
        return "views"

    class Saved:
        views, choice = tmp_path / "views.safetensors", tmp_path / "choice.json"

    monkeypatch.setattr(sentence, "survey", lambda *a: (9, "sfm"))
    monkeypatch.setattr(sentence, "read", read)
    monkeypatch.setattr(sentence, "save_viewset", lambda views, path: path.write_text(views))
    asked = {"device": torch.device("cpu"), "weights": {}, "progress": None, "cancelled": None}
    with pytest.raises(PoseError) as caught:
        sentence.prepare(photos, Options(), Saved, **asked)
    assert "viewmesh weights download trellis" in caught.value.hint
    monkeypatch.setattr(sentence, "can_generate", lambda *a: True)
    views, choice = sentence.prepare(photos, Options(), Saved, **asked)
    assert (views, choice.model) == ("views", "trellis")
    assert "could not be posed" in choice.because


def test_surface_mesh_and_its_texture_fit_together():
    """The decoder's own iso-surface: a ball in a lattice of 32³, its shell's inner side included."""
    from viewmesh.geometry.dual_tables import CORNERS
    from viewmesh.trellis.pipeline import y_up

    R = 32
    cells = torch.stack(torch.meshgrid(*[torch.arange(R)] * 3, indexing="ij"), -1).reshape(-1, 3)
    cells = cells[(((cells + 0.5) / R - 0.5).norm(dim=-1) - 0.35).abs() < 0.06]
    corners = (cells[:, None] + torch.tensor(CORNERS)) / R - 0.5
    feats = torch.zeros(len(cells), 101)
    feats[:, :8] = corners.norm(dim=-1) - 0.35
    made: FlexiMesh = surface_mesh(cells, feats, R)
    mesh = y_up(made)
    assert int(components(mesh).max()) >= 1
    done = texture(mesh, target_faces=600, texture_size=256).mesh
    assert int(components(done.mesh).max()) == 0
    assert done.mesh.vertices.norm(dim=-1).min() > 0.32
    grey = ((0.5 + 0.055) / 1.055) ** 2.4  # no colour at all is sRGB 0.5
    torch.testing.assert_close(done.material.base_color, torch.full((256, 256, 3), grey), rtol=0, atol=1e-4)
