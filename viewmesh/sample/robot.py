"""The object: a wind-up tin robot, as one signed distance field. CC0.

Knows its shape and which part a point belongs to; paint is in `paint.py`. The robot's own frame is y-up, faces +z, and
is about 1 high; `CENTER` and `SCALE` bring its bounding box to the world's origin and its longest side to 1.
"""

import math

from viewmesh.sample.jit import kernel
from viewmesh.sample.shapes import along_segment, ball, blend, box, clamp, disc, groove, ring

# robot = world * SCALE + CENTER: measured on the mesh, checked by a test
CENTER = (-0.0255053, -0.002, -0.0185188)
SCALE = 0.996
AABB = ((-0.37391, -0.5, -0.22631), (0.37391, 0.5, 0.22631))

# how far the distance may be trusted: grooves and ribs make its gradient longer than 1
STEP = 0.75

BODY, HEAD, PLATE, BRASS, STEEL, RUBBER, BOOT, BUTTON, EYE, DIAL, SOLE, LAMP = range(12)

# arms: shoulder, elbow, wrist, fingertips' direction
RIGHT_SHOULDER, RIGHT_ELBOW, RIGHT_WRIST = (-0.205, -0.02, 0.0), (-0.315, -0.055, 0.035), (-0.345, 0.105, 0.085)
LEFT_SHOULDER, LEFT_ELBOW, LEFT_WRIST = (0.205, -0.02, 0.0), (0.295, -0.125, 0.0), (0.285, -0.235, 0.09)
BIG_EYE, SMALL_EYE = (0.062, 0.262, 0.046), (-0.068, 0.255, 0.034)  # x, y, radius of the ring
DIAL_X, DIAL_Y, DIAL_RADIUS = -0.042, -0.108, 0.043
TOES_OUT = 0.1  # radians
KEY_Y, KEY_Z, KEY_COS, KEY_SIN = -0.085, -0.225, math.cos(0.42), math.sin(0.42)


@kernel
def foot_frame(x: float, z: float, side: float) -> tuple[float, float]:
    """x and z about the foot of its left (side 1) or right (-1); the left one stands forward, both are turned out."""
    px, pz = x - side * 0.124, z - (0.06 if side > 0 else 0.015)
    turn = side * TOES_OUT
    return px * math.cos(turn) - pz * math.sin(turn), px * math.sin(turn) + pz * math.cos(turn)


@kernel
def nearer(best: float, part: int, d: float, other: int) -> tuple[float, int]:
    return (d, other) if d < best else (best, part)


