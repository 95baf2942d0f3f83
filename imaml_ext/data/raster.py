"""Glyph outlines from font files, drawn in integer arithmetic: the same bytes on every machine and for every library
version.

Outlines are read in font units (fontTools, which matplotlib depends on); no hinting, no FreeType, no floating-point
drawing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

SIZE = 28  # pixels per side
SUB = 256  # horizontal units per pixel; both axes use the same units
LINES = 4  # scan lines sampled per pixel row
HALF = 1 << 14  # outlines are scaled so that the longer side of their bounding box runs from −HALF to HALF
_CURVE_STEPS = 6
_UNIT = 16  # font units are refined by this factor before rounding


class FontFile:
    """A TrueType font: which characters it has, and their outlines.

    Raises OSError or fontTools' errors where the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        import logging

        from fontTools.ttLib import TTFont

        logging.getLogger("fontTools").setLevel(logging.ERROR)  # old fonts' time stamps are no concern here
        self._font = TTFont(path, lazy=True)
        self._glyf = self._font["glyf"]
        self._cmap: dict[int, str] = self._font.getBestCmap() or {}

    def outline(self, code_point: int) -> np.ndarray | None:
        """Returns the edges of the character, int64 [edges, 4] as (x0, y0, x1, y1) in the scale of HALF, y upwards.

        Centred on the middle of its bounding box. None where the font lacks the character or it draws nothing.
        """
        name = self._cmap.get(code_point)
        if name is None:
            return None
        coordinates, ends, flags = self._glyf[name].getCoordinates(self._glyf)
        if len(coordinates) == 0:
            return None
        points = np.floor(np.array(list(coordinates), dtype=np.float64) * _UNIT + 0.5).astype(np.int64)
        on_curve = (np.frombuffer(bytes(flags), dtype=np.uint8) & 1).astype(bool)
        contours, start = [], 0
        for end in ends:
            if end - start >= 2:
                contours.append(_flatten(points[start : end + 1], on_curve[start : end + 1]))
            start = end + 1
        if not contours:
            return None
        low = np.min([c.min(0) for c in contours], axis=0)
        high = np.max([c.max(0) for c in contours], axis=0)
        extent = int((high - low).max())
        if extent == 0:
            return None
        edges = []
        for contour in contours:
            scaled = (2 * contour - low - high) * HALF // extent
            edges.append(np.concatenate([scaled, np.concatenate([scaled[1:], scaled[:1]])], axis=1))
        return np.concatenate(edges)


def _flatten(points: np.ndarray, on_curve: np.ndarray) -> np.ndarray:
    """Turns a closed TrueType contour (quadratic curves, implied points between two off it) into a polygon [n, 2]."""
    after, after_on = np.concatenate([points[1:], points[:1]]), np.concatenate([on_curve[1:], on_curve[:1]])
    # Coordinates are doubled, so that the implied midpoints are whole: [p0, mid(p0, p1), p1, …], then those that exist.
    full = np.stack([2 * points, points + after], axis=1).reshape(-1, 2)
    exists = np.stack([np.ones_like(on_curve), ~on_curve & ~after_on], axis=1).reshape(-1)
    full_on = np.stack([on_curve, np.ones_like(on_curve)], axis=1).reshape(-1)[exists]
    full = full[exists]
    first = int(full_on.argmax())  # start at a point on the curve
    full, full_on = np.roll(full, -first, axis=0), np.roll(full_on, -first)
    start = np.nonzero(full_on)[0]  # each segment starts on the curve: a line, or a curve with one control point
    count = len(full)
    curved = ~full_on[(start + 1) % count]
    p0, p1, p2 = full[start][:, None], full[(start + 1) % count][:, None], full[(start + 2) % count][:, None]
    n = _CURVE_STEPS
    k = np.arange(n)[:, None]
    steps = ((n - k) ** 2 * p0 + 2 * k * (n - k) * p1 + k**2 * p2) // n**2  # [segments, n, 2]; k = 0 is p0
    return steps[curved[:, None] | (k.T == 0)]


def transform(edges: np.ndarray, matrix: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Returns edges in units of the picture (SUB per pixel, y downwards), int64 [edges, 4].

    matrix int64 [2, 2]: units of the picture that HALF units of the outline make; shift int64 [2]: of the centre.
    """
    centre = SIZE * SUB // 2
    points = edges.reshape(-1, 2)
    x = (matrix[0, 0] * points[:, 0] + matrix[0, 1] * points[:, 1]) // HALF + centre + shift[0]
    y = centre + shift[1] - (matrix[1, 0] * points[:, 0] + matrix[1, 1] * points[:, 1]) // HALF
    return np.stack([x, y], axis=1).reshape(-1, 4)


def draw(edges: np.ndarray, image: np.ndarray, count: int) -> np.ndarray:
    """Fills the outlines (non-zero winding): uint8 [count, SIZE, SIZE], ink = 255.

    Coverage is exact along x to 1/256 pixel and sampled on four scan lines per pixel row along y; only where the
    borders of two overlapping contours cross the same pixel do their shares add.

    Args: edges int64 [n, 4] of all pictures in units of the picture; image int64 [n]: which picture an edge belongs to.
    """
    rows, step = SIZE * LINES, SUB // LINES
    x0, y0, x1, y1 = edges.T
    sign = np.where(y1 > y0, 1, -1)
    # Scan line k lies at y = k·step + step/2; an edge crosses those in [min y, max y).
    first = np.clip(-((step // 2 - np.minimum(y0, y1)) // step), 0, rows)
    last = np.clip(-((step // 2 - np.maximum(y0, y1)) // step), 0, rows)
    crossings = last - first
    edge = np.repeat(np.arange(edges.shape[0]), crossings)
    line = np.arange(edge.size) - np.repeat(np.cumsum(crossings) - crossings, crossings) + first[edge]
    y = line * step + step // 2
    x = x0[edge] + (y - y0[edge]) * (x1 - x0)[edge] // (y1 - y0)[edge]
    x = np.clip(x, 0, SIZE * SUB)
    column, fraction = x // SUB, x % SUB
    at = (image[edge] * rows + line) * (SIZE + 2) + column
    weight = sign[edge]
    size = count * rows * (SIZE + 2)
    # To the right of a crossing the winding number changes by ±1; the pixel it falls in is covered in part.
    # The weights are whole numbers, and far below 2⁵³ in sum: bincount's float64 is exact.
    change = np.bincount(at, weights=weight * (SUB - fraction), minlength=size)
    change += np.bincount(at + 1, weights=weight * fraction, minlength=size + 1)[:size]
    winding = np.abs(change.astype(np.int32).reshape(count, SIZE, LINES, SIZE + 2).cumsum(axis=-1, dtype=np.int32))
    covered = np.minimum(winding, SUB)[..., :SIZE].sum(axis=2)  # [count, SIZE, SIZE], up to LINES·SUB
    return ((covered * 255 + LINES * SUB // 2) // (LINES * SUB)).astype(np.uint8)
