"""A safetensors file written, hashed and brought to the disk in one pass, for states of hundreds of megabytes.

The safetensors package needs all tensors on the CPU before it begins, and who wants the file's sha256 reads it again.
Format: https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.int32: "I32", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Writes the tensors, from any device, through to the disk; returns the file's sha256. Raises OSError.

    While one tensor comes from its device, those before it are hashed, written, and brought to the disk.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # so that all are aligned
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as file, ExitStack() as stack:
        hashing, writing, syncing = (stack.enter_context(ThreadPoolExecutor(1)) for _ in range(3))
        parts: list[Future[None]] = []

        def write(data: memoryview) -> None:
            while data:
                data = data[file.write(data) :]
            parts.append(syncing.submit(os.fsync, file.fileno()))

        head = memoryview(_header(ordered, metadata))
        parts += [hashing.submit(digest.update, head), writing.submit(write, head)]
        for _, tensor in ordered:
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            parts += [hashing.submit(digest.update, data), writing.submit(write, data)]
        hashing.shutdown()
        writing.shutdown()
        for part in parts:
            part.result()
    return digest.hexdigest()


def _header(ordered: list[tuple[str, Tensor]], metadata: dict[str, str]) -> bytes:
    entries, at = {}, 0
    for name, tensor in ordered:
        end = at + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps({"__metadata__": metadata, **entries}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
