"""The generative models in the service: who is served, what auto picks, and a job on a tiny checkpoint."""

import asyncio
import io
import json

import numpy as np
import pytest
import synthetic_views as synthetic
from known_crops import seeing, sfm_finding
from PIL import Image
from tiny_command import shrink

from serve_app import config
from serve_app.cli import DEFAULT_CONFIG
from serve_app.models import resolve, served
from serve_app.settings import AppArgs
from viewmesh import refine
from viewmesh.errors import MissingModel, OptionError
from viewmesh.nvdiffrec import register
from viewmesh.nvdiffrec.register import Plan
from viewmesh.options import Options
from viewmesh.trellis import checkpoint
from viewmesh.trellis.reconviagen import ReconViaGen
from viewmesh.trellis.tiny import write_tiny_reconviagen, write_tiny_trellis
from viewmesh.weights.ready import Readiness


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink(monkeypatch.setattr)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return str(write_tiny_trellis(tmp_path_factory.mktemp("tiny")))


def photos(count: int = 2) -> list[tuple[str, tuple[str, bytes]]]:
    y, x = np.mgrid[:48, :48]
    pixels = np.zeros((48, 48, 4), np.uint8)
    pixels[(x - 24) ** 2 + (y - 24) ** 2 < 18**2] = (200, 120, 40, 255)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return [("views", (f"view_{i:02d}.png", file.getvalue())) for i in range(count)]


WISHES = {"model": "trellis", "steps": 1, "target_faces": 300, "texture_size": 256}


async def test_a_job_on_a_tiny_checkpoint(fresh, weights):
    async with fresh(fake=None, device="cpu", models=["nvdiffrec", "trellis"], weights={"trellis": weights}) as running:
        found = {m["name"]: m for m in (await running.http.get("/v1/models")).json()["models"]}
        assert found["trellis"]["ready"]
        assert not found["reconviagen"]["ready"]
        assert "args.models" in found["reconviagen"]["hint"]
        wishes = {**WISHES, "formats": ["glb", "gaussian_ply"]}
        answer = await running.http.post(
            "/v1/reconstructions", files=photos(), data={"options": json.dumps(wishes)}, headers={"prefer": "wait=60"}
        )
        job = answer.json()
        assert job["state"] == "succeeded", job
        report = job["report"]
        assert (report["model"], report["faces"], report["quality"]) == ("trellis", 300, None)
        assert any("MIT" in note for note in report["licence_notes"])
        assert "generate.texture" in report["seconds"]
        assert report["generated_together"] == 1
        assert {"mesh.glb", "gaussians.ply"} <= {a["name"] for a in job["artifacts"]}
        told = [data for _, kind, data in await running.events(job["id"]) if kind == "progress"]
        percents = [data["percent"] for data in told if data["stage"] == "generate"]
        assert percents == sorted(percents)
        assert percents


async def test_refining_without_cameras_leaves_the_mesh_as_it_is(fresh, weights):
    async with fresh(fake=None, device="cpu", models=["nvdiffrec", "trellis"], weights={"trellis": weights}) as running:
        wishes = {**WISHES, "formats": ["glb", "gaussian_ply"], "refine": True, "views": {"cameras": "none"}}
        answer = await running.http.post(
            "/v1/reconstructions", files=photos(), data={"options": json.dumps(wishes)}, headers={"prefer": "wait=60"}
        )
        job = answer.json()
        assert job["state"] == "succeeded", job
        refinement = job["report"]["refinement"]
        assert not refinement["kept"]
        assert "no cameras" in refinement["reason"]
        assert refinement["reason"] in job["report"]["warnings"]
        assert "gaussians.ply" in {a["name"] for a in job["artifacts"]}


