"""From an RGBA view to the square image that each project's networks were shown in training, byte for byte.

The alpha channel says what the object is: matting is the caller's business.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from viewmesh.errors import InputError

SIZE = 518
OPAQUE = 0.8  # alpha above which a pixel belongs to the object


def _box(alpha: np.ndarray, name: str) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the object, inclusive."""
    rows, columns = np.nonzero(alpha > OPAQUE * 255)
    if len(rows) == 0:
        raise InputError(
            "the mask leaves nothing of the object.", file=name, hint="Give an alpha channel or a mask that covers it."
        )
    return int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max())


def trellis_image(image: Image.Image, *, size: int = SIZE, name: str = "") -> Image.Image:
    """RGBA of any size to RGB (size, size) on black: the object's box plus a fifth, squared, Lanczos.

    Raises InputError if no pixel's alpha is above 0.8.
    """
    image = image.convert("RGBA")
    left, top, right, bottom = _box(np.asarray(image)[..., 3], name)
    x, y = (left + right) / 2, (top + bottom) / 2
    half = max(1, int(max(right - left, bottom - top) * 1.2) // 2)
    # crop rounds half coordinates to even and pads with transparent black
    image = image.crop((x - half, y - half, x + half, y + half))  # type: ignore[arg-type]
    image = image.resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image).astype(np.float32) / 255
    return Image.fromarray((pixels[..., :3] * pixels[..., 3:] * 255).astype(np.uint8))


def _reconviagen_cut(alpha: np.ndarray, name: str) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what is shown of a view, exclusive."""
    left, top, right, bottom = _box(alpha, name)
    x, y = (left + right) / 2, (top + bottom) / 2
    half = max(1, int(max(right - left, bottom - top) * 1.1) // 2)
    height, width = alpha.shape
    return max(0, int(x - half)), max(0, int(y - half)), min(width, int(x + half)), min(height, int(y + half))


def reconviagen_window(alpha: np.ndarray, name: str = "") -> tuple[int, int, int]:
    """Left, top (of the square, may be negative) and side of what `reconviagen_image` shows, in the view's pixels."""
    left, top, right, bottom = _reconviagen_cut(alpha, name)
    side = max(right - left, bottom - top)
    return left - (side - (right - left)) // 2, top - (side - (bottom - top)) // 2, side


def reconviagen_image(image: Image.Image, *, size: int = SIZE, name: str = "") -> Image.Image:
    """RGBA of any size to RGBA (size, size): the object's box plus a tenth, cut at the border, centred on a square,
    bilinear without antialiasing; colour is black where alpha is at most 0.8.
    """
    pixels = np.asarray(image.convert("RGBA"))
    left, top, right, bottom = _reconviagen_cut(pixels[..., 3], name)
    cut = pixels[top:bottom, left:right]
    side = max(cut.shape[:2])
    square = np.zeros((side, side, 4), np.uint8)
    row, column = (side - cut.shape[0]) // 2, (side - cut.shape[1]) // 2
    square[row : row + cut.shape[0], column : column + cut.shape[1]] = cut
    values = torch.from_numpy(square).float().permute(2, 0, 1)[None] / 255
    values = F.interpolate(values, (size, size), mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    rgb = values[..., :3] * (values[..., 3:] > OPAQUE)
    return Image.fromarray((torch.cat([rgb, values[..., 3:]], -1) * 255).byte().numpy())


def image_tensor(image: Image.Image) -> Tensor:
    """A preprocessed image to (3, S, S) float32 in [0, 1]; an alpha channel is dropped."""
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1).float() / 255
