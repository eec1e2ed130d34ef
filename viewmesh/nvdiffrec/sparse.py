"""Tensors that are mostly zero as few bytes, without loss: their blocks that are not.

Most of a fit's lattice and material volume is never near the surface, and Adam leaves what had no gradient at zero.
"""

import torch
from torch import Tensor

BLOCK = 8  # elements: as many bools as an int64 has bytes
SMALLEST = 2**14  # elements; below, a tensor is left as it is

Contents = dict[str, list[int] | None]  # in the tensors' order; the shapes of those that were taken apart


def packed(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Contents]:
    """The same as fewer bytes, on the same device, and what to make of them.

    NAME becomes `NAME.blocks` (K, BLOCK) and `NAME.at` (K,) int32. A tensor that is not float32, is small, or has half
    of its blocks in use stays what it is: taking it apart would take longer than writing it. Zero is the number whose
    bits are: -0.0 and NaN come back as they went.
    """
    named: dict[str, Tensor] = {}
    contents: Contents = {}
    for name, tensor in tensors.items():
        made = _blocks(tensor)
        contents[name] = None if made is None else list(tensor.shape)
        named |= {name: tensor} if made is None else {f"{name}.blocks": made[0], f"{name}.at": made[1]}
    return named, contents


def unpacked(tensors: dict[str, Tensor], contents: Contents) -> dict[str, Tensor]:
    """What `packed` was given, in its order. Raises KeyError where a tensor is missing."""
    named = {}
    for name, shape in contents.items():
        if shape is None:
            named[name] = tensors[name]
            continue
        blocks, at = tensors[f"{name}.blocks"], tensors[f"{name}.at"]
        count = torch.Size(shape).numel()
        whole = blocks.new_zeros(-(-count // BLOCK), BLOCK)
        named[name] = whole.index_copy_(0, at.long(), blocks).view(-1)[:count].view(shape)
    return named


def _blocks(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    count = tensor.numel()
    if tensor.dtype != torch.float32 or count < SMALLEST:
        return None
    flat = tensor.detach().reshape(-1)
    if count % BLOCK:
        flat = torch.nn.functional.pad(flat, (0, BLOCK - count % BLOCK))
    some = (flat.view(torch.int32) != 0).view(torch.int64) != 0
    if 2 * int(some.count_nonzero()) > len(some):
        return None
    at = some.nonzero()[:, 0]
    return flat.view(-1, BLOCK).index_select(0, at), at.int()