@kernel
def torso(x: float, y: float, z: float) -> tuple[float, int]:
    widen = 1.0 + 0.28 * clamp(-0.1 - y, -0.2, 0.2)  # a pear: wider below
    d = 0.93 * box(x / widen, y + 0.12, z / widen, 0.19, 0.17, 0.145, 0.085)
    d += groove(y + 0.232, 0.009, 0.007) + groove(y + 0.012, 0.009, 0.007)
    if x > 0.1:  # cooling slots in its left side
        slot = 0.5 - 0.5 * math.cos((y + 0.12) * (2 * math.pi / 0.034))
        inside = clamp((0.06 - abs(y + 0.12)) / 0.012, 0.0, 1.0) * clamp((0.07 - abs(z)) / 0.012, 0.0, 1.0)
        d += 0.008 * inside * slot
    part = BODY
    # seam rivets all round, in the two grooves' company
    turn = math.atan2(x, z)
    step = 2 * math.pi / 28
    turn -= step * math.floor(turn / step + 0.5)
    radius = math.sqrt(x * x + z * z)
    across, away = radius * math.sin(turn), d
    if abs(y + 0.256) < 0.03:
        bump = math.sqrt(across * across + (y + 0.256) ** 2 + away * away) - 0.0085
        d, part = nearer(d, part, bump, BRASS)
    # belly plate with its dial and buttons
    plate = box(x, y + 0.135, z - 0.128, 0.118, 0.088, 0.034, 0.014)
    if plate < 0.06:
        grille = clamp((0.045 - abs(x - 0.028)) / 0.006, 0.0, 1.0) * clamp((0.0125 - abs(y + 0.194)) / 0.005, 0.0, 1.0)
        plate += 0.008 * grille * (0.5 + 0.5 * math.cos((x - 0.028) * (2 * math.pi / 0.018)))
        if plate < d:
            part = PLATE
        d = blend(d, plate, 0.008)
        for k in range(2):
            rivet = ball(abs(x) - 0.1, y + 0.135 - (0.07 if k else -0.07), z - 0.161, 0.0105)
            d, part = nearer(d, part, rivet, BRASS)
        rivet = ball(abs(x) - 0.1, y + 0.135, z - 0.161, 0.0105)
        d, part = nearer(d, part, rivet, BRASS)
        u, v = x - DIAL_X, y - DIAL_Y
        d, part = nearer(d, part, disc(z - 0.15, u, v, 0.018, DIAL_RADIUS, 0.003), DIAL)
        d, part = nearer(d, part, ring(z - 0.165, u, v, DIAL_RADIUS, 0.0095), BRASS)
        for k in range(3):
            knob = ball(x - 0.052, y + 0.078 + 0.04 * k, (z - 0.16) * 1.25, 0.0165) * 0.8
            d, part = nearer(d, part, knob, BUTTON)
    return d, part


@kernel
def winder(x: float, y: float, z: float) -> float:
    """The key in its back."""
    d = disc(z + 0.18, x, y - KEY_Y, 0.055, 0.021, 0.006)
    d = min(d, disc(z + 0.146, x, y - KEY_Y, 0.014, 0.043, 0.006))
    u = (x * KEY_COS + (y - KEY_Y) * KEY_SIN, -x * KEY_SIN + (y - KEY_Y) * KEY_COS)
    w = z - KEY_Z
    lobes = ring(w, abs(u[0]) - 0.052, u[1] * 0.9, 0.036, 0.0135)
    bridge = along_segment(u[0], u[1], w, -0.03, 0.0, 0.0, 0.03, 0.0, 0.0)[0] - 0.0165
    return blend(blend(lobes, bridge, 0.015), d, 0.01)


@kernel
def head(x: float, y: float, z: float) -> tuple[float, int]:
    d = box(x, y - 0.245, z, 0.178, 0.128, 0.14, 0.095)
    d += groove(z + 0.055, 0.008, 0.006)
    part = HEAD
    fin = along_segment(x, y, z, 0.0, 0.365, -0.1, 0.0, 0.372, 0.05)[0] - 0.0215
    fin -= 0.0045 * math.cos(clamp(z, -0.1, 0.05) * (2 * math.pi / 0.026))
    d, part = nearer(d, part, fin, BRASS)
    plate = box(x, y - 0.24, z - 0.118, 0.134, 0.094, 0.035, 0.016)
    if plate < 0.06:
        mouth = clamp((0.062 - abs(x)) / 0.006, 0.0, 1.0) * clamp((0.014 - abs(y - 0.176)) / 0.005, 0.0, 1.0)
        plate += 0.009 * mouth * (0.55 + 0.45 * math.cos(x * (2 * math.pi / 0.0207)))
        if plate < d:
            part = PLATE
        d = blend(d, plate, 0.01)
        for k in range(2):
            rivet = ball(abs(x) - 0.116, y - 0.24 - (0.076 if k else -0.076), z - 0.151, 0.009)
            d, part = nearer(d, part, rivet, BRASS)
        for k in range(2):
            ex, ey, er = BIG_EYE if k else SMALL_EYE
            u, v = x - ex, y - ey
            # a shallow dome: a ball larger than the ring, sunk so deep that it meets the ring's middle
            d, part = nearer(d, part, ball(u, v, z - 0.158 + 1.5 * er, 1.8 * er), EYE)
            d, part = nearer(d, part, ring(z - 0.157, u, v, er, 0.0115), BRASS)
        brow = along_segment(x, y, z, 0.012, 0.318, 0.16, 0.112, 0.334, 0.15)[0] - 0.0125
        d, part = nearer(d, part, brow, STEEL)
    # ears: bolts, the left one carries the aerial
    if x > 0.1 or x < -0.1:
        ear = disc(abs(x) - 0.18, y - 0.245, z, 0.03, 0.05, 0.008)
        knurl = math.atan2(y - 0.245, z)
        ear += 0.003 * math.cos(knurl * 12.0) * clamp((math.sqrt((y - 0.245) ** 2 + z * z) - 0.02) / 0.02, 0.0, 1.0)
        d, part = nearer(d, part, ear, BRASS)
        d, part = nearer(d, part, disc(abs(x) - 0.205, y - 0.245, z, 0.017, 0.024, 0.006), STEEL)
    rod = along_segment(x, y, z, 0.2, 0.26, -0.01, 0.236, 0.455, -0.04)[0] - 0.0125
    d, part = nearer(d, part, rod, STEEL)
    if x > 0.0 and y > 0.25:
        d, part = nearer(d, part, ring(y - 0.405, x - 0.2268, z + 0.0323, 0.014, 0.009), BRASS)
        d, part = nearer(d, part, ball(x - 0.2368, y - 0.462, z + 0.041, 0.034), LAMP)
    return d, part


