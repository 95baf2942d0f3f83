"""The lines of squared and ruled paper."""

from __future__ import annotations

import numpy as np
from PIL import Image

_FEWEST = 5  # fewer parallel lines may be strokes
_SHARE = 0.3  # a line shows on the rest of its way: shadows, the table and strokes hide some of it


def ruled_lines(contrast: np.ndarray, noise: float, unit: float) -> np.ndarray:
    """Finds straight, parallel lines across the picture, tilted by up to ten degrees: what they add to `contrast`.

    Args:
        contrast: [H, W], as in `ground.contrast`. noise: of it. unit: of a logarithm.

    Returns:
        [H, W], 0 where there are no lines, or fewer than five in a direction.
    """
    scale = 170 / unit
    picture = Image.fromarray(np.rint((scale * contrast).clip(0, 255)).astype(np.uint8))
    angle = 0.0
    for side, angles in ((128, np.arange(-10, 11)), (256, np.arange(-0.75, 0.76, 0.25)), (512, [-0.1, 0, 0.1])):
        small = picture.copy()
        small.thumbnail((side, side), Image.Resampling.BOX)
        tried = [angle + float(a) for a in angles]
        angle = max(tried, key=lambda a: sum(float(p @ p) for p in _profiles(small, a)))
    height, width = contrast.shape
    y, x = np.mgrid[:height, :width] - np.array([(height - 1) / 2, (width - 1) / 2])[:, None, None]
    sine, cosine = np.sin(np.deg2rad(angle)), np.cos(np.deg2rad(angle))
    found = np.zeros_like(contrast)
    for profile, along in zip(_profiles(picture, angle), (y * cosine - x * sine, x * cosine + y * sine), strict=True):
        on = profile > scale * max(3 * noise, 0.02 * unit)
        if np.count_nonzero(on[1:] & ~on[:-1]) >= _FEWEST:
            lines = np.pad(np.where(on, profile, 0), 1)
            lines = np.maximum(np.maximum(lines[:-2], lines[1:-1]), lines[2:]) / scale  # a pixel to either side too
            found = np.maximum(found, np.interp(along + (len(lines) - 1) / 2, np.arange(len(lines)), lines))
    return found


def _profiles(picture: Image.Image, angle: float) -> list[np.ndarray]:
    """Returns what most of each row, and most of each column, of the turned picture has at least."""
    values = np.asarray(picture.rotate(angle, Image.Resampling.BILINEAR, fillcolor=255))
    ranks = [int(_SHARE * (values.shape[axis] - 1)) for axis in (1, 0)]
    found = [np.partition(values, ranks[i], axis=1 - i).take(ranks[i], axis=1 - i) for i in (0, 1)]
    return [np.where(profile < 255, profile, 0).astype(np.float32) for profile in found]  # 255: mostly outside
