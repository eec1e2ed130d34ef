"""Radiance .hdr pictures (RGBE, Ward 1991), written flat, read flat or run-length encoded; and environments as such.

A TexturedMesh's environment begins at -z. In a file the middle column is +x, with +z a quarter of the width to its
right: u = atan2(d.z, d.x) / 2π + 1/2, as three.js reads it, and Blender once it has turned +y up into +z up.
"""

import re

import numpy as np
import torch
from torch import Tensor

from viewmesh.errors import InputError


def environment_bytes(environment: Tensor) -> bytes:
    """environment: (H, W, 3) of a TexturedMesh, as a .hdr picture that lights its files from where it was lit."""
    return hdr_bytes(environment.roll(round(environment.shape[1] / 4), 1))


def read_environment(data: bytes, *, file: str = "environment.hdr") -> Tensor:
    """(H, W, 3) float32 as a TexturedMesh has it, to half a column if 4 does not divide W. Raises InputError."""
    image = read_hdr(data, file=file)
    return image.roll(-round(image.shape[1] / 4), 1)


def hdr_bytes(image: Tensor) -> bytes:
    """image: (H, W, 3) float linear radiance, row 0 at the top; negative values become 0."""
    rgb = image.detach().cpu().double().numpy().clip(0, 1e37)
    largest = rgb.max(-1)
    _, exponent = np.frexp(largest)
    scaled = np.rint(np.ldexp(rgb, 8 - exponent[..., None])).clip(0, 255)
    rgbe = np.concatenate([scaled, exponent[..., None] + 128.0], -1)
    rgbe[(largest < 1e-32)] = 0
    H, W = rgb.shape[:2]
    return f"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y {H} +X {W}\n".encode() + rgbe.astype(np.uint8).tobytes()


def read_hdr(data: bytes, *, file: str = "environment.hdr") -> Tensor:
    """(H, W, 3) float32. Raises InputError for anything else than a whole Radiance picture, top row first."""
    head = re.match(rb"#\?(?:RADIANCE|RGBE)\n.*?\n\n-Y (\d{1,5}) \+X (\d{1,5})\n", data, re.DOTALL)
    if head is None:
        raise InputError("is not a Radiance HDR picture with its rows from the top.", file=file)
    H, W = int(head[1]), int(head[2])
    body = np.frombuffer(data, np.uint8, offset=head.end())
    coded = 8 <= W < 32768 and len(body) >= 4 and body[0] == 2 and body[1] == 2 and int(body[2]) * 256 + body[3] == W
    try:
        rgbe = _decoded(body.tobytes(), H, W) if coded else body[: H * W * 4].reshape(H, W, 4)
    except (IndexError, ValueError):
        raise InputError(f"ends before its {H} rows of {W} pixels.", file=file) from None
    scale = np.ldexp(1.0, rgbe[..., 3].astype(np.int64) - 136) * (rgbe[..., 3] > 0)
    rgb = rgbe[..., :3] * scale[..., None]
    return torch.from_numpy(rgb.astype(np.float32))


def _decoded(body: bytes, H: int, W: int) -> np.ndarray:
    out, at = np.empty((H, 4, W), np.uint8), 0
    for row in range(H):
        at += 4
        for channel in range(4):
            x = 0
            while x < W:
                count = body[at]
                if count > 128:
                    out[row, channel, x : x + count - 128] = body[at + 1]
                    at, x = at + 2, x + count - 128
                else:
                    out[row, channel, x : x + count] = np.frombuffer(body[at + 1 : at + 1 + count], np.uint8)
                    at, x = at + 1 + count, x + max(count, 1)
    return out.transpose(0, 2, 1)
