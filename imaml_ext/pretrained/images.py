"""Photographs and drawings as the networks were trained to see them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from imaml_ext.data import open_picture
from imaml_ext.errors import DataError


def read_images(paths: Sequence[Path | str], shape: tuple[int, ...], *, margin: float = 0.1) -> Tensor:
    """Reads image files as a batch [n, C, H, W] in [0, 1].

    In colour (C = 3), the middle square is scaled. With C = 1, as in Omniglot, a picture is ink on a plain ground, dark
    or light: its edge is taken for the ground, which becomes 0, and the ink becomes 1. It is cut to the ink's square
    with `margin` of it on each side, and scaled.

    Args:
        paths: the files, in any format that Pillow reads. shape: (C, H, W), `FewShotLearner.input_shape`.
        margin: of the side of the ink's square; >= 0.

    Raises:
        DataError: a file is missing, no image, or (C = 1) blank. ValueError: a shape or margin that cannot be.
    """
    if len(shape) != 3 or shape[0] not in (1, 3) or shape[1] != shape[2]:
        raise ValueError(f"shape must be (1, H, H) or (3, H, H), got {tuple(shape)}")
    if not margin >= 0:
        raise ValueError(f"margin must be a number >= 0, got {margin!r}")
    if not paths:
        raise ValueError("paths must name at least one file, got none")
    channels, size, _ = shape
    batch = []
    for path in map(Path, paths):
        picture = open_picture(path, "RGB" if channels == 3 else "L", upright=True)
        batch.append(_colour(picture, size) if channels == 3 else _ink(picture, size, margin, path))
    return torch.from_numpy(np.stack(batch))


def _colour(picture: Image.Image, size: int) -> np.ndarray:
    scaled = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    return np.asarray(scaled, dtype=np.float32).transpose(2, 0, 1) / 255


def _ink(picture: Image.Image, size: int, margin: float, path: Path) -> np.ndarray:
    values = np.asarray(picture, dtype=np.float32)  # [H, W]
    edge = np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])
    ink = np.abs(values - np.median(edge))
    if ink.max() < 32:  # of 255: paper, its grain and its shadows
        raise DataError(f"{path} is blank: nothing on it stands out from its ground")
    ink = np.clip((ink / ink.max() - 0.25) / 0.5, 0, 1)  # shadows to 0, strokes to 1, their edges between
    rows, columns = np.flatnonzero(ink.max(1) > 0.5), np.flatnonzero(ink.max(0) > 0.5)
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    side = max(bottom - top, right - left)
    side += 2 * round(margin * side)
    square = np.zeros((side, side), dtype=np.float32)
    y, x = (side - (bottom - top)) // 2, (side - (right - left)) // 2
    square[y : y + bottom - top, x : x + right - left] = ink[top:bottom, left:right]
    scaled = Image.fromarray(np.rint(255 * square).astype(np.uint8)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(scaled, dtype=np.float32)[None] / 255
