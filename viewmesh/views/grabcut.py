"""Masks of photos that have none, one photo at a time: GrabCut seeded from the border. Rother et al., SIGGRAPH 2004."""

import cv2
import numpy as np

SIDE = 500  # pixels of the long side that GrabCut works at
BORDER = 0.04


def from_border(rgb: np.ndarray, iterations: int = 6) -> np.ndarray:
    """Coverage (H, W) uint8: the border is background, the rest undecided."""
    small = _small(rgb)
    h, w = small.shape[:2]
    labels = np.full((h, w), cv2.GC_PR_FGD, np.uint8)
    edge = max(2, round(BORDER * min(h, w)))
    labels[:edge], labels[-edge:], labels[:, :edge], labels[:, -edge:] = (cv2.GC_BGD,) * 4
    return enlarged(cut(small, labels, iterations), rgb.shape[:2])


def cut(rgb: np.ndarray, labels: np.ndarray, iterations: int) -> np.ndarray:
    """GrabCut from trimap labels (cv2.GC_*), as a clean bool mask; the labels alone if they leave nothing to decide."""
    labels = labels.copy()
    foreground = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
    if foreground.sum() < 10 or (~foreground).sum() < 10:
        return foreground
    cv2.setRNGSeed(0)  # its k-means draws from OpenCV's global generator
    bgr, models = np.ascontiguousarray(rgb[..., ::-1]), (np.zeros((1, 65)), np.zeros((1, 65)))
    cv2.grabCut(bgr, labels, (0, 0, 1, 1), *models, iterations, cv2.GC_INIT_WITH_MASK)
    return clean((labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD))


def clean(mask: np.ndarray) -> np.ndarray:
    """The largest component of a bool mask, smoothed, its small holes filled."""
    mask8 = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask8, connectivity=4)
    if count < 2:
        return mask
    kept = labels == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    count, holes, stats, _ = cv2.connectedComponentsWithStats((~kept).astype(np.uint8), connectivity=4)
    for i in range(1, count):
        if stats[i, cv2.CC_STAT_AREA] < 0.02 * kept.sum():
            kept |= holes == i
    return kept


def enlarged(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A bool mask as uint8 coverage of (H, W) with an edge about two pixels soft."""
    full = cv2.resize(mask.astype(np.float32), size[::-1], interpolation=cv2.INTER_LINEAR)
    return np.clip(cv2.GaussianBlur(full, (0, 0), 1.0) * 255 + 0.5, 0, 255).astype(np.uint8)


def _small(rgb: np.ndarray) -> np.ndarray:
    h, w = rgb.shape[:2]
    factor = min(1.0, SIDE / max(h, w))
    return cv2.resize(rgb, (max(1, round(w * factor)), max(1, round(h * factor))), interpolation=cv2.INTER_AREA)
