"""Makes a picture square."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

LANCZOS = Image.Resampling.LANCZOS


def squared(picture: Image.Image, size: int, how: str) -> np.ndarray:
    """Scales a picture to size × size by a Lanczos filter: uint8 [size, size] or [size, size, 3].

    `how`: "squeeze" it as a whole, cut it to its "middle" square, or "pad" it to a square with the median of its edge.
    """
    if how == "middle":
        return np.asarray(ImageOps.fit(picture, (size, size), LANCZOS))
    if how == "pad" and picture.width != picture.height:
        values = np.asarray(picture)
        edge = np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])
        colour = np.median(edge, axis=0).astype(int)
        side = max(picture.size)
        picture = ImageOps.pad(picture, (side, side), color=int(colour) if colour.ndim == 0 else tuple(colour.tolist()))
    return np.asarray(picture.resize((size, size), LANCZOS))