@kernel
def tube(distance: float, t: float, ribs: float, radius: float) -> float:
    """A ribbed rubber hose about a segment."""
    return distance - radius - 0.0045 * math.cos(2 * math.pi * ribs * t)


@kernel
def arm(x: float, y: float, z: float, shoulder, elbow, wrist) -> tuple[float, int]:
    sx, sy, sz = shoulder
    ex, ey, ez = elbow
    wx, wy, wz = wrist
    upper, t = along_segment(x, y, z, sx, sy, sz, ex, ey, ez)
    lower, s = along_segment(x, y, z, ex, ey, ez, wx, wy, wz)
    if min(upper, lower) > 0.2:
        return min(upper, lower) - 0.15, RUBBER
    d = blend(tube(upper, t, 5.0, 0.033), tube(lower, s, 6.0, 0.033), 0.02)
    part = RUBBER
    side = 1.0 if sx > 0 else -1.0
    d, part = nearer(d, part, ball(x - sx + side * 0.008, y - sy, z - sz, 0.06), BRASS)
    # the hand's frame: n along the forearm, the palm's axis p across, q to the side
    nx, ny, nz = wx - ex, wy - ey, wz - ez
    length = math.sqrt(nx * nx + ny * ny + nz * nz)
    nx, ny, nz = nx / length, ny / length, nz / length
    hx, hy, hz = x - wx, y - wy, z - wz
    n = hx * nx + hy * ny + hz * nz
    qx, qz = nz / math.hypot(nx, nz), -nx / math.hypot(nx, nz)
    q = hx * qx + hz * qz
    p = hx * (ny * qz) + hy * (nz * qx - nx * qz) + hz * (-ny * qx)
    d, part = nearer(d, part, disc(n + 0.008, p, q, 0.022, 0.047, 0.01), BRASS)
    d, part = nearer(d, part, ball(n - 0.022, p, q, 0.041), STEEL)
    # a pincer: two curved fingers and a thumb
    finger = along_segment(n, abs(p), q, 0.03, 0.026, 0.0, 0.066, 0.052, 0.004)[0] - 0.0175
    finger = blend(finger, along_segment(n, abs(p), q, 0.066, 0.052, 0.004, 0.115, 0.03, 0.0)[0] - 0.0155, 0.012)
    thumb = along_segment(n, p, q, 0.02, 0.0, 0.03, 0.075, 0.0, 0.052)[0] - 0.0155
    d, part = nearer(d, part, blend(finger, thumb, 0.01), STEEL)
    return d, part


