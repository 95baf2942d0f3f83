"""How far each pixel stands out from the ground around it, under any light and on any paper."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from imaml_ext.pictures.components import find_parts

# Light multiplies what paper gives back, so that in logarithms a stroke's contrast is the same in shadow as in light.
# The offset keeps a camera's noise in the dark small. Whole numbers in float32: sums and differences of them are exact.
UNIT = 1024  # per unit of the natural logarithm
LEAST = 0.1 * UNIT  # the faintest stroke: a tenth less light than the ground beside it
LOG = np.rint(UNIT * np.log((np.arange(256) + 16) / 271)).astype(np.float32)


def contrast(values: np.ndarray, which: str, window: int | None) -> tuple[np.ndarray, float]:
    """Measures how far pixels stand out from the ground, in the mix of channels that shows it best.

    Args:
        values: uint8 [H, W, C]. which: strokes "dark" or "light" against the ground, or "either".
        window: in pixels; the ground is what is left after structures narrower than that are filled in. Shadows' edges
            and tables are wider and stay. None: the ground is the median of the picture's edge.

    Returns:
        contrast [H, W] in units of 1/UNIT of a logarithm, about 0 on the ground and above it on strokes; its noise.
    """
    logs = LOG[values]  # [H, W, C]
    if window is None:
        edge = np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])
        apart = LOG[np.median(edge, axis=0).astype(np.uint8)] - logs
        sign = {"dark": 1, "light": -1}.get(which, 0) or np.where((apart**3).sum((0, 1)) < 0, -1, 1)
        apart = apart * sign
    else:
        signs = [1 if which == "dark" else -1] * values.shape[2] if which != "either" else _signs(values)
        filled = [(closed if sign > 0 else opened)(values[..., c], window) for c, sign in enumerate(signs)]
        apart = np.abs(LOG[np.stack(filled, axis=-1)] - logs)
    few = slice(None, None, 1 if min(apart.shape[:2]) < 200 else 2)  # of a large picture, every fourth pixel will do
    flat = apart[few, few].reshape(-1, apart.shape[2])
    # Filling in takes the brightest of a window: noise lifts it.
    lift = np.median(flat, axis=0)
    # Pixels a few apart have noise of their own, and the same ground; the picture may be too small for a few.
    lag = min(3, logs.shape[1] - 1)
    noise = 1.05 * np.median(np.abs(logs[few, lag:] - logs[few, : logs.shape[1] - lag]), axis=(0, 1))
    noise = np.maximum(noise, 0.01 * UNIT)
    most = max(1, len(flat) // 200)
    top = (np.partition(flat, len(flat) - most, axis=0)[-most:].mean(0) - lift).clip(1)
    weights = top / noise**2  # Fisher's discriminant, as if the channels' noises were independent
    weights /= weights.sum()
    return apart @ weights.astype(np.float32) - float(lift @ weights), float(noise @ weights)


def _signs(values: np.ndarray) -> list[int]:
    """Tells for each channel whether strokes are darker (1) or lighter (−1) than their surroundings.

    They are narrow, and a minority where they are: they differ from the window's median, and from its filling.
    """
    small = Image.fromarray(values if values.shape[2] == 3 else values[..., 0])
    small.thumbnail((64, 64), Image.Resampling.BOX)
    window = max(3, min(small.size) // 5 // 2 * 2 + 1)
    medians, pixels = (np.atleast_3d(np.asarray(p)) for p in (small.filter(ImageFilter.MedianFilter(window)), small))
    signs = []
    for c in range(values.shape[2]):
        here, median = LOG[pixels[..., c]], LOG[medians[..., c]]
        dark = np.minimum(LOG[closed(pixels[..., c], window)], median) - here
        light = here - np.maximum(LOG[opened(pixels[..., c], window)], median)
        signs.append(1 if _evidence(dark, window) >= _evidence(light, window) else -1)
    return signs


def _evidence(apart: np.ndarray, window: int) -> float:
    parts = find_parts(apart > LEAST, apart)
    return float((apart[parts.where(~parts.beside(1.5 * window))] ** 2).sum())


def closed(values: np.ndarray, window: int) -> np.ndarray:
    """Fills in what is dark and narrower than the window (the morphological closing by a square)."""
    return _square(_square(values, window, np.maximum), window, np.minimum)


def opened(values: np.ndarray, window: int) -> np.ndarray:
    """Fills in what is light and narrower than the window (the opening)."""
    return _square(_square(values, window, np.minimum), window, np.maximum)


def _square(values: np.ndarray, window: int, least: np.ufunc) -> np.ndarray:
    """Takes the extreme of the square window, of an odd side, around each pixel of uint8 [H, W]."""
    for _ in range(2):
        padding = [(window // 2, window // 2), (0, 0)]
        spread = np.pad(values, padding, constant_values=0 if least is np.maximum else 255)
        have = 1
        while have < window:  # runs of `have` pixels make runs of up to twice as many
            step = min(have, window - have)
            spread = least(spread[: len(spread) - step], spread[step:])
            have += step
        values = spread.T
    return values
