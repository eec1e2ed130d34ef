"""Material maps as 8-bit images and PNG bytes. Base colour is sRGB; ORM and normals are stored as they are."""

from functools import cache, cached_property

import cv2
import numpy as np
import torch
from torch import Tensor

from viewmesh.geometry.mesh import Material
from viewmesh.render.shading import linear_to_srgb, srgb_to_linear


class Maps:
    """The maps of a material as every format stores them, and their PNGs: each made once, when first asked for."""

    def __init__(self, material: Material) -> None:
        self.images = quantised(material)
        self.png = cache(lambda name: png(self.images[name]))  # the same bytes for every file

    @cached_property
    def names(self) -> list[str]:
        """Of those that say something: a flat normal map does not."""
        return ["base_color", "orm"] + ([] if is_flat(self.images["normal"]) else ["normal"])


def quantised(material: Material) -> dict[str, np.ndarray]:
    """The maps by name, (H, W, 3) uint8, as every format stores them."""
    normal = torch.nn.functional.normalize(material.normal, dim=-1)
    return {
        "base_color": to_uint8(linear_to_srgb(material.base_color.clamp(0, 1))),
        "orm": to_uint8(material.orm),
        "normal": to_uint8(normal * (127 / 255) + 128 / 255),  # 128 is exactly flat
    }


def dequantised(maps: dict[str, np.ndarray]) -> Material:
    """The material whose `quantised` maps these are."""
    image = {name: torch.from_numpy(np.ascontiguousarray(m)).float() / 255 for name, m in maps.items()}
    normal = torch.nn.functional.normalize((image["normal"] - 128 / 255) * (255 / 127), dim=-1)
    return Material(srgb_to_linear(image["base_color"]), image["orm"], normal)


def is_flat(normal: np.ndarray) -> bool:
    """Whether a quantised normal map says nothing."""
    return bool((np.abs(normal.astype(np.int16) - np.array([128, 128, 255], np.int16)) <= 1).all())


def to_uint8(image: Tensor) -> np.ndarray:
    return (image.clamp(0, 1) * 255 + 0.5).to(torch.uint8).cpu().numpy()


def straight_uint8(rgba: Tensor) -> np.ndarray:
    """(H, W, 4) linear with premultiplied alpha to uint8 sRGB with straight alpha."""
    alpha = rgba[..., 3:].clamp(0, 1)
    straight = linear_to_srgb((rgba[..., :3] / alpha.clamp(min=1e-6)).clamp(0, 1))
    return to_uint8(torch.cat([straight, alpha], -1))


def png(image: np.ndarray) -> bytes:
    """(H, W, 3 or 4) uint8 RGB(A) as PNG."""
    code = cv2.COLOR_RGB2BGR if image.shape[-1] == 3 else cv2.COLOR_RGBA2BGRA
    done, data = cv2.imencode(".png", cv2.cvtColor(np.ascontiguousarray(image), code))
    if not done:
        raise ValueError(f"could not encode an image of shape {image.shape} as PNG")
    return data.tobytes()


def unpng(data: bytes) -> np.ndarray:
    """The reverse of `png`. Raises ValueError for anything else."""
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:  # for no bytes at all, and for sizes beyond its limits
        image = None
    if image is None or image.dtype != np.uint8 or image.ndim != 3:
        raise ValueError("not a PNG image of three or four channels of 8 bits")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB if image.shape[-1] == 3 else cv2.COLOR_BGRA2RGBA)
