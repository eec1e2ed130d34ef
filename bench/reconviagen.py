"""ReconViaGen's samplers beside TRELLIS': milliseconds per step, the sum of a run, and what the arithmetic allows.

    python bench/reconviagen.py [--views 4 16] [--compile] [--attention] [--tiny]

Flow networks of the published size with random weights, half precision on CUDA, 12,008 active voxels (a shell of radius
0.38 at 64³). Both models run ReconViaGen's schedule, 30 steps of structure and 12 of latents: what differs is what they
attend to. TRELLIS: one view of 1374 tokens. ReconViaGen: 4096 tokens gathered from all views, and every view's 1374.

--attention: also the cross-attention alone, all views in one call beside one call per view. --tiny: small networks and
few voxels, to see that it runs.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trellis import PUBLISHED, batched, random_state, shell

from viewmesh.trellis import tiny
from viewmesh.trellis.attention import attend, attend_to_context, prefer_attention_without_plans
from viewmesh.trellis.checkpoint import NETWORKS
from viewmesh.trellis.reconviagen import DEFAULTS
from viewmesh.trellis.samplers import guided_evaluations, sample, sparse_std
from viewmesh.trellis.slat_flow import SLatFlowModel
from viewmesh.trellis.sparse import Voxels
from viewmesh.trellis.stages import Networks
from viewmesh.trellis.structure import SparseStructureFlowModel
from viewmesh.trellis.transformer import FlowTransformer
from viewmesh.trellis.warm import compile_flows

FLOWS = ("sparse_structure_flow_model", "slat_flow_model")


@dataclass(frozen=True)
class Stage:
    """name; a flow network; noise to start from; the voxels of a sparse one; the schedule."""

    name: str
    flow: FlowTransformer
    noise: Tensor
    voxels: Voxels | None
    options: Any

    def velocity(self, condition: Tensor) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """condition: (1, N, T, C)."""
        return batched(self.flow, condition, self.voxels)

    def run(self, condition: Tensor) -> Tensor:
        std = None if self.voxels is None else sparse_std(self.voxels.counts)
        return sample(self.velocity(condition), self.noise, self.options, std=std)


@dataclass(frozen=True)
class Times:
    """Milliseconds of a step with guidance, of one without, and of a whole run."""

    guided: float
    plain: float
    run: float


class Clock:
    def __init__(self, device: torch.device, repeat: int) -> None:
        self.device, self.repeat = device, repeat

    def ms(self, work: Callable[[], Any], times: int = 1) -> float:
        """Median over `repeat` of the milliseconds that `times` calls take each."""
        work()
        found = []
        for _ in range(self.repeat):
            self._wait()
            began = time.perf_counter()
            for _ in range(times):
                work()
            self._wait()
            found.append(1e3 * (time.perf_counter() - began) / times)
        return statistics.median(found)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def times(self, stage: Stage, condition: Tensor) -> Times:
        velocity, t = stage.velocity(condition), torch.full((1,), 700.0, device=self.device)
        guided, plain = (
            self.ms(lambda on=on: velocity(stage.noise, t, guided=on, step=0), times=5) for on in (True, False)
        )
        return Times(guided, plain, self.ms(lambda: stage.run(condition)))


def network(role: str, small: bool, device: torch.device) -> FlowTransformer:
    kind, args = tiny.MODELS[role][1:] if small else PUBLISHED[role]
    with torch.device(device):
        made = NETWORKS[kind](**args)
    half = torch.float16 if device.type == "cuda" else torch.float32
    made.load_state_dict({k: v.to(device) for k, v in random_state(made, half).items()}, assign=True)
    return made.requires_grad_(False).eval()  # type: ignore[return-value]


def stages_of(small: bool, device: torch.device) -> tuple[Stage, Stage]:
    structure, latent = (network(role, small, device) for role in FLOWS)
    assert isinstance(structure, SparseStructureFlowModel)
    assert isinstance(latent, SLatFlowModel)
    coords, _ = shell(latent.resolution, 0.8 / latent.resolution, device)
    voxels = Voxels(torch.cat([torch.zeros_like(coords[:, :1]), coords], 1).int(), latent.resolution, (len(coords),))
    R = structure.resolution
    return (
        Stage("structure", structure, torch.randn(1, 8, R, R, R, device=device), None, DEFAULTS.structure),
        Stage("latents", latent, torch.randn(len(coords), 8, device=device), voxels, DEFAULTS.latents),
    )


def floor(flow: SLatFlowModel, fine: int, coarse: int, tokens: int) -> tuple[float, float]:
    """TFLOP of a guided TRELLIS step of the latents, and of what each further view adds to it: its attention alone.

    A multiply-add counts two, convolutions with all 27 taps, also the empty ones. Keys and values are made once, the
    unconditioned pass has no cross-attention, and views are averaged before the output projection.
    """
    C, B = flow.blocks[0].norm2.normalized_shape[0], len(flow.blocks)  # type: ignore[union-attr]
    token = 2 * (3 + 1 + 8) * C * C  # qkv, output, MLP of width 4
    cross = 2 * 2 * C * C  # query, output
    a_pass = B * coarse * (token + 4 * coarse * C)
    per_view = B * coarse * 4 * tokens * C
    w = flow.input_layer.out_features

    def convolutions(pairs: list[tuple[int, int, int]]) -> int:
        return sum(2 * 27 * voxels * a * b for voxels, a, b in pairs)

    once = convolutions([(fine, w, w), (fine, w, w), (coarse, w, C), (coarse, C, C)])
    each = convolutions([(fine, 2 * C, w), (fine, w, w), (fine, 2 * w, w), (fine, w, w)])
    guided = 2 * a_pass + B * coarse * cross + per_view + once + 2 * each
    return guided / 1e12, per_view / 1e12


def attention_variants(q: Tensor, kv: Tensor) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """q (1, L, H, D), kv (1, 1, N, 2, T, H, D): ways to the same average over views."""

    def one_by_one() -> Tensor:
        total = torch.zeros_like(q)
        for k, v in kv[0, 0]:
            total = total + attend(q, k[None], v[None])
        return total / kv.shape[2]

    def copied() -> Tensor:
        N = kv.shape[2]
        return attend(q.expand(N, -1, -1, -1).contiguous(), *kv[0, 0].unbind(1)).mean(0, keepdim=True)

    yield "all views in one call, as it ships", lambda: attend_to_context(q, kv, torch.tensor([q.shape[1]]))
    yield "all views in one call, queries copied", copied
    yield "one call per view", one_by_one
    yield "one view", lambda: attend(q, kv[:, 0, 0, 0], kv[:, 0, 0, 1])


def bench_attention(clock: Clock, flow: FlowTransformer, coarse: int, tokens: int, views: int) -> None:
    H, C = flow.blocks[0].cross_attn.heads, flow.blocks[0].norm2.normalized_shape[0]  # type: ignore[union-attr]
    q = torch.randn(1, coarse, H, C // H, device=clock.device, dtype=flow.dtype)
    kv = torch.randn(1, 1, views, 2, tokens, H, C // H, device=clock.device, dtype=flow.dtype)
    print(f"\ncross-attention of one block, {coarse} voxels to {views} views of {tokens} tokens")
    expected = None
    for name, run in attention_variants(q, kv):
        n = 1 if name == "one view" else views
        try:
            result = run()
            ms = clock.ms(run, times=10)
        except RuntimeError as error:
            print(f"  {name:40} {str(error).splitlines()[0]}")
            continue
        expected = result if expected is None else expected
        off = "" if n == 1 else f"   off by {float((result - expected).abs().max()):.1e}"
        print(f"  {name:40} {ms:8.3f} ms   {4 * coarse * tokens * C * n / ms / 1e9:6.0f} TFLOP/s{off}")


def table(clock: Clock, stages: tuple[Stage, Stage], views: list[int], tokens: int, gathered: int) -> None:
    C = stages[1].flow.cond_channels
    condition = lambda n, length: torch.randn(1, n, length, C, device=clock.device)  # noqa: E731
    shapes = {"TRELLIS": (condition(1, tokens), condition(1, tokens))}
    shapes |= {f"ReconViaGen, {n} views": (condition(1, gathered), condition(n, tokens)) for n in views}
    found: dict[str, list[Times]] = {}
    for model, conditions in shapes.items():
        found[model] = [clock.times(stage, given) for stage, given in zip(stages, conditions, strict=True)]
        sums = [sum(times.run for times in found[name]) for name in (model, "TRELLIS")]
        for stage, times, base in zip(stages, found[model], found["TRELLIS"], strict=True):
            n, on = stage.options.steps, guided_evaluations(stage.options)
            print(
                f"{model:22} {stage.name:10} {times.guided:8.2f} ms guided {times.plain:8.2f} ms plain "
                f"{times.run / n:8.2f} ms per step ({n} steps, {on} guided)   {times.run / base.run:5.2f} of TRELLIS"
            )
        print(f"{model:22} {'together':10} {sums[0]:8.1f} ms {'':38} {'':19} {sums[0] / sums[1]:5.2f} of TRELLIS")
    latents = stages[1]
    assert isinstance(latents.flow, SLatFlowModel)
    assert latents.voxels is not None
    step, per_view = floor(latents.flow, len(latents.voxels), len(latents.voxels.coarse), tokens)
    base = found["TRELLIS"][1].guided
    print(
        f"\na guided step of TRELLIS' latents: {step:.2f} TFLOP; each further view's attention: {per_view:.3f} "
        f"({100 * per_view / step:.1f} %)"
    )
    for n in views:
        least = 1 + (n - 1) * per_view / step
        ours = found[f"ReconViaGen, {n} views"][1].guided
        more = f", its attention runs at {(n - 1) * per_view / max(1e-9, ours - base) * 1e3:.0f} TFLOP/s"
        print(
            f"  {n:2} views: {least:.2f} at TRELLIS' own {step / base * 1e3:.0f} TFLOP/s; {ours / base:.2f} here{more}"
        )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--compile", action="store_true", help="also with the compiled networks")
    parser.add_argument("--attention", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        prefer_attention_without_plans()
    torch.manual_seed(0)
    stages = stages_of(arguments.tiny, device)
    clock = Clock(device, arguments.repeat)
    tokens, gathered = (21, 24) if arguments.tiny else (1374, 4096)
    voxels = stages[1].voxels
    assert voxels is not None
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {len(voxels)} voxels, {len(voxels.coarse)} in the transformer")
    if arguments.attention:
        for n in arguments.views:
            bench_attention(clock, stages[1].flow, len(voxels.coarse), tokens, n)
    for compiled in (False, True) if arguments.compile else (False,):
        print(f"\n--- {'compiled' if compiled else 'eager'}")
        if compiled:
            nothing = torch.zeros(8, device=device)
            flows: Any = (stages[0].flow, None, stages[1].flow, None, None)
            seconds = compile_flows(Networks(*flows, nothing, nothing), tokens=tokens, views=2)
            print(", ".join(f"{part} compiled in {s:.1f} s" for part, s in seconds.items()), flush=True)
        table(clock, stages, arguments.views, tokens, gathered)


if __name__ == "__main__":
    main()
