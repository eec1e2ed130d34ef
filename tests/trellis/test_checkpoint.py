"""A checkpoint is read whole or refused with a sentence."""

import gc
import json
import pickle
import shutil
from importlib.metadata import entry_points

import pytest
import torch
from safetensors.torch import load_file, save_file

from viewmesh.errors import InputError, MissingModel, OutOfMemory
from viewmesh.trellis import checkpoint
from viewmesh.trellis.checkpoint import load_network, locate, read_pipeline, storage_dtypes
from viewmesh.trellis.loading import Loaded
from viewmesh.trellis.pipeline import WORKSPACE_BYTES, Trellis
from viewmesh.trellis.reconviagen import ReconViaGen
from viewmesh.trellis.tiny import write_tiny_reconviagen, write_tiny_trellis

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_trellis(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture
def broken(tiny, tmp_path):
    """A copy to break."""
    return shutil.copytree(tiny, tmp_path / "checkpoint")


def test_a_network_is_the_files_tensors(tiny):
    network = load_network(tiny / "ckpts" / "ss_flow", CPU, torch.float32)
    state = load_file(tiny / "ckpts" / "ss_flow.safetensors")
    assert network.state_dict().keys() == state.keys()
    assert all(torch.equal(network.state_dict()[k], v) for k, v in state.items())
    assert not any(p.requires_grad for p in network.parameters())


def test_half_precision_is_for_the_torso_alone(tiny):
    network = load_network(tiny / "ckpts" / "slat_flow", CPU, torch.float16)
    dtypes = {k: v.dtype for k, v in network.state_dict().items()}
    assert dtypes["blocks.0.mlp.mlp.0.weight"] == dtypes["input_blocks.0.conv1.conv.weight"] == torch.float16
    for key in ("input_layer.weight", "out_layer.bias", "t_embedder.mlp.0.weight", "blocks.0.norm2.weight"):
        assert dtypes[key] == torch.float32
    assert dtypes["blocks.0.self_attn.q_rms_norm.gamma"] == torch.float32
    assert dtypes == storage_dtypes(network, torch.float16)


def rewrite(folder, change):
    path = folder / "ckpts" / "ss_flow.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.pop("out_layer.bias"), "lacks tensor out_layer.bias"),
        (lambda s: s.update(more=torch.zeros(1)), "has the unexpected tensor more"),
        (lambda s: s.update({"out_layer.bias": torch.zeros(3)}), r"tensor out_layer.bias has shape \(3,\)"),
    ],
)
def test_keys_and_shapes_are_strict(broken, change, sentence):
    rewrite(broken, change)
    with pytest.raises(InputError, match=sentence) as error:
        Trellis.load(broken)
    assert "ss_flow.safetensors" in str(error.value)


def test_a_truncated_file_is_refused(broken):
    path = broken / "ckpts" / "slat_flow.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        Trellis.load(broken)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("the pickle was opened",)


@pytest.mark.parametrize("protocol", ["pickle", "zip"])
def test_a_pickle_is_refused_unopened(broken, protocol):
    path = broken / "ckpts" / "ss_dec.safetensors"
    if protocol == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    else:
        torch.save(Bomb(), path)
    with pytest.raises(InputError, match="is a pickle"):
        Trellis.load(broken)


def test_a_pickled_encoder_that_is_more_than_tensors_is_refused(tiny, tmp_path):
    path = tmp_path / "dinov2_vitl14_reg4_pretrain.pth"
    torch.save({"cls_token": Bomb()}, path)
    with pytest.raises(InputError, match="is not a plain state dict"):
        Trellis.load(tiny, dino=path)


def test_missing_parts_are_named(broken):
    (broken / "ckpts" / "ss_dec.safetensors").unlink()
    with pytest.raises(MissingModel, match=r"ss_dec\.safetensors is missing") as error:
        Trellis.load(broken)
    assert "viewmesh weights download" in error.value.hint
    with pytest.raises(MissingModel, match="neither a folder nor a repository"):
        Trellis.load("nowhere-at-all")


