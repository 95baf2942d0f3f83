"""Finds what is drawn on a ground: scans, screenshots, and photographs of paper under any light."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from imaml_ext.errors import DataError
from imaml_ext.pictures.components import Parts, find_parts
from imaml_ext.pictures.ground import LEAST, UNIT, contrast
from imaml_ext.pictures.lines import ruled_lines
from imaml_ext.pictures.stored import StoredPicture

_SIDE = 384  # pixels of the longer side in which strokes are looked for
# A drawing's largest part has more pixels than a square of that fraction of the picture's shorter side. A faint one has
# more than the second, unless it is a dot: shadows leave narrow slivers at their corners, ruled lines their crossings.
_SMALL, _SMALL_AND_FAINT = 60, 40
_ROUND = 5  # a dot's area in squares of its pen, at most: a disc has about 3, a sliver 7 and more
_NARROW = 4  # strokes are narrower than the picture's shorter side divided by that


def find_ink(picture: Image.Image, which: str, path: Path | StoredPicture, *, size: int = 0) -> Image.Image:
    """Returns a picture "L" that is 255 where something is drawn, and 0 on the ground; at most a few hundred pixels.

    The ground is estimated around each pixel. Light and its edges, paper of any colour, the lines on it and the table
    beside it are ground; ink may be of any colour. A drawing too broad for that is compared with the picture's edge.

    `which`: strokes that are "dark" or "light" against the ground, or "either". `size`: pixels that are wanted of it.

    Raises:
        DataError: nothing is drawn; it names `path`.
    """
    picture = picture if picture.mode == "L" else picture.convert("RGB")
    most, side = max(_SIDE, 4 * size), max(picture.size)
    if side > most:
        shape = [max(1, round(n * most / side)) for n in picture.size]
        picture = picture.resize(shape, Image.Resampling.BOX)  # type: ignore[arg-type]
    least = min(picture.size)
    if least >= 200:  # grain of the picture; a small one has none to spare
        picture = picture.filter(ImageFilter.GaussianBlur(least / 500))
    values = np.asarray(picture).reshape(picture.height, picture.width, -1)
    window = max(3, least // _NARROW // 2 * 2 + 1)
    local, noise = contrast(values, which, window)
    lines = 1.3 * ruled_lines(local, noise, UNIT)
    lined = bool(lines.any())
    ink = _strokes(local - lines, max(LEAST, 5 * noise), 1.5 * window, lined=lined)
    whole, noise = contrast(values, which, None)
    solid = _strokes(whole - lines, max(LEAST, 5 * noise), np.inf, lined=lined)
    if solid is not None and _has_edge(solid, whole) and (ink is None or _is_part(ink, solid, whole)):
        ink = solid
    if ink is None:
        raise DataError(f"{path} is blank: nothing on it stands out from its ground")
    return Image.fromarray(ink)


def _has_edge(solid: np.ndarray, whole: np.ndarray) -> bool:
    """Tells whether a shape ends within a few pixels; light that fades does not."""
    inside = solid > 127
    near = _grown(inside)
    outside = _grown(near) & ~near
    return bool(outside.any() and np.median(np.abs(whole[outside])) < 0.3 * np.median(whole[inside]))


def _is_part(ink: np.ndarray, solid: np.ndarray, whole: np.ndarray) -> bool:
    """Tells whether strokes are but the narrow ends of a solid shape, all of which stands out as far as they do.

    A drawing in a shadow, or on a sheet that lies amid a table, stands out from that shape.
    """
    narrow, broad = ink > 127, solid > 127
    if broad.sum() < 2 * narrow.sum() or (narrow & broad).sum() < 0.9 * narrow.sum():
        return False
    return bool(abs(np.median(whole[narrow]) / np.median(whole[broad]) - 1) < 0.2)


def _strokes(values: np.ndarray, faintest: float, reach: float, *, lined: bool) -> np.ndarray | None:
    """Returns strokes as uint8 [H, W], 255 in their middle; None where there are none.

    `reach`: what hugs the picture's edge to that depth is a table or the corner of a shadow. `lined`: ruled lines
    were taken away.
    """
    strong = values > faintest
    while True:  # what is beside the sheet may be stronger than ink: it goes before ink is measured
        if not strong.any():
            return None
        level = float(np.quantile(values[strong], 0.9))
        parts = find_parts(strong & (values > 0.35 * level), values)
        beside = parts.beside(reach)
        if not beside.any():
            break
        strong &= ~_grown(parts.where(beside))
    largest, pen = int(parts.area.max()), _pen(parts)
    dot = not lined and largest < _ROUND * pen**2
    if largest < (min(values.shape) / (_SMALL if level > 3 * LEAST or dot else _SMALL_AND_FAINT)) ** 2:
        return None
    drawn = parts.where((parts.peak > 0.6 * level) & (parts.area >= 0.4 * pen**2))  # no specks
    level = float(np.quantile(values[drawn], 0.75))
    # The ground to 0, strokes to 1, their edges between.
    return np.rint(255 * np.where(drawn, (values / level - 0.3) / 0.4, 0).clip(0, 1)).astype(np.uint8)


def _pen(parts: Parts) -> float:
    """Returns the width of the pen that drew the largest part."""
    largest = parts.labels == parts.area.argmax()
    inner = largest[:-2, 1:-1] & largest[2:, 1:-1] & largest[1:-1, :-2] & largest[1:-1, 2:]
    rim = largest.sum() - inner.sum()
    return float(2 * largest.sum() / rim)  # its area is its length times the pen, its rim twice its length


def _grown(mask: np.ndarray) -> np.ndarray:
    """The mask and the pixels around it, which have a part of its contrast."""
    padded = np.pad(mask, 3)
    for axis in (0, 1):
        padded = np.logical_or.reduce([np.roll(padded, shift, axis) for shift in range(-3, 4)])
    return padded[3:-3, 3:-3]


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
