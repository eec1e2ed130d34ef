"""python -m viewmesh.trellis.parity DIR: our classes against fixtures computed elsewhere.

A fixture is `Class.safetensors` or `Class.case.safetensors`: tensors `weights/<state-dict key>`, `input/…`, `output/…`;
metadata `class` and `args` (JSON constructor arguments). Widths come from `args`; any DIR will do. The exit status is 1
when an error is above its tolerance or a fixture has no counterpart here.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from viewmesh.trellis import preprocess
from viewmesh.trellis.decoders import SLatGaussianDecoder, SLatMeshDecoder
from viewmesh.trellis.multiview import ModulatedMultiViewCond, ModulatedSLATMultiViewCond
from viewmesh.trellis.samplers import SamplerOptions, sample, sparse_std
from viewmesh.trellis.slat_flow import SLatFlowModel
from viewmesh.trellis.sparse import SparseTensor, Voxels
from viewmesh.trellis.split import fast_on
from viewmesh.trellis.structure import SparseStructureDecoder, SparseStructureFlowModel
from viewmesh.trellis.surface import surface_mesh
from viewmesh.trellis.vggt import USED_LAYERS, Aggregator
from viewmesh.trellis.vit import DinoVisionTransformer


@dataclass(frozen=True)
class Fixture:
    """One file. Tensors are on the device that is tested; weights are float32."""

    name: str
    kind: str
    args: dict[str, Any]
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


@dataclass(frozen=True)
class Comparison:
    """The largest error of an output, absolute and relative to the expected output's largest magnitude."""

    fixture: str
    output: str
    absolute: float
    relative: float
    tolerance: float
    note: str = ""

    @property
    def inside(self) -> bool:
        return self.relative <= self.tolerance


def read_fixture(path: Path, device: str) -> Fixture:
    with safe_open(path, framework="pt", device=device) as file:
        metadata = file.metadata() or {}
        groups: dict[str, dict[str, Tensor]] = {"weights": {}, "input": {}, "output": {}}
        for key in file.keys():  # noqa: SIM118  not a dict
            group, name = key.split("/", 1)
            groups[group][name] = file.get_tensor(key)
    weights = {k: v.float() if v.is_floating_point() else v for k, v in groups["weights"].items()}
    args = json.loads(metadata.get("args", "{}"))
    kind = metadata.get("class", path.name.split(".")[0])
    return Fixture(path.name, kind, args, weights, groups["input"], groups["output"])


def built(model: nn.Module, fixture: Fixture, device: str) -> nn.Module:
    model.to(device).eval().load_state_dict(fixture.weights, strict=True)
    return model


def _sparse(fixture: Fixture, resolution: int, feats: str = "feats") -> SparseTensor:
    return SparseTensor(fixture.inputs[feats], Voxels.of(fixture.inputs["coords"], resolution))


def _views(fixture: Fixture) -> Tensor:
    """`cond` (B, T, C), or cond0, cond1, … (1, T, C) each a view, as (1 pass, B, N, T, C)."""
    if "cond" in fixture.inputs:
        return fixture.inputs["cond"][None, :, None]
    n = sum(name.startswith("cond") for name in fixture.inputs)
    return torch.stack([fixture.inputs[f"cond{i}"] for i in range(n)], 1)[None]


def _structure_flow(f: Fixture, device: str) -> dict[str, Tensor]:
    model = built(SparseStructureFlowModel(**f.args), f, device)
    assert isinstance(model, SparseStructureFlowModel)
    return {"v": model(f.inputs["x"], f.inputs["t"], model.context(_views(f)))[0]}


def _structure_decoder(f: Fixture, device: str) -> dict[str, Tensor]:
    return {"occupancy_logits": built(SparseStructureDecoder(**f.args), f, device)(f.inputs["x"])}


def _slat_flow(f: Fixture, device: str) -> dict[str, Tensor]:
    model = built(SLatFlowModel(**f.args), f, device)
    assert isinstance(model, SLatFlowModel)
    return {"v": model(_sparse(f, model.resolution), f.inputs["t"], model.context(_views(f)))[0]}


def _gaussians(f: Fixture, device: str) -> dict[str, Tensor]:
    outputs = {}
    for i, g in enumerate(built(SLatGaussianDecoder(**f.args), f, device)(_sparse(f, f.args["resolution"]))):
        dc = (g.colors - 0.5) / 0.28209479177387814
        values = {"xyz": g.centers, "features_dc": dc, "scaling": g.scales, "rotation": g.rotations}
        outputs |= {f"{name}{i}": value for name, value in values.items()}
        outputs[f"opacity{i}"] = g.opacities[:, None]
    return outputs


