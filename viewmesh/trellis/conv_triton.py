"""Submanifold convolution as one Triton kernel: gathers neighbours straight into the matrix units.

The only importer of Triton here; `sparse.convolve` is the torch twin with the same meaning and runs itself when
`can_run` says no. Pays where the table of gathered neighbours would be many times the features: the mesh decoder's
fine levels.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU or a platform without Triton: the torch twin runs
    triton = None

if triton is not None:

    @triton.jit
    def _kernel(
        feats, table, weight, bias, out, L, S, COUT,
        C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ):  # fmt: skip
        rows = tl.program_id(0) * BM + tl.arange(0, BM)
        columns = tl.program_id(1) * BN + tl.arange(0, BN)
        inner = tl.arange(0, BK)
        total = tl.zeros((BM, BN), dtype=tl.float32)
        for tap in range(27):
            source = tl.load(table + rows * 27 + tap, mask=rows < L, other=S).to(tl.int64)
            for c in range(0, C, BK):
                a = tl.load(feats + source[:, None] * C + (c + inner)[None, :], mask=(source < S)[:, None], other=0.0)
                b = tl.load(
                    weight + columns[None, :] * (27 * C) + (tap * C + c + inner)[:, None],
                    mask=(columns < COUT)[None, :],
                    other=0.0,
                )
                total = tl.dot(a, b, total)
        total += tl.load(bias + columns, mask=columns < COUT, other=0.0).to(tl.float32)[None, :]
        at = out + rows[:, None].to(tl.int64) * COUT + columns[None, :]
        tl.store(at, total.to(out.dtype.element_ty), mask=(rows < L)[:, None] & (columns < COUT)[None, :])


def can_run(feats: Tensor, weight: Tensor) -> bool:
    """Half precision on CUDA, channels that fill the kernel's blocks, and a product too narrow for a plain GEMM."""
    return (
        feats.is_cuda
        and feats.dtype in (torch.float16, torch.bfloat16)
        and feats.shape[-1] % 32 == 0
        and weight.shape[0] <= 256
        and triton is not None
    )


def convolve(feats: Tensor, table: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """feats (S, C), table (L, 27) int32 of source rows (S for none), weight (Cout, 3, 3, 3, C) to (L, Cout)."""
    assert triton is not None
    (S, C), L, Cout = feats.shape, len(table), len(weight)
    out = feats.new_empty(L, Cout)
    BN = 64 if Cout % 64 == 0 else 128 if Cout > 64 else 32
    BK = 64 if C % 64 == 0 else 32
    grid = (triton.cdiv(L, 128), triton.cdiv(Cout, BN))
    _kernel[grid](  # type: ignore[reportIndexIssue]
        feats.contiguous(), table.contiguous(), weight.contiguous(), bias, out, L, S, Cout, C, 128, BN, BK,
        num_warps=8 if BN == 128 else 4, num_stages=3,
    )  # fmt: skip
    return out