@kernel
def leg(x: float, y: float, z: float, side: float) -> tuple[float, int]:
    px, pz = foot_frame(x, z, side)
    boot = box(px, y + 0.433, pz, 0.086, 0.046, 0.13, 0.045)
    toe = ball(px / 1.1, (y + 0.41) * 1.2, (pz - 0.055) / 1.1, 0.08)
    d = blend(boot, toe, 0.04)
    part = BOOT
    d, part = nearer(d, part, disc(y + 0.377, px, pz + 0.045, 0.02, 0.066, 0.012), BRASS)
    # the middle of the cuff, back in the torso's frame
    ax = side * 0.124 - 0.045 * math.sin(side * TOES_OUT)
    az = (0.06 if side > 0 else 0.015) - 0.045 * math.cos(side * TOES_OUT)
    shin, t = along_segment(x, y, z, ax, -0.39, az, side * 0.1, -0.25, 0.0)
    d, part = nearer(d, part, tube(shin, t, 6.0, 0.046), RUBBER)
    d, part = nearer(d, part, disc(y + 0.292, x - side * 0.1, z, 0.018, 0.064, 0.01), STEEL)
    sole = box(px, y + 0.478, pz + 0.002, 0.096, 0.022, 0.14, 0.014)
    tread = 0.5 + 0.5 * math.cos(pz * (2 * math.pi / 0.036))
    sole += 0.008 * tread * clamp((-0.482 - y) / 0.012, 0.0, 1.0)
    d, part = nearer(d, part, sole, SOLE)
    return d, part


@kernel
def robot(x: float, y: float, z: float) -> tuple[float, int]:
    """Distance to the robot in its own frame, and the part that is nearest."""
    d, part = torso(x, y, z)
    # a part is looked at only where its bounding ball may be nearer than what was found
    if ball(x, y - 0.29, z, 0.32) < d:
        other, name = head(x, y, z)
        d, part = nearer(d, part, other, name)
        neck = disc(y - 0.08, x, z, 0.06, 0.066, 0.005) - 0.005 * math.cos(y * (2 * math.pi / 0.026))
        d, part = nearer(d, part, neck, STEEL)
    if ball(x, y - KEY_Y, z + 0.19, 0.13) < d:
        d, part = nearer(d, part, winder(x, y, z), BRASS)
    for side in (-1.0, 1.0):
        if ball(x - side * 0.115, y + 0.39, z - 0.03, 0.25) < d:
            other, name = leg(x, y, z, side)
            d, part = nearer(d, part, other, name)
    other, name = arm(x, y, z, RIGHT_SHOULDER, RIGHT_ELBOW, RIGHT_WRIST)
    d, part = nearer(d, part, other, name)
    other, name = arm(x, y, z, LEFT_SHOULDER, LEFT_ELBOW, LEFT_WRIST)
    return nearer(d, part, other, name)


@kernel
def distance(x: float, y: float, z: float) -> float:
    """Signed distance to the robot at a point of the world, world units."""
    return robot(x * SCALE + CENTER[0], y * SCALE + CENTER[1], z * SCALE + CENTER[2])[0] / SCALE


@kernel
def normal(x: float, y: float, z: float, step: float) -> tuple[float, float, float]:
    """The outward unit normal: the distance's gradient by four differences over `step` (a tetrahedron's corners)."""
    a = distance(x + step, y - step, z - step)
    b = distance(x - step, y - step, z + step)
    c = distance(x - step, y + step, z - step)
    e = distance(x + step, y + step, z + step)
    nx, ny, nz = a - b - c + e, c + e - a - b, b + e - a - c
    length = math.sqrt(nx * nx + ny * ny + nz * nz) + 1e-12
    return nx / length, ny / length, nz / length