def _mesh_channels(f: Fixture, device: str) -> dict[str, Tensor]:
    out = built(SLatMeshDecoder(**f.args), f, device)(_sparse(f, f.args["resolution"]))
    return {"coords": out.voxels.coords, "feats": out.feats}


def _surface(f: Fixture, device: str) -> dict[str, Tensor]:
    mesh = surface_mesh(f.inputs["coords"][:, -3:], f.inputs["feats"], f.args["res"])
    outputs = {"vertices": mesh.vertices, "faces": mesh.faces}
    return outputs if mesh.attributes is None else outputs | {"vertex_attrs": mesh.attributes}


def _dino(f: Fixture, device: str) -> dict[str, Tensor]:
    model = fast_on(torch.device(device), built(DinoVisionTransformer(**f.args), f, device))
    assert isinstance(model, DinoVisionTransformer)
    images = f.inputs["images"]
    return {"x_prenorm": model(images), "x_norm_patchtokens": model.patch_tokens(images)}


def _aggregator(f: Fixture, device: str) -> dict[str, Tensor]:
    tokens = built(Aggregator(**f.args), f, device)(f.inputs["images"])
    return {f"tokens{layer}": t for layer, t in zip(USED_LAYERS, tokens, strict=True)}


def _vggt_tokens(f: Fixture) -> list[Tensor]:
    return [f.inputs[f"vggt{layer}"] for layer in USED_LAYERS]


def _structure_condition(f: Fixture, device: str) -> dict[str, Tensor]:
    model = built(ModulatedMultiViewCond(**f.args), f, device)
    return {"cond": model(_vggt_tokens(f), f.inputs["image_cond"])}


def _latent_condition(f: Fixture, device: str) -> dict[str, Tensor]:
    model = ModulatedSLATMultiViewCond(**f.args).to(device).eval()
    if "weight_formula" in f.args:  # 0.02 sin(0.37 r + 0.11 c + 0.3 i), 0.05 cos(0.21 r + 0.3 i)
        rows = torch.arange(f.args["channels"], dtype=torch.float64)
        columns = torch.arange(f.args["ctx_channels"], dtype=torch.float64)
        for i in range(4):
            weight = 0.02 * torch.sin(0.37 * rows[:, None] + 0.11 * columns + 0.3 * i)
            f.weights[f"linear_blocks.{i}.0.weight"] = weight.float().to(device)
            f.weights[f"linear_blocks.{i}.0.bias"] = (0.05 * torch.cos(0.21 * rows + 0.3 * i)).float().to(device)
    model.load_state_dict(f.weights, strict=True)
    cond = model(_vggt_tokens(f), f.inputs["image_cond"])
    return {"cond": cond.reshape(f.outputs["cond"].shape)}


def _sampler(f: Fixture, device: str) -> dict[str, Tensor]:
    args, numbers = f.args["model"], f.args["sampler"]
    options = SamplerOptions(
        numbers["steps"],
        numbers["cfg_strength"],
        tuple(numbers["cfg_interval"]),
        numbers["rescale_t"],
        numbers.get("guidance_rescale", 0.0),
        "reconviagen" if "guidance_rescale" in numbers else "trellis",
        numbers["sigma_min"],
    )
    sparse = "io_block_channels" in args
    model = built((SLatFlowModel if sparse else SparseStructureFlowModel)(**args), f, device)
    assert isinstance(model, SLatFlowModel | SparseStructureFlowModel)
    negative = f.inputs.get("neg_cond")
    zero = negative is None or not bool(negative.any())
    context = model.context(_views(f), None if zero else negative[None, :, None], null=zero)  # type: ignore[index]
    positive = model.context(_views(f))
    voxels = Voxels.of(f.inputs["coords"], model.resolution) if sparse else None

    def velocity(x: Tensor, t: Tensor, *, guided: bool, step: int) -> tuple[Tensor, Tensor | None]:
        v = model(SparseTensor(x, voxels) if voxels else x, t, context if guided else positive)
        return v[0], v[1] if guided else None

    estimates: list[Tensor] = []
    noise = f.inputs["noise_feats" if sparse else "noise"]
    std = sparse_std(voxels.counts) if voxels else None
    samples = sample(velocity, noise, options, std=std, on_step=estimates.append)
    return {"samples": samples, "pred_x_0_last": estimates[-1]}


