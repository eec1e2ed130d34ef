"""The parity command, on fixtures computed here by naive twins that share no code with the package."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from viewmesh.trellis.parity import COUNTERPARTS, compare_fixture, main


def weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: (torch.randn(s, generator=generator) * 0.3).half() for k, s in shapes.items()}


def write(folder, name, kind, args, state, inputs, outputs):
    tensors = {f"weights/{k}": v for k, v in state.items()}
    tensors |= {f"input/{k}": v for k, v in inputs.items()} | {
        f"output/{k}": v.contiguous() for k, v in outputs.items()
    }
    save_file(tensors, folder / name, {"class": kind, "args": json.dumps(args)})


def attention(q, k, v, heads):
    """Loops over heads; q (L, C), k and v (T, C), float64."""
    D = q.shape[1] // heads
    out = torch.zeros_like(q)
    for h in range(heads):
        s = slice(h * D, (h + 1) * D)
        out[:, s] = torch.softmax(q[:, s] @ k[:, s].T / math.sqrt(D), 1) @ v[:, s]
    return out


def dino_fixture(folder):
    """DINOv2 with registers, patch by patch, float64."""
    C, P, S, H = 12, 4, 8, 3
    shapes = {
        "cls_token": (1, 1, C), "pos_embed": (1, 5, C), "register_tokens": (1, 2, C), "mask_token": (1, C),
        "patch_embed.proj.weight": (C, 3, P, P), "patch_embed.proj.bias": (C,),
        "norm.weight": (C,), "norm.bias": (C,),
    }  # fmt: skip
    for i in range(2):
        shapes |= {
            f"blocks.{i}.{k}": s
            for k, s in {
                "norm1.weight": (C,), "norm1.bias": (C,), "norm2.weight": (C,), "norm2.bias": (C,),
                "attn.qkv.weight": (3 * C, C), "attn.qkv.bias": (3 * C,),
                "attn.proj.weight": (C, C), "attn.proj.bias": (C,), "ls1.gamma": (C,), "ls2.gamma": (C,),
                "mlp.fc1.weight": (4 * C, C), "mlp.fc1.bias": (4 * C,),
                "mlp.fc2.weight": (C, 4 * C), "mlp.fc2.bias": (C,),
            }.items()
        }  # fmt: skip
    state = weights(shapes, 0)
    w = {k: v.double() for k, v in state.items()}
    image = torch.randn(1, 3, S, S, generator=torch.Generator().manual_seed(1))
    patches = [
        torch.einsum("chw,ochw->o", image[0, :, r : r + P, c : c + P].double(), w["patch_embed.proj.weight"])
        + w["patch_embed.proj.bias"]
        for r in (0, P)
        for c in (0, P)
    ]
    x = torch.stack([w["cls_token"][0, 0], *patches]) + w["pos_embed"][0]
    x = torch.cat([x[:1], w["register_tokens"][0], x[1:]])
    for i in range(2):
        b = {k.removeprefix(f"blocks.{i}."): v for k, v in w.items() if k.startswith(f"blocks.{i}.")}
        h = F.layer_norm(x, (C,), b["norm1.weight"], b["norm1.bias"], 1e-6)
        q, k, v = (h @ b["attn.qkv.weight"].T + b["attn.qkv.bias"]).split(C, 1)
        x = x + b["ls1.gamma"] * (attention(q, k, v, H) @ b["attn.proj.weight"].T + b["attn.proj.bias"])
        h = F.layer_norm(x, (C,), b["norm2.weight"], b["norm2.bias"], 1e-6)
        h = F.gelu(h @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"])
        x = x + b["ls2.gamma"] * (h @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"])
    args = {"img_size": S, "patch_size": P, "embed_dim": C, "depth": 2, "num_heads": H, "num_register_tokens": 2}
    write(folder, "DinoVisionTransformer.safetensors", "DinoVisionTransformer", args, state,
          {"images": image}, {"x_prenorm": x[None].float()})  # fmt: skip


def condition_fixture(folder):
    """The per-view condition of the latent stage, view by view."""
    C = 6
    state = weights({f"linear_blocks.{i}.0.weight": (C, 3 * C) for i in range(4)}, 2)
    state |= weights({f"linear_blocks.{i}.0.bias": (C,) for i in range(4)}, 3)
    image = torch.randn(1, 2, 7, C, generator=torch.Generator().manual_seed(4))
    vggt = {n: torch.randn(1, 2, 7, 2 * C, generator=torch.Generator().manual_seed(n)) for n in (4, 11, 17, 23)}
    c = image[0].double()
    for i, n in enumerate(vggt):
        both = torch.cat([vggt[n][0].double(), c], -1)
        linear = both @ state[f"linear_blocks.{i}.0.weight"].double().T + state[f"linear_blocks.{i}.0.bias"].double()
        c = linear.clamp(min=0) + image[0].double()
    write(folder, "ModulatedSLATMultiViewCond.small.safetensors", "ModulatedSLATMultiViewCond",
          {"channels": C, "ctx_channels": 3 * C}, state,
          {"image_cond": image} | {f"vggt{n}": v for n, v in vggt.items()}, {"cond": c.float()})  # fmt: skip


def preprocess_fixture(folder):
    """An opaque object already framed as TRELLIS frames it: nothing to resample, so the crop is the output."""
    pixels = np.zeros((700, 700, 4), np.uint8)
    side = 518 * 5 // 6 + 1  # 432 pixels between the ends: a frame of int(432 * 1.2 ...) = 518
    pixels[100 : 100 + side + 1, 50 : 50 + side + 1] = (90, 160, 250, 255)
    extent = side
    half = int(extent * 1.2) // 2
    cy, cx = 100 + extent / 2, 50 + extent / 2
    box = [round(v) for v in (cx - half, cy - half, cx + half, cy + half)]
    crop = Image.fromarray(pixels).crop(tuple(box))
    assert crop.size == (518, 518)
    expected = torch.from_numpy(np.asarray(crop)[..., :3].copy())
    write(folder, "preprocess_image.framed.safetensors", "preprocess_image", {}, {},
          {"image0": torch.from_numpy(pixels)}, {"trellis0": expected})  # fmt: skip


@pytest.fixture
def fixtures(tmp_path):
    dino_fixture(tmp_path)
    condition_fixture(tmp_path)
    preprocess_fixture(tmp_path)
    return tmp_path


def test_fixtures_of_independent_twins_pass(fixtures, capsys):
    assert main([str(fixtures)]) == 0
    printed = capsys.readouterr().out
    assert "3 files, all inside." in printed
    assert printed.count(" ok") == 3


def test_a_wrong_number_fails(fixtures, capsys):
    path = fixtures / "ModulatedSLATMultiViewCond.small.safetensors"
    tensors = load_file(path)
    tensors["output/cond"][0, 0, 0] += 1e-3 * tensors["output/cond"].abs().max()
    save_file(tensors, path, {"class": "ModulatedSLATMultiViewCond", "args": '{"channels": 6, "ctx_channels": 18}'})
    assert main([str(fixtures)]) == 1
    assert "OUTSIDE" in capsys.readouterr().out


def test_a_class_without_a_counterpart_fails(tmp_path, capsys):
    write(tmp_path, "Mystery.safetensors", "Mystery", {}, {}, {}, {"x": torch.zeros(1)})
    assert main([str(tmp_path)]) == 1
    assert "no counterpart of Mystery" in capsys.readouterr().out


def test_a_wrong_shape_a_missing_key_and_a_nan_fail(fixtures):
    path = fixtures / "DinoVisionTransformer.safetensors"
    tensors = load_file(path)
    args = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_register_tokens": 2}
    for key, value in (("output/x_prenorm", torch.zeros(2)), ("output/x_prenorm", torch.full((1, 7, 12), torch.nan))):
        save_file(tensors | {key: value}, path, {"class": "DinoVisionTransformer", "args": json.dumps(args)})
        assert not compare_fixture(path)[0].inside
    del tensors["weights/norm.bias"]
    save_file(tensors, path, {"class": "DinoVisionTransformer", "args": json.dumps(args)})
    (only,) = compare_fixture(path)
    assert not only.inside
    assert "norm.bias" in only.note or "Missing key" in only.note or "RuntimeError" in only.note


def test_an_empty_folder_fails(tmp_path):
    assert main([str(tmp_path)]) == 1


def test_every_published_network_has_a_counterpart():
    assert set(COUNTERPARTS) >= {
        "SparseStructureFlowModel", "SparseStructureDecoder", "SLatFlowModel", "SLatGaussianDecoder",
        "SLatMeshDecoder", "SparseFeatures2Mesh", "DinoVisionTransformer", "FlowEulerGuidanceIntervalSampler",
        "ModulatedMultiViewCond", "ModulatedSLATMultiViewCond", "Aggregator", "preprocess_image",
    }  # fmt: skip
