"""The robot's paint: base colour, roughness and metallic at a point of its surface.

All patterns are functions of the position and the part (`robot.py`), so there is no UV map and no texture file.
Colours are linear RGB reflectances.
"""

import math

import numpy as np

from viewmesh.sample.jit import kernel
from viewmesh.sample.robot import (
    BIG_EYE,
    BOOT,
    BRASS,
    BUTTON,
    CENTER,
    DIAL,
    DIAL_RADIUS,
    DIAL_X,
    DIAL_Y,
    EYE,
    HEAD,
    LAMP,
    PLATE,
    RUBBER,
    SCALE,
    SMALL_EYE,
    SOLE,
    STEEL,
    foot_frame,
    robot,
)
from viewmesh.sample.shapes import clamp, noise, smoothstep, speckle

TEAL, DEEP_TEAL = (0.014, 0.20, 0.225), (0.006, 0.075, 0.10)
CREAM, WHITE, INK = (0.78, 0.66, 0.46), (0.82, 0.80, 0.76), (0.012, 0.014, 0.02)
CORAL, ROSE, MUSTARD = (0.66, 0.085, 0.03), (0.85, 0.3, 0.2), (0.80, 0.42, 0.05)
GOLD, IRON, TIN = (0.91, 0.60, 0.25), (0.56, 0.55, 0.53), (0.62, 0.60, 0.57)  # metals

# our own 5 x 7 letters, one string per letter, rows from the top
_LETTERS = {
    "V": "10001 10001 10001 10001 10001 01010 00100",
    "I": "01110 00100 00100 00100 00100 00100 01110",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "W": "10001 10001 10001 10101 10101 11011 10001",
    "M": "10001 11011 10101 10101 10001 10001 10001",
    "S": "01111 10000 10000 01110 00001 00001 11110",
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "0": "01110 10001 10011 10101 11001 10001 01110",
    "6": "01110 10000 10000 11110 10001 10001 01110",
}


def _bitmap(text: str) -> np.ndarray:
    """The text as a (7, 6 * letters) bool array, one empty column after each letter."""
    rows = [np.array([[c == "1" for c in row] for row in _LETTERS[letter].split()]) for letter in text]
    return np.concatenate([np.pad(letter, ((0, 0), (0, 1))) for letter in rows], axis=1)


NAME, NUMBER = _bitmap("VIEWMESH"), _bitmap("06")


@kernel
def written(bitmap, u: float, v: float, pixel: float) -> bool:
    """Whether ink lies at (u, v), u to the right and v up from the text's middle, dots of size `pixel`."""
    column = int(math.floor(u / pixel + 0.5 * (bitmap.shape[1] - 1)))
    row = int(math.floor(3.5 - v / pixel))
    return 0 <= row < 7 and 0 <= column < bitmap.shape[1] and bitmap[row, column]


@kernel
def mix(a, b, t: float) -> tuple[float, float, float]:
    return a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t, a[2] + (b[2] - a[2]) * t


@kernel
def checks(u: float, v: float, size: float) -> bool:
    return (int(math.floor(u / size)) + int(math.floor(v / size))) % 2 == 0


@kernel
def paint_body(x: float, y: float, z: float):
    colour = TEAL
    turn = math.atan2(x, z)
    if y < -0.241:
        colour = CREAM if checks(turn, y + 0.241, 2 * math.pi / 44) else DEEP_TEAL
        if y < -0.275:
            colour = DEEP_TEAL
    elif y > -0.003:
        colour = CORAL
    elif y > -0.02:
        colour = CREAM
    if z < 0 and -0.225 < y < -0.02:  # the maker's name below the key, a sunburst about it
        u, v = -x, y
        if written(NAME, u, v + 0.2, 0.0048):
            colour = CREAM
        r = math.hypot(x, y + 0.085)
        if r < 0.085 and math.sin(14 * math.atan2(x, y + 0.085)) > 0:
            colour = CORAL
        if 0.085 < r < 0.092:
            colour = CREAM
    if x > 0.1 and abs(y + 0.12) < 0.08 and abs(z) < 0.09:  # a mustard field about the cooling slots
        colour = MUSTARD if max(abs(y + 0.12) - 0.07, abs(z) - 0.08) < 0 else CREAM
        if abs(z) < 0.066 and abs(y + 0.12) < 0.058 and math.cos((y + 0.12) * (2 * math.pi / 0.034)) < -0.35:
            colour = INK
    if x < -0.1:  # its number in a roundel
        r = math.hypot(y + 0.125, z)
        if r < 0.075:
            colour = CREAM
            if r > 0.068:
                colour = CORAL
            elif written(NUMBER, z, y + 0.125, 0.0095):
                colour = INK
    return colour


