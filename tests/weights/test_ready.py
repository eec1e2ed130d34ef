"""A model is ready where loading it would find its files, and not where it would not."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
from typer.testing import CliRunner

from viewmesh import doctor
from viewmesh.errors import MissingModel
from viewmesh.generate import load_model
from viewmesh.trellis.pipeline import Trellis
from viewmesh.trellis.reconviagen import ReconViaGen
from viewmesh.trellis.tiny import write_tiny_reconviagen, write_tiny_trellis
from viewmesh.weights import cli
from viewmesh.weights.manifest import DINOV2, TRELLIS, WeightSet
from viewmesh.weights.ready import SPARE_BYTES, readiness, vram_bytes
from viewmesh.weights.store import folder_of

SNAPSHOT = "models--microsoft--TRELLIS-image-large/snapshots/" + "a" * 40
ENTRIES = dict(zip(TRELLIS.roles, ("ss_flow_img_dit_L_16l8_fp16", "ss_dec_conv3d_16l8_fp16",
    "slat_flow_img_dit_L_64l8p2_fp16", "slat_dec_mesh_swin8_B_64l8m256c_fp16", "slat_dec_gs_swin8_B_64l8gs32_fp16",
), strict=True))  # fmt: skip


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is downloaded; the folder of a Hugging Face cache."""
    monkeypatch.setenv("VIEWMESH_WEIGHTS", str(tmp_path / "downloaded"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def write(folder: Path, weights: WeightSet, share: float = 1.0) -> Path:
    """The published files of a set, of their sizes where those are known, with nothing in them."""
    for file in weights.files:
        (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
        with (folder / file.path).open("wb") as sparse:
            sparse.truncate(int(file.size * share) if file.size else 1)
    if weights.roles:
        models = {role: f"ckpts/{name}" for role, name in ENTRIES.items()} | {"slat_decoder_rf": "ckpts/not_here"}
        (folder / "pipeline.json").write_text(json.dumps({"args": {"models": models}}))
    return folder


@pytest.fixture
def snapshot(hub: Path) -> Path:
    """TRELLIS as the hub's client keeps it, and DINOv2 as we do."""
    folder = write(hub / SNAPSHOT, TRELLIS)
    (folder.parent.parent / "refs").mkdir()
    (folder.parent.parent / "refs" / "main").write_text(folder.name)
    write(folder_of(DINOV2), DINOV2)
    return folder


def test_weights_in_hugging_faces_cache_are_not_called_missing(snapshot: Path):
    of = {finding.what: finding for finding in doctor.examine()}
    assert of["weights of trellis"].state == "ok"
    assert of["weights of reconviagen"].remedy == "viewmesh weights download reconviagen"
    listed = CliRunner().invoke(cli.app, ["list"])
    assert str(snapshot) in listed.output
    assert str(folder_of(TRELLIS)) in listed.output


@pytest.mark.parametrize("model", ["trellis", "reconviagen"])
def test_ready_is_what_can_be_loaded(model: str, tmp_path: Path):
    folder, vggt = tmp_path / "weights", tmp_path / "weights" / "vggt"
    write, load = {
        "trellis": (write_tiny_trellis, lambda: Trellis.load(folder)),
        "reconviagen": (write_tiny_reconviagen, lambda: ReconViaGen.load(folder, vggt=vggt)),
    }[model]
    write(folder)
    (folder / "more.safetensors").write_bytes(b"")  # nobody's
    places = {model: folder, "vggt-object": vggt}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        content = file.read_bytes()
        file.unlink()
        ready = readiness(model, places).ready
        if model == "trellis" or "vggt" in str(file.relative_to(folder)):  # the others are the same
            with nullcontext() if ready else pytest.raises(MissingModel):
                load()
        assert ready == (file.name == "more.safetensors")
        file.write_bytes(b"")
        assert ready == readiness(model, places).ready
        file.write_bytes(content)
    load()
    assert readiness(model, places).ready


def test_a_snapshot_counts_when_it_is_whole(snapshot: Path):
    assert readiness("trellis").ready
    assert vram_bytes("trellis") == TRELLIS.known_bytes + DINOV2.known_bytes + SPARE_BYTES
    file = snapshot / TRELLIS.files[2].path
    with file.open("r+b") as cut:
        cut.truncate(file.stat().st_size - 1)
    assert readiness("trellis").reason == f"{file} is missing or not whole."
    for other in TRELLIS.files[1:]:
        (snapshot / other.path).unlink()
    state = readiness("trellis")
    assert "(and 9 more)" in state.reason
    assert state.hint == "viewmesh weights download trellis"
    assert vram_bytes("trellis") == 0


def test_a_folder_in_another_precision_counts(tmp_path: Path):
    places = {"trellis": write(tmp_path / "half", TRELLIS, 0.5), "dinov2": write(tmp_path / "dino", DINOV2, 0.5)}
    assert readiness("trellis", places).ready


def test_networks_may_lie_in_another_repository(snapshot: Path, tmp_path: Path):
    models = {role: f"microsoft/TRELLIS-image-large/ckpts/{name}" for role, name in ENTRIES.items()}
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "pipeline.json").write_text(json.dumps({"args": {"models": models}}))
    places = {"trellis": tmp_path / "tuned"}
    assert readiness("trellis", places).ready
    (snapshot / TRELLIS.files[-1].path).unlink()
    assert str(snapshot / TRELLIS.files[-1].path) in readiness("trellis", places).reason


@pytest.mark.parametrize("text", ["{", "[]", '{"args": []}', '{"args": {"models": ["a"]}}', '{"args": {"models": {}}}'])
def test_a_pipeline_that_names_no_networks(text: str, snapshot: Path):
    (snapshot / "pipeline.json").write_text(text)
    assert "pipeline.json names no sparse_structure_flow_model (and 4 more)" in readiness("trellis").reason


def test_the_encoder_may_be_a_file(tmp_path: Path):
    folder = write_tiny_trellis(tmp_path / "weights")
    file = shutil.copytree(folder / "ckpts", tmp_path / "ckpts") / "image_encoder.safetensors"
    (folder / "ckpts" / "image_encoder.json").unlink()
    assert "dinov2" in readiness("trellis", {"trellis": folder}).reason
    model = load_model("trellis", "cpu", {"trellis": folder, "dinov2": file})
    assert model.encoder.tokens
    assert "is not a folder" in readiness("trellis", {"trellis": folder, "dinov2": tmp_path / "none"}).reason
    (tmp_path / "empty").mkdir()
    wrong = readiness("trellis", {"trellis": folder, "dinov2": tmp_path / "empty"}).reason
    assert wrong == f"{tmp_path / 'empty' / DINOV2.files[0].path} is missing or not whole."
