"""What the object stands on: the plane under the sparse points. RANSAC, Fischler and Bolles 1981."""

import numpy as np

TRIALS = 1000
FEWEST_SHARE = 0.2  # of the points must lie in the plane, or there is no floor to speak of
MOST_BELOW = 0.1
STEEPEST_COS = 0.5  # 60 degrees between the plane's normal and the cameras' mean up


def fit_floor(points: np.ndarray, eyes: np.ndarray, up: np.ndarray, tolerance: float) -> np.ndarray | None:
    """(4,) unit normal n (pointing up) and d with n.x + d = 0 on the floor; None if the points have no floor.

    points: (P, 3). eyes: (N, 3) camera centres. up: (3,) roughly up. tolerance: distance that counts as in the plane.
    The floor has nearly no points below it and all cameras above.
    """
    if len(points) < 50:
        return None
    rng = np.random.default_rng(0)
    some = points[rng.choice(len(points), min(len(points), 4000), replace=False)]
    triples = some[rng.integers(0, len(some), (TRIALS, 3))]
    normals = np.cross(triples[:, 1] - triples[:, 0], triples[:, 2] - triples[:, 0])
    lengths = np.linalg.norm(normals, axis=1)
    triples, normals = triples[lengths > 1e-12], normals[lengths > 1e-12] / lengths[lengths > 1e-12, None]
    normals *= np.where(normals @ up < 0, -1.0, 1.0)[:, None]
    offsets = -(normals * triples[:, 0]).sum(-1)
    upright = normals @ up / np.linalg.norm(up) > STEEPEST_COS
    above = (eyes @ normals.T + offsets > 0).all(0)
    planes = np.concatenate([normals, offsets[:, None]], 1)[upright & above]
    if not len(planes):
        return None
    heights = some @ planes[:, :3].T + planes[:, 3]  # (P', planes)
    support = (np.abs(heights) < tolerance).mean(0)
    support[(heights < -3 * tolerance).mean(0) > MOST_BELOW] = 0
    best = int(support.argmax())
    if support[best] < FEWEST_SHARE:
        return None
    return _refined(points, planes[best], tolerance)


def _refined(points: np.ndarray, plane: np.ndarray, tolerance: float) -> np.ndarray:
    """The least squares plane of the points near the given one."""
    for _ in range(3):
        near = points[np.abs(points @ plane[:3] + plane[3]) < tolerance]
        if len(near) < 3:
            break
        middle = near.mean(0)
        normal = np.linalg.svd(near - middle, full_matrices=False)[2][2]
        normal *= np.sign(normal @ plane[:3]) or 1.0
        plane = np.concatenate([normal, [-normal @ middle]])
    return plane