@kernel
def paint_head(x: float, y: float, z: float):
    colour = TEAL
    if z < -0.055:
        colour = CREAM
        if z < -0.068:
            colour = CORAL
            if checks(x, y, 0.021) and abs(y - 0.245) < 0.063 and abs(x) < 0.105:
                colour = CREAM
    elif y > 0.345 and abs(x) < 0.045:
        colour = CREAM if abs(x) > 0.038 else CORAL
    if z > 0 and abs(x) > 0.138 and abs(math.sin((y + 0.6 * z) * 90.0)) > 0.72 and abs(y - 0.245) > 0.055:
        colour = CREAM
    return colour


@kernel
def paint_plate(x: float, y: float, z: float):
    colour = CREAM
    if y > 0.1:  # the face: blushing cheeks, a dark mouth
        cheek = min(math.hypot(x - 0.098, y - 0.195), math.hypot(x + 0.098, y - 0.195))
        colour = mix(CREAM, ROSE, 0.85 * (1 - smoothstep(0.012, 0.03, cheek)))
        if abs(x) < 0.066 and abs(y - 0.176) < 0.0185:
            colour = INK if math.cos(x * (2 * math.pi / 0.0207)) > -0.6 else MUSTARD
    else:
        edge = max(abs(x) - 0.118, abs(y + 0.135) - 0.088)
        if -0.0125 < edge < -0.0085:
            colour = CORAL
        if abs(x - 0.028) < 0.049 and abs(y + 0.194) < 0.0155:
            colour = INK if math.cos((x - 0.028) * (2 * math.pi / 0.018)) > -0.5 else TEAL
        # a small scale of ticks beside the buttons and a hazard strip under the dial
        if 0.074 < x < 0.086 and -0.168 < y < -0.068 and math.cos((y + 0.078) * (2 * math.pi / 0.01)) > 0.45:
            colour = INK
        if -0.09 < x < -0.032 and abs(y + 0.194) < 0.012:
            colour = MUSTARD if math.sin((x + y) * 330.0) > 0 else INK
    return colour


@kernel
def paint_dial(x: float, y: float):
    u, v = (x - DIAL_X) / DIAL_RADIUS, (y - DIAL_Y) / DIAL_RADIUS
    r, turn = math.hypot(u, v), math.atan2(u, v)
    colour = WHITE
    if 0.55 < r < 0.8 and abs(turn) < 2.2 and math.cos(turn * 10.0) > 0.62:
        colour = INK
    if 0.42 < r < 0.52 and 0.7 < turn < 2.2:
        colour = CORAL
    along, across = u * math.sin(0.9) + v * math.cos(0.9), u * math.cos(0.9) - v * math.sin(0.9)
    if (-0.15 < along < 0.68 and abs(across) < 0.075 * (1 - along)) or r < 0.12:
        colour = CORAL
    return colour


@kernel
def paint_eye(x: float, y: float):
    big = x > 0
    ex, ey, er = BIG_EYE if big else SMALL_EYE
    # both look a little to the robot's left and up
    u, v = (x - ex) / er, (y - ey) / er
    r = math.hypot(u - 0.12, v - 0.1)
    turn = math.atan2(v - 0.1, u - 0.12)
    colour = (0.88, 0.87, 0.84)
    if r < 0.62:
        streak = 0.5 + 0.5 * math.sin(turn * 19.0 + 5.0 * r)
        colour = mix((0.02, 0.22, 0.55), (0.10, 0.62, 0.80), streak * smoothstep(0.25, 0.6, r))
    if r < 0.34 or 0.57 < r < 0.62:
        colour = INK
    if math.hypot(u + 0.06, v - 0.3) < 0.13:
        colour = (0.95, 0.95, 0.95)
    return colour