def _preprocess(f: Fixture, device: str) -> dict[str, Tensor]:
    rules = {"trellis": preprocess.trellis_image, "reconviagen": preprocess.reconviagen_image}
    outputs = {}
    for key in f.outputs:
        rule = key.rstrip("0123456789")
        image = Image.fromarray(f.inputs["image" + key[len(rule) :]].cpu().numpy())
        outputs[key] = torch.from_numpy(np.asarray(rules[rule](image)).copy())
    return outputs


COUNTERPARTS: dict[str, tuple[Callable[[Fixture, str], dict[str, Tensor]], float]] = {
    "SparseStructureFlowModel": (_structure_flow, 1e-5),
    "SparseStructureDecoder": (_structure_decoder, 1e-5),
    "SLatFlowModel": (_slat_flow, 1e-5),
    "SLatGaussianDecoder": (_gaussians, 1e-5),
    "SLatMeshDecoder": (_mesh_channels, 1e-5),
    "SparseFeatures2Mesh": (_surface, 1e-5),
    "DinoVisionTransformer": (_dino, 1e-5),
    "FlowEulerGuidanceIntervalSampler": (_sampler, 1e-4),
    "ModulatedMultiViewCond": (_structure_condition, 1e-5),
    "ModulatedSLATMultiViewCond": (_latent_condition, 1e-5),
    "Aggregator": (_aggregator, 1e-5),
    "preprocess_image": (_preprocess, 0.0),
}


def compare_fixture(path: Path, device: str = "cpu") -> list[Comparison]:
    """Every expected output of the file against ours; integers must be equal."""
    fixture = read_fixture(path, device)
    if fixture.kind not in COUNTERPARTS:
        return [Comparison(fixture.name, "-", math.inf, math.inf, 0.0, f"no counterpart of {fixture.kind}")]
    run, tolerance = COUNTERPARTS[fixture.kind]
    try:
        with torch.no_grad():
            outputs = run(fixture, device)
    except Exception as error:  # any failure of one file is a result, the others still run
        first_line = str(error).partition("\n")[0]
        return [Comparison(fixture.name, "-", math.inf, math.inf, tolerance, f"{type(error).__name__}: {first_line}")]
    return [
        compare(fixture.name, name, outputs.get(name), expected, tolerance)
        for name, expected in sorted(fixture.outputs.items())
    ]


def compare(fixture: str, name: str, ours: Tensor | None, expected: Tensor, tolerance: float) -> Comparison:
    if ours is None or ours.shape != expected.shape:
        shape = None if ours is None else tuple(ours.shape)
        note = f"shape {shape}, expected {tuple(expected.shape)}"
        return Comparison(fixture, name, math.inf, math.inf, tolerance, note)
    difference = (ours.cpu().double() - expected.cpu().double()).abs().max().item() if ours.numel() else 0.0
    if not expected.is_floating_point():
        return Comparison(fixture, name, difference, difference, 0.0)
    if not math.isfinite(difference):
        return Comparison(fixture, name, math.inf, math.inf, tolerance, "not finite")
    return Comparison(fixture, name, difference, difference / max(expected.abs().max().item(), 1e-30), tolerance)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m viewmesh.trellis.parity", description="Our networks against fixtures."
    )
    parser.add_argument("directory", type=Path, help="where the fixture files are")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    options = parser.parse_args(argv)
    paths = sorted(options.directory.glob("*.safetensors"))
    if not paths:
        print(f"{options.directory}: no *.safetensors file there.", file=sys.stderr)
        return 1
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    width = max(len(path.stem) for path in paths)
    print(f"{'file':{width}}  {'output':20} {'absolute':>10} {'relative':>10} {'tolerance':>10}")
    failed = 0
    for path in paths:
        for c in compare_fixture(path, options.device):
            failed += not c.inside
            verdict = "ok" if c.inside else f"OUTSIDE {c.note}"
            errors = f"{c.absolute:10.2e} {c.relative:10.2e} {c.tolerance:10.0e}"
            print(f"{path.stem:{width}}  {c.output:20} {errors} {verdict}")
    print(f"{len(paths)} files, {failed} outputs outside." if failed else f"{len(paths)} files, all inside.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