async def test_refining_with_cameras(fresh, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(refine, "PLAN", Plan(rotations=64, candidates=2, coarse_steps=1, finalists=1, fine_size=48))
    monkeypatch.setattr(register, "ENOUGH_IOU", 0.0)  # what a random network makes shows nothing
    synthetic.write_views(tmp_path, synthetic.around(6), size=(64, 64), f=96.0)
    files = [("views", (f.name, f.read_bytes())) for f in sorted((tmp_path / "views").iterdir())]
    files.append(("cameras", ("cameras.json", (tmp_path / "cameras.json").read_bytes())))
    async with fresh(fake=None, device="cpu", models=["nvdiffrec", "trellis"], weights={"trellis": weights}) as running:
        wishes = {**WISHES, "formats": ["glb", "gaussian_ply"], "refine": True}
        answer = await running.http.post(
            "/v1/reconstructions", files=files, data={"options": json.dumps(wishes)}, headers={"prefer": "wait=90"}
        )
        job = answer.json()
        assert job["state"] == "succeeded", job
        report = job["report"]
        found = report["refinement"]
        assert found["registration"]["scale"] > 0
        assert {"before", "after"} <= found.keys()
        assert report["quality"] is not None  # the mesh is among the cameras
        percents = [data["percent"] for _, kind, data in await running.events(job["id"]) if kind == "progress"]
        assert percents == sorted(percents)
        assert "gaussians.ply" in {a["name"] for a in job["artifacts"]}


async def test_the_cameras_that_reconviagen_refines_with(fresh, tmp_path, monkeypatch):
    """VGGT's of random weights and none from structure from motion: the mesh is handed out as it came. Then with those
    that structure from motion finds, then with VGGT's own."""
    monkeypatch.setattr(refine, "PLAN", Plan(rotations=64, candidates=2, coarse_steps=1, finalists=1, fine_size=48))
    monkeypatch.setattr(register, "ENOUGH_IOU", 0.0)
    folder, poses = write_tiny_reconviagen(tmp_path / "weights"), synthetic.around(6)
    synthetic.write_views(tmp_path, poses, size=(64, 64), f=96.0, cameras=None)
    synthetic.write_views(tmp_path / "posed", poses, size=(64, 64), f=96.0)
    files = [("views", (f.name, f.read_bytes())) for f in sorted((tmp_path / "views").iterdir())]
    places = {"reconviagen": str(folder), "vggt-object": str(folder / "vggt")}
    wishes = {**WISHES, "model": "reconviagen", "formats": ["glb"], "refine": True}

    async def report(running) -> dict:
        answer = await running.http.post(
            "/v1/reconstructions", files=files, data={"options": json.dumps(wishes)}, headers={"prefer": "wait=90"}
        )
        job = answer.json()
        assert job["state"] == "succeeded", answer.text
        percents = [data["percent"] for _, kind, data in await running.events(job["id"]) if kind == "progress"]
        assert percents == sorted(percents)
        return job["report"]

    async with fresh(fake=None, device="cpu", models=["nvdiffrec", "reconviagen"], weights=places) as running:
        found = await report(running)
        assert not found["refinement"]["kept"]
        assert refine.NO_VGGT_CAMERAS in found["warnings"]
        assert any("Nor did structure from motion help" in warning for warning in found["warnings"])
        assert "no cameras" in found["refinement"]["reason"]
        assert found["quality"] is None
        monkeypatch.setattr(refine, "load_views", sfm_finding(tmp_path / "posed"))
        found = await report(running)
        assert found["refinement"]["cameras"] == "sfm"
        assert found["refinement"]["after"] is not None
        assert refine.SFM_INSTEAD in found["warnings"]
        assert found["quality"]["views"] == 6
        monkeypatch.setattr(ReconViaGen, "cameras", seeing(poses, 96.0))
        found = await report(running)
        assert found["refinement"]["cameras"] == "vggt"
        assert found["refinement"]["after"] is not None
        assert found["quality"]["views"] == 6
        assert not any("VGGT" in warning for warning in found["warnings"])


async def test_one_worker_holds_both_models(fresh, tmp_path, weights):
    folder = write_tiny_reconviagen(tmp_path / "weights")
    places = {"trellis": weights, "reconviagen": str(folder), "vggt-object": str(folder / "vggt")}
    async with fresh(
        fake=None, device="cpu", models=["nvdiffrec", "trellis", "reconviagen"], weights=places
    ) as running:
        found = (await running.http.get("/v1/models")).json()["models"]
        assert all(model["ready"] for model in found), found

        async def revision(model: str) -> tuple[str, bool]:
            wishes = {**WISHES, "model": model, "formats": ["glb"]}
            answer = await running.http.post(
                "/v1/reconstructions",
                files=photos(),
                data={"options": json.dumps(wishes)},
                headers={"prefer": "wait=60"},
            )
            report = answer.json()["report"]
            return report["model"], any("non-commercial" in note for note in report["licence_notes"])

        made = await asyncio.gather(revision("trellis"), revision("reconviagen"))
        assert made == [("trellis", False), ("reconviagen", True)]


async def test_a_model_that_does_not_fit_is_told_with_both_figures_and_auto_does_without(fresh, weights, monkeypatch):
    """As on a GPU that is full when the model is to be loaded, and then is not."""
    free = 1 << 30
    monkeypatch.setattr(checkpoint, "free_bytes", lambda device: free)
    places = {"trellis": weights}
    async with fresh(fake=None, device="cpu", models=["nvdiffrec", "trellis"], weights=places) as running:
        told = {m["name"]: m for m in (await running.http.get("/v1/models")).json()["models"]}
        assert told["nvdiffrec"]["ready"]
        assert not told["trellis"]["ready"]
        assert "needs about 2.0 GiB on cpu, 1.0 GiB are free" in told["trellis"]["reason"]
        wishes = {"model": "auto", "views": {"cameras": "none"}}
        send = {"files": photos(), "headers": {"prefer": "wait=60"}}
        refused = await running.http.post("/v1/reconstructions", data={"options": json.dumps(wishes)}, **send)
        assert refused.status_code == 503, refused.text
        assert "1.0 GiB are free" in refused.json()["detail"]
        job = (await running.http.post("/v1/reconstructions", data={"options": "{}"}, **send)).json()
        assert job["model"] == "nvdiffrec"
        assert "not ready here" in job["chosen_because"]
        assert job["error"]["code"] == "unposed_views"
        free = 1 << 40
        named = {"options": json.dumps({**WISHES, "formats": ["glb"]})}
        job = (await running.http.post("/v1/reconstructions", data=named, **send)).json()
        assert job["state"] == "succeeded", job


def test_what_is_served(weights):
    assert list(served(AppArgs(weights={"trellis": weights}))) == ["nvdiffrec", "trellis"]
    assert list(served(AppArgs(fake={}, weights={"trellis": weights}))) == ["nvdiffrec"]
    assert list(served(AppArgs(models=["reconviagen"]))) == ["reconviagen"]
    assert "trellis" not in served(AppArgs(weights={"trellis": "/not/there"}))


def test_auto_goes_by_the_files(weights):
    args, four = AppArgs(weights={"trellis": weights}), [f"views/view_{i:02d}.png" for i in range(4)]
    many = [f"views/view_{i:02d}.png" for i in range(12)]

    def chosen(files, args=args, **options) -> tuple[str, str]:
        model, because = resolve(Options.model_validate(options), args, files)
        return model.name, because

    assert chosen(four) == ("trellis", "4 views without cameras are few for structure from motion")
    assert chosen([*four, "cameras.json"]) == ("nvdiffrec", "the views come with cameras")
    assert chosen(many) == ("nvdiffrec", "12 views are enough to find the cameras from")
    assert chosen(four, views={"rig": "canonical6"})[0] == "nvdiffrec"
    assert chosen(many, views={"cameras": "none"})[0] == "trellis"
    assert chosen(["archive.zip"]) == ("nvdiffrec", "views in an archive are taken to come with cameras")
    assert chosen(["archive.zip"], views={"cameras": "none"})[0] == "trellis"
    assert chosen(four, AppArgs(fake={}))[0] == "nvdiffrec"
    assert chosen(four, model="nvdiffrec") == ("nvdiffrec", "")
    with pytest.raises(OptionError, match="gaussian_ply"):
        resolve(Options(formats=("gaussian_ply",)), args, many)
    with pytest.raises(MissingModel):
        resolve(Options(model="reconviagen"), AppArgs(fake={}), four)
    with pytest.raises(MissingModel, match="Refining a mesh needs nvdiffrec"):
        resolve(Options(model="trellis", refine=True), AppArgs(models=["trellis"]), four)


def test_auto_does_not_wait_for_a_worker_that_does_not_start(weights):
    args, broken = AppArgs(weights={"trellis": weights}), {"trellis": Readiness(False, "No memory.", "Make some.")}
    four = [f"views/view_{i:02d}.png" for i in range(4)]
    model, because = resolve(Options(), args, four, broken)
    assert model.name == "nvdiffrec"
    assert "not ready here" in because
    with pytest.raises(MissingModel, match="No memory") as refused:
        resolve(Options.model_validate({"views": {"cameras": "none"}}), args, four, broken)
    assert refused.value.hint == "Make some."
    assert resolve(Options(model="trellis"), args, four, broken)[0].name == "trellis"


def test_the_configuration_makes_room_for_a_generative_model(weights):
    shipped = config.load(DEFAULT_CONFIG)
    shipped["applications"][0]["args"]["weights"] = {"trellis": weights}

    def asked(gpus: int) -> dict[str, float]:
        fitted = config.adapted(shipped, cpus=16, gpus=gpus)
        assert config.check(fitted) == []
        entries = fitted["applications"][0]["deployments"]
        return {d["name"]: d["ray_actor_options"].get("num_gpus", 0) for d in entries}

    assert asked(1)["Trellis"] == asked(1)["Nvdiffrec"] == 0.5
    assert asked(2)["Trellis"] == asked(2)["Nvdiffrec"] == 1
    assert "Trellis" not in asked(0)  # on a CPU it would take hours
    shipped["applications"][0]["args"]["models"] = ["nvdiffrec", "trellis"]
    assert asked(0)["Trellis"] == 0
    shipped["applications"][0]["args"]["models"] = ["nvdiffrec", "trellis", "reconviagen"]
    assert asked(2)["Trellis"] == asked(2)["Nvdiffrec"] == 1  # one worker for both models


@pytest.mark.parametrize(
    ("held", "sentence"),
    [
        (["trelis"], "there is no model 'trelis' (did you mean 'trellis'?)"),
        ([], "one or more of trellis, reconviagen"),
        ("trellis", "must be a list"),
        (["trellis", "reconviagen"], "reconviagen is not in args.models"),
        (["trellis"], ""),
    ],
)
def test_the_models_that_a_worker_shall_hold_are_checked(held, sentence):
    shipped = config.load(DEFAULT_CONFIG)
    application = shipped["applications"][0]
    application["args"]["models"] = ["nvdiffrec", "trellis"]
    application["deployments"].append({"name": "Trellis", "user_config": {"models": held}})
    found = config.check(shipped)
    assert any(sentence in one for one in found) if sentence else found == []
