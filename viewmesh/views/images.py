"""One image file, untrusted, to pixels. Knows Pillow, EXIF and ICC profiles; does not know cameras or masks."""

import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from viewmesh.errors import InputError
from viewmesh.views.limits import Limits

FORMATS = ("PNG", "JPEG", "WEBP")
SENSOR_WIDTH_35MM = 36.0  # mm, what EXIF's 35 mm equivalent focal length refers to
_ORIENTATION, _FOCAL_35MM, _EXIF_IFD = 0x0112, 0xA405, 0x8769
_SWAPS_SIDES = (5, 6, 7, 8)
_COLOURS = np.stack(np.meshgrid(*[np.linspace(0, 255, 9)] * 3), -1).reshape(27, 27, 3).astype(np.uint8)
_SAME_LEVELS = 3  # apart: so much profiles of sRGB itself are, by the rounding of their matrices


@dataclass(frozen=True)
class Pixels:
    """rgb: (H, W, 3) uint8 sRGB. alpha: (H, W) uint8 straight, None if the file has none.
    focal_px: the EXIF focal length in pixels of these pixels, None if unknown."""

    rgb: np.ndarray
    alpha: np.ndarray | None
    focal_px: float | None = None


def read_photo(
    path: Path, name: str, limits: Limits, *, posed: bool = False, declared: tuple[int, int] | None = None
) -> Pixels:
    """Decodes a photo to sRGB (ICC profile applied) and upright (EXIF orientation applied); one that a camera file has
    posed as its pose has it.

    posed: its pose is a camera file's. COLMAP and nerfstudio do not look at EXIF: such a pose is of the stored pixels,
    unless declared, the (width, height) that the file gives this view, is the upright size and not the stored one.
    Raises InputError.
    """
    image = _decoded(path, name, limits)
    exif = _exif(image)
    orientation = exif.get(_ORIENTATION, 1)
    stored = posed and not (orientation in _SWAPS_SIDES and image.size != declared == image.size[::-1])
    if orientation != 1 and not stored:
        image = ImageOps.exif_transpose(image)
    rgb, alpha = _rgb_alpha(image)
    return Pixels(_in_srgb(rgb, image.info.get("icc_profile")), alpha, _focal_px(exif, image.size))


def read_mask(path: Path, name: str, limits: Limits) -> np.ndarray:
    """A mask file as coverage (H, W) uint8: its alpha channel if that says anything, else its brightness.

    Of two values, one of them 0, the other one is the object, however dark: 0 and 1 or a label's colour are common.
    Raises InputError, also if the brightest of more values is too dark to be an object.
    """
    image = _decoded(path, name, limits)
    rgb, alpha = _rgb_alpha(image)
    if alpha is not None and alpha.min() < 255:
        return alpha
    coverage = rgb.max(-1)
    values = np.asarray(image) if image.mode.startswith("I") else coverage
    top = int(values.max())
    if top == 1 or (values.min() == 0 and ((values == 0) | (values == top)).all()):
        return np.where(values > 0, np.uint8(255), np.uint8(0))
    if coverage.max() < 128:
        raise InputError(
            f"the brightest value of the mask is {top}, which is no object; mark the object white "
            f"({255 if values is coverage else 65535}).",
            file=name,
        )
    return coverage


def read_depth_integers(path: Path, name: str, limits: Limits) -> np.ndarray:
    """A 16-bit greyscale PNG as (H, W) uint16. Raises InputError for anything else."""
    image = _decoded(path, name, limits, formats=("PNG",))
    if not image.mode.startswith("I;16") and image.mode != "I":
        raise InputError(
            f"depth must be a 16-bit greyscale PNG, this one has mode {image.mode}; write the depth divided by "
            "depth_unit_scale as uint16.",
            file=name,
            hint="Save depth / depth_unit_scale as a 16-bit PNG.",
        )
    return np.asarray(image).astype(np.uint16)


def _decoded(path: Path, name: str, limits: Limits, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    try:
        size = path.stat().st_size
    except OSError:
        raise InputError("the file is not there; add it or correct its name.", file=name) from None
    if size > limits.file_bytes:
        raise InputError(
            f"the file has {size / 2**20:.0f} MiB, at most {limits.file_bytes / 2**20:.0f} MiB are read; "
            "save it smaller.",
            file=name,
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=formats) as image:
                _check_size(image, name, limits)
                image.load()
                return image
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels(name, limits, "far too many pixels") from None
    except Image.UnidentifiedImageError:
        expected = "a PNG" if formats == ("PNG",) else "a PNG, JPEG or WebP image"
        raise InputError(f"this is not {expected}; convert it to {expected}.", file=name) from None
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        raise InputError(
            f"the image is damaged or truncated ({_brief(error)}); save or upload it again.", file=name
        ) from None


def _check_size(image: Image.Image, name: str, limits: Limits) -> None:
    width, height = image.size
    if width * height > limits.pixels:
        raise _too_many_pixels(name, limits, f"{width} x {height} pixels")
    if min(width, height) < limits.min_side:
        raise InputError(
            f"the image is {width} x {height} pixels, at least {limits.min_side} on each side are needed; "
            "give a larger one.",
            file=name,
        )
    if getattr(image, "n_frames", 1) != 1 and image.format != "MPO":  # phones add gain maps to a JPEG, as MPO
        raise InputError("the image is animated; save one frame of it as a still image.", file=name)


def _too_many_pixels(name: str, limits: Limits, size: str) -> InputError:
    return InputError(
        f"the image has {size}, at most {limits.pixels / 1e6:.0f} million are read; scale it down.", file=name
    )


def _rgb_alpha(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    if image.mode.startswith("I"):  # 16-bit grey
        grey = (np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, -1), None
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA"))
        return np.ascontiguousarray(rgba[..., :3]), np.ascontiguousarray(rgba[..., 3])
    return np.array(image.convert("RGB")), None


def _in_srgb(rgb: np.ndarray, profile: bytes | None) -> np.ndarray:
    """(H, W, 3) uint8 sRGB of the colours that an ICC profile gives a meaning; as they are where it is sRGB's own, none
    of RGB, or broken."""
    if not profile:
        return rgb
    try:
        to_srgb = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            "RGB",
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
        )
        if np.abs(_transformed(_COLOURS, to_srgb).astype(int) - _COLOURS).max() <= _SAME_LEVELS:
            return rgb
        return _transformed(rgb, to_srgb)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return rgb


def _transformed(rgb: np.ndarray, transform: ImageCms.ImageCmsTransform) -> np.ndarray:
    image = Image.fromarray(rgb)
    ImageCms.applyTransform(image, transform, inPlace=True)
    return np.array(image)


def _exif(image: Image.Image) -> dict:
    try:
        exif = image.getexif()
        return {**exif, **exif.get_ifd(_EXIF_IFD)}
    except Exception:  # a photo is no worse for a broken EXIF block
        return {}


def _focal_px(exif: dict, size: tuple[int, int]) -> float | None:
    try:
        focal = float(exif.get(_FOCAL_35MM, 0))
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return focal / SENSOR_WIDTH_35MM * max(size) if 5 <= focal <= 1000 else None


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:80] or type(error).__name__
