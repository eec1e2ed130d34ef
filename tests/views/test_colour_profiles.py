"""ICC profiles of photos: colours come out as sRGB has them, by the primaries' matrices in float64."""

import struct
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image, ImageCms

from viewmesh.views.images import Pixels, read_mask, read_photo
from viewmesh.views.limits import Limits

D65, D50 = (0.3127, 0.3290), (0.3457, 0.3585)
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
SRGB_PRIMARIES = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
P3_PRIMARIES = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
ADOBE_PRIMARIES = ((0.640, 0.330), (0.210, 0.710), (0.150, 0.060))
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)  # ICC's parametric curve of type 3: g, a, b, c, d
ADOBE_CURVE = (563 / 256, 1.0, 0.0, 1.0, 0.0)


def xyz(x: float, y: float) -> np.ndarray:
    return np.array([x / y, 1.0, (1 - x - y) / y])


def xyz_from_linear(primaries) -> np.ndarray:
    """(3, 3) under D65."""
    columns = np.stack([xyz(*p) for p in primaries], 1)
    return columns * np.linalg.solve(columns, xyz(*D65))


def linear(values: np.ndarray, curve) -> np.ndarray:
    g, a, b, c, d = curve
    return np.where(values >= d, np.maximum(a * values + b, 0) ** g, c * values)


def as_srgb(rgb: np.ndarray, primaries, curve) -> np.ndarray:
    """Levels (float64) of 8-bit colours (..., 3)."""
    turn = np.linalg.inv(xyz_from_linear(SRGB_PRIMARIES)) @ xyz_from_linear(primaries)
    light = np.clip(linear(rgb / 255, curve) @ turn.T, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def profile(primaries, curve, *, space: bytes = b"RGB ", digits: int = 9) -> bytes:
    """A display's ICC profile of version 4: its primaries' matrix, adapted to D50 and rounded to so many digits, and
    one curve for all."""

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(v * 65536) for v in values))

    cones = [BRADFORD @ xyz(*white) for white in (D65, D50)]
    adapted = np.linalg.inv(BRADFORD) @ np.diag(cones[1] / cones[0]) @ BRADFORD @ xyz_from_linear(primaries)
    text = b"mluc" + bytes(4) + struct.pack(">IIHHII", 1, 12, 0x656E, 0x5553, 2, 28) + b"\0x"
    curve_tag = b"para" + bytes(4) + struct.pack(">HH", 3, 0) + fixed(*curve)
    tags = {b"desc": text, b"cprt": text, b"wtpt": b"XYZ " + bytes(4) + fixed(*xyz(*D50))}
    for name, column in zip((b"r", b"g", b"b"), adapted.T.round(digits), strict=True):
        tags |= {name + b"XYZ": b"XYZ " + bytes(4) + fixed(*column), name + b"TRC": curve_tag}
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", 128 + len(table) + len(body), bytes(4), 0x04000000, b"mntr", space, b"XYZ ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(*xyz(*D50))
    return head.ljust(128, b"\0") + table + body


PROFILES = {"Display P3": (P3_PRIMARIES, SRGB_CURVE), "Adobe RGB": (ADOBE_PRIMARIES, ADOBE_CURVE)}
KINDS = {"PNG": {}, "WEBP": {"lossless": True, "exact": True}, "JPEG": {"quality": 90}}


def photo(kind: str) -> Image.Image:
    """All colours, in patches as large as JPEG's blocks; with an alpha channel where the kind has one."""
    levels = np.linspace(0, 255, 6).astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(12, 18, 3)
    rgb = colours.repeat(16, 0).repeat(16, 1)
    alpha = np.tile(np.arange(288) % 256, (192, 1)).astype(np.uint8)
    return Image.fromarray(rgb if kind == "JPEG" else np.dstack([rgb, alpha]))


def written(folder: Path, kind: str, icc: bytes | None, exif: Image.Exif | None = None) -> Pixels:
    path = folder / f"photo.{kind.lower()}"
    photo(kind).save(path, kind, icc_profile=icc, exif=exif or Image.Exif(), **KINDS[kind])
    return read_photo(path, path.name, Limits())


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("kind", KINDS)
def test_photos_of_other_colour_spaces_become_srgb(tmp_path, kind, name):
    icc = profile(*PROFILES[name])
    plain, converted = written(tmp_path, kind, None), written(tmp_path, kind, icc)
    expected = as_srgb(plain.rgb, *PROFILES[name])
    assert np.abs(expected - plain.rgb).max() > 30  # or it would say nothing
    assert np.abs(converted.rgb - expected).max() <= 2
    if plain.alpha is not None:
        np.testing.assert_array_equal(converted.alpha, plain.alpha)
    exif = Image.Exif()
    exif[0x0112] = 6
    np.testing.assert_array_equal(written(tmp_path, kind, icc, exif).rgb, np.rot90(converted.rgb, -1))


def lcms(space: Literal["sRGB", "LAB"]) -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes()


UNCHANGED = {
    "sRGB": lcms("sRGB"),
    "sRGB of few digits": profile(SRGB_PRIMARIES, SRGB_CURVE, digits=3),
    "Lab": lcms("LAB"),
    "grey": profile(P3_PRIMARIES, SRGB_CURVE, space=b"GRAY"),
    "CMYK": profile(P3_PRIMARIES, SRGB_CURVE, space=b"CMYK"),
    "truncated": profile(P3_PRIMARIES, SRGB_CURVE)[:300],
    "no profile": b"hello",
}


@pytest.mark.parametrize("case", UNCHANGED)
def test_srgb_and_profiles_that_do_not_fit_change_no_bit(tmp_path, case):
    plain, read = written(tmp_path, "PNG", None), written(tmp_path, "PNG", UNCHANGED[case])
    np.testing.assert_array_equal(read.rgb, plain.rgb)
    np.testing.assert_array_equal(read.alpha, plain.alpha)


def test_masks_have_no_colours_to_convert(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).repeat(4).reshape(16, 64)
    Image.fromarray(np.dstack([ramp, 0 * ramp, 0 * ramp])).save(
        tmp_path / "mask.png", icc_profile=profile(P3_PRIMARIES, SRGB_CURVE)
    )
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png", "mask.png", Limits()), ramp)