def test_a_pipeline_without_a_field_is_refused(broken):
    pipeline = json.loads((broken / "pipeline.json").read_text())
    del pipeline["args"]["slat_normalization"]
    (broken / "pipeline.json").write_text(json.dumps(pipeline))
    with pytest.raises(InputError, match="lacks the field 'slat_normalization'"):
        Trellis.load(broken)


def test_a_role_with_another_network_is_refused(broken):
    for suffix in ("json", "safetensors"):
        shutil.copy(broken / "ckpts" / f"ss_dec.{suffix}", broken / "ckpts" / f"slat_flow.{suffix}")
    with pytest.raises(InputError, match="is a SparseStructureDecoder, expected a SLatFlowModel"):
        Trellis.load(broken)


def test_an_entry_may_lie_in_another_repository(tiny, tmp_path):
    (tmp_path / "pipeline.json").write_text((tiny / "pipeline.json").read_text())
    config = read_pipeline(tmp_path)
    found = locate(config, "some/repository/ckpts/ss_dec", {"some/repository": tiny}.get)
    assert found == tiny / "ckpts" / "ss_dec"
    with pytest.raises(MissingModel, match="from the repository other/repository") as error:
        locate(config, "other/repository/ckpts/ss_dec", {"some/repository": tiny}.get)
    scripts = entry_points(group="console_scripts")
    assert error.value.hint.split()[0] in {s.name for s in scripts if s.value.startswith("huggingface_hub")}


def test_too_little_memory_is_said_with_both_figures(tiny, monkeypatch):
    monkeypatch.setattr(checkpoint, "free_bytes", lambda device: 1 << 30)
    with pytest.raises(OutOfMemory, match=r"needs about 2\.0 GiB on cpu, 1\.0 GiB are free"):
        Trellis.load(tiny)


def networks_of(model) -> dict[str, torch.nn.Module]:
    return {**vars(model.networks), "encoder": model.encoder}


def test_two_models_share_the_networks_whose_files_are_the_same(tmp_path):
    """Of their own folders: the same bytes under the same configuration; one of another seed is loaded again."""
    first, two = write_tiny_trellis(tmp_path / "one"), write_tiny_reconviagen(tmp_path / "two")
    other = write_tiny_trellis(tmp_path / "other", seed=1) / "ckpts" / "slat_flow.safetensors"
    shutil.copy(other, two / "ckpts" / "slat_flow.safetensors")
    for suffix in ("json", "safetensors"):
        shutil.copy(first / "ckpts" / f"image_encoder.{suffix}", two / "ckpts" / f"image_encoder.{suffix}")
    args = json.loads((two / "ckpts" / "slat_dec_gs.json").read_text())
    (two / "ckpts" / "slat_dec_gs.json").write_text(json.dumps(args | {"note": "configured differently"}))
    loaded = Loaded()
    trellis = Trellis.load(first, loaded=loaded)
    both = ReconViaGen.load(two, vggt=two / "vggt", loaded=loaded)
    ours, theirs = networks_of(trellis), networks_of(both)
    shared = {
        name for name, network in ours.items() if isinstance(network, torch.nn.Module) and network is theirs[name]
    }
    assert shared == {"structure_flow", "structure_decoder", "mesh_decoder", "encoder"}
    state = load_file(other)
    assert all(torch.equal(t, state[name]) for name, t in both.networks.latent_flow.state_dict().items())
    alone = ReconViaGen.load(two, vggt=two / "vggt")
    assert networks_of(alone)["mesh_decoder"] is not theirs["mesh_decoder"]


def test_what_is_shared_is_not_counted_and_what_nobody_uses_is_gone(tiny, monkeypatch):
    loaded, said = Loaded(), []
    monkeypatch.setattr(checkpoint, "require_memory", lambda what, needed, device: said.append(needed))
    first = Trellis.load(tiny, loaded=loaded)
    second = Trellis.load(tiny, loaded=loaded)
    assert second.networks.latent_flow is first.networks.latent_flow
    files = sum(f.stat().st_size for f in (tiny / "ckpts").glob("*.safetensors"))
    assert said == [files + WORKSPACE_BYTES, WORKSPACE_BYTES]
    del first, second
    gc.collect()
    assert loaded.find(tiny / "ckpts" / "slat_flow.safetensors", CPU, None) is None
