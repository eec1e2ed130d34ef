"""One attention function, and the shapes in which the networks call it.

Tokens of several items lie one after another in a row of L; `counts` (B,), on the CPU, says how many belong to each. A
leading dimension P holds passes over the same tokens (the conditioned and the unconditioned pass of guidance).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

WITHOUT_PLANS = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH


def prefer_attention_without_plans() -> None:
    """Puts cuDNN's kernel last among torch's attention kernels, where torch puts it first on Hopper. It is the fastest,
    by a fifth of a step of structure, but each thread plans it anew for each shape: for an object of another size 0.35
    s in the mesh decoder and 0.1 to 0.25 s in the latent flow, on an H100. A setting of the process, made once when a
    model is loaded onto CUDA; setting it per call costs more than the call."""
    _prefer(*WITHOUT_PLANS, SDPBackend.CUDNN_ATTENTION)


@contextmanager
def planned_attention() -> Iterator[None]:
    """cuDNN's kernel first, for what is recorded once and replayed. Other threads may meet it meanwhile, and plan."""
    _prefer(SDPBackend.CUDNN_ATTENTION, *WITHOUT_PLANS)
    try:
        yield
    finally:
        prefer_attention_without_plans()


def _prefer(*kernels: SDPBackend) -> None:
    torch._C._set_sdp_priority_order([int(kernel) for kernel in kernels])  # type: ignore[arg-type]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √D) v for q (B, L, H, D), k and v (B, T, H, D); mask (B, 1, 1, T) true where a key counts."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


# Opaque to the compiler: one compiled block then serves any number of items, of any lengths, and of views; and torch's
# kernel of attention is chosen by each call.
@torch.library.custom_op("viewmesh::attend_within_items", mutates_args=())
def attend_within_items(q: Tensor, k: Tensor, v: Tensor, counts: Tensor) -> Tensor:
    """Self-attention of each item's tokens among themselves; q, k, v (P, L, H, D), counts (B,) on the CPU, sum L."""
    lengths = counts.tolist()
    if len(set(lengths)) == 1:  # equal items are a batch
        shape = (q.shape[0] * len(lengths), lengths[0], *q.shape[2:])
        return attend(q.reshape(shape), k.reshape(shape), v.reshape(shape)).reshape(q.shape).contiguous()
    parts = zip(*(t.split(lengths, 1) for t in (q, k, v)), strict=True)
    return torch.cat([attend(*part) for part in parts], 1)


@torch.library.custom_op("viewmesh::attend_to_context", mutates_args=())
def attend_to_context(q: Tensor, kv: Tensor, counts: Tensor) -> Tensor:
    """Cross-attention of q (P, L, H, D) to kv (P, B, N, 2, T, H, D), averaged over the N views of each item."""
    lengths = counts.tolist()
    (P, B, N), L = kv.shape[:3], lengths[0]
    if len(set(lengths)) == 1:  # equal items are a batch
        many = q.reshape(P * B, 1, L, *q.shape[2:]).expand(-1, N, -1, -1, -1).flatten(0, 1)
        k, v = kv.flatten(0, 2).unbind(1)
        return attend(many, k, v).unflatten(0, (-1, N)).mean(1).reshape(q.shape).contiguous()
    outputs = []
    for item_q, item_kv in zip(q.split(lengths, 1), kv.unbind(1), strict=True):
        views = item_kv.unbind(1)
        total = attend(item_q, *views[0].unbind(1))
        for view in views[1:]:
            total = total + attend(item_q, *view.unbind(1))
        outputs.append(total / len(views) if len(views) > 1 else total)
    return torch.cat(outputs, 1)


@attend_within_items.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, counts: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@attend_to_context.register_fake
def _(q: Tensor, kv: Tensor, counts: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class WindowBucket:
    """Windows of at most m tokens. rows: (W, m) token rows, 0 where padded; mask: (W, 1, 1, m) true where real.

    slots: the flat positions in (W, m) that are real, tokens: the row of each.
    """

    rows: Tensor
    mask: Tensor
    slots: Tensor
    tokens: Tensor


def window_buckets(window: Tensor, smallest: int = 32) -> list[WindowBucket]:
    """Groups tokens by window id (L,), padding each window to the next power of two; one device-to-host copy."""
    order = window.argsort(stable=True)
    _, count = torch.unique_consecutive(window[order], return_counts=True)
    start = count.cumsum(0) - count
    sizes = count.tolist()
    buckets, low, m = [], 0, smallest
    while low < max(sizes):
        chosen = [i for i, n in enumerate(sizes) if low < n <= m]
        if chosen:
            pick = torch.tensor(chosen, device=window.device)
            at = torch.arange(m, device=window.device)
            real = at < count[pick][:, None]  # (W, m)
            rows = order[torch.where(real, start[pick][:, None] + at, 0)]
            slots = real.flatten().nonzero()[:, 0]
            buckets.append(WindowBucket(rows, real[:, None, None], slots, rows.flatten()[slots]))
        low, m = m, m * 2
    return buckets


def attend_within_windows(qkv: Tensor, buckets: Sequence[WindowBucket]) -> Tensor:
    """Self-attention of each window's tokens among themselves; qkv (L, 3, H, D) to (L, H, D)."""
    out = torch.empty_like(qkv[:, 0])
    for bucket in buckets:
        q, k, v = qkv[bucket.rows].unbind(2)  # (W, m, H, D)
        attended = attend(q, k, v, bucket.mask).flatten(0, 1)
        out[bucket.tokens] = attended[bucket.slots]
    return out