@kernel
def paint_boot(x: float, y: float, z: float):
    px, pz = foot_frame(x, z, 1.0 if x > 0 else -1.0)
    colour = CORAL
    if pz > 0.055 and y > -0.452:
        colour = CREAM if checks(px, 0.075 * math.atan2(y + 0.455, pz - 0.055), 0.0235) else DEEP_TEAL
    if 0.04 < pz < 0.055:
        colour = CREAM
    if abs(px) > 0.05 and pz < 0.0 and abs(math.sin((pz + y) * 110.0)) > 0.75:
        colour = MUSTARD
    return colour


@kernel
def chipped(x: float, y: float, z: float) -> bool:
    """Where the enamel has come off down to the tin: rare patches with ragged rims."""
    ragged = 0.75 * noise(x * 24, y * 24, z * 24) + 0.25 * noise(x * 110, y * 110, z * 110)
    return ragged > 0.79


@kernel
def paint(x: float, y: float, z: float, part: int) -> tuple[float, float, float, float, float]:
    """Base colour (linear RGB), roughness and metallic at a point in the robot's frame on the given part."""
    if part == BRASS:
        cloud = noise(x * 30, y * 30, z * 30)
        patina = 0.55 * smoothstep(0.62, 0.9, noise(x * 55 + 9, y * 55, z * 55))
        r, g, b = mix(GOLD, (0.50, 0.27, 0.10), patina)
        return r, g, b, 0.17 + 0.10 * cloud + 0.25 * patina, 1.0
    if part == STEEL:
        shade = 0.75 + 0.25 * noise(x * 40, y * 160, z * 40)
        return IRON[0] * shade, IRON[1] * shade, IRON[2] * shade, 0.34, 1.0
    if part in (RUBBER, SOLE):
        shade = 0.8 + 0.5 * noise(x * 90, y * 90, z * 90)
        if part == SOLE:
            px, pz = foot_frame(x, z, 1.0 if x > 0 else -1.0)
            arrow = abs(pz - 0.35 * abs(px) - (0.03 if x > 0 else -0.02)) < 0.017
            if arrow and y < -0.485 and abs(px) < 0.06:  # so that toe and heel differ from below
                return 0.55, 0.30, 0.04, 0.6, 0.0
            if -0.474 < y < -0.468:
                return CREAM[0], CREAM[1], CREAM[2], 0.5, 0.0
        return 0.035 * shade, 0.037 * shade, 0.042 * shade, 0.62, 0.0
    if part == EYE:
        r, g, b = paint_eye(x, y)
        return r, g, b, 0.09, 0.0
    if part == DIAL:
        r, g, b = paint_dial(x, y)
        return r, g, b, 0.3, 0.0
    if part == LAMP:
        swirl = math.sin(70 * y + 2.0 * math.atan2(x - 0.2368, z + 0.041))
        r, g, b = CORAL if swirl > -0.3 else CREAM
        return r, g, b, 0.15, 0.0
    if part == BUTTON:
        r, g, b = CORAL if y > -0.098 else (MUSTARD if y > -0.138 else TEAL)
        return r, g, b, 0.14, 0.0
    if part == HEAD:
        colour = paint_head(x, y, z)
    elif part == PLATE:
        colour = paint_plate(x, y, z)
    elif part == BOOT:
        colour = paint_boot(x, y, z)
    else:
        colour = paint_body(x, y, z)
    fade = 0.86 + 0.28 * noise(x * 14 + 3, y * 14, z * 14)
    r, g, b = colour[0] * fade, colour[1] * fade, colour[2] * fade
    rough = 0.24 + 0.16 * noise(x * 35, y * 35 + 5, z * 35)
    if speckle(x, y, z, 0.026, 0.45) > 0:
        r, g, b = 0.35 * r, 0.35 * g, 0.35 * b
    if part != PLATE and chipped(x, y, z):
        return TIN[0], TIN[1], TIN[2], 0.38, 1.0
    return clamp(r, 0.0, 0.95), clamp(g, 0.0, 0.95), clamp(b, 0.0, 0.95), rough, 0.0


@kernel
def paint_at(x: float, y: float, z: float) -> tuple[float, float, float, float, float]:
    """`paint` of the nearest part, at a point of the world."""
    u, v, w = x * SCALE + CENTER[0], y * SCALE + CENTER[1], z * SCALE + CENTER[2]
    return paint(u, v, w, robot(u, v, w)[1])
