"""Finds what is drawn on a ground."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from imaml_ext.errors import DataError
from imaml_ext.pictures.stored import StoredPicture


def find_ink(picture: Image.Image, which: str, path: Path | StoredPicture) -> Image.Image:
    """Returns a picture "L" that is 255 where something is drawn, and 0 on the ground.

    `which`: strokes that are "dark" or "light" against the ground, or "either".

    Raises:
        DataError: nothing is drawn; it names `path`.
    """
    values = np.asarray(picture.convert("L"), dtype=np.float32)  # [H, W]
    edge = np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])
    ink = values - np.median(edge)
    ink = np.abs(ink) if which == "either" else (ink if which == "light" else -ink)
    if ink.max() < 32:  # of 255: paper, its grain and its shadows
        raise DataError(f"{path} is blank: nothing on it stands out from its ground")
    ink = np.clip((ink / ink.max() - 0.25) / 0.5, 0, 1)  # shadows to 0, strokes to 1, their edges between
    return Image.fromarray(np.rint(255 * ink).astype(np.uint8))


def cut_to_ink(ink: Image.Image, margin: float) -> Image.Image:
    """Cuts a picture of `find_ink` to the square of its ink, with `margin` of the square's side on each side."""
    values = np.asarray(ink)
    rows, columns = np.flatnonzero(values.max(1) > 127), np.flatnonzero(values.max(0) > 127)
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    side = max(bottom - top, right - left)
    side += 2 * round(margin * side)
    square = np.zeros((side, side), dtype=np.uint8)
    y, x = (side - (bottom - top)) // 2, (side - (right - left)) // 2
    square[y : y + bottom - top, x : x + right - left] = values[top:bottom, left:right]
    return Image.fromarray(square)
