"""Data sets to look at: a table of the splits, and images side by side."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from imaml_ext.checks import check_int
from imaml_ext.data.datasets import Dataset, ImageDataset
from imaml_ext.data.episodes import EpisodeSampler
from imaml_ext.errors import DataError


def summary(dataset: Dataset) -> str:
    """A data set as a few lines of text: description, shape, and a table of its splits."""
    rows = dataset.rows()
    columns = list(rows[0])
    cells = [columns] + [[f"{row[c]:,}" if isinstance(row[c], int) else str(row[c]) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    numeric = [isinstance(rows[0][c], int) for c in columns]
    lines = [
        "  ".join(
            c.rjust(w) if right else c.ljust(w) for c, w, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    ]
    shape = " × ".join(map(str, dataset.input_shape))
    return "\n".join([dataset.description, f"{dataset.kind}, one example: {shape}", "", *lines])


def image_grid(images: Tensor | np.ndarray, *, columns: int, padding: int = 2, background: float = 1.0) -> np.ndarray:
    """Images side by side for a picture.

    Args: images [n, C, H, W] or [n, H, W], values in [0, 1] (or uint8, 0 to 255); columns: images in a line;
    padding: pixels between.
    Returns float32 [rows·(H + padding) + padding, columns·(W + padding) + padding, C], C dropped where it is 1.
    Raises ValueError for a wrong shape or non-positive `columns`.
    """
    columns = check_int("columns", columns, minimum=1)
    padding = check_int("padding", padding, minimum=0)
    array = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if array.ndim == 3:
        array = array[:, None]
    if array.ndim != 4 or 0 in array.shape:
        raise ValueError(f"images must be non-empty [n, C, H, W] or [n, H, W], got {array.shape}")
    scale = 1 / 255 if array.dtype == np.uint8 else 1.0
    array = array.astype(np.float32).transpose(0, 2, 3, 1) * np.float32(scale)  # [n, H, W, C]
    count, height, width, channels = array.shape
    rows = -(-count // columns)
    sheet = np.full(
        (rows * (height + padding) + padding, columns * (width + padding) + padding, channels), background, np.float32
    )
    for i in range(count):
        top = padding + (i // columns) * (height + padding)
        left = padding + (i % columns) * (width + padding)
        sheet[top : top + height, left : left + width] = array[i]
    return sheet[..., 0] if channels == 1 else sheet


def sample_sheet(dataset: Dataset, split: str, *, classes: int = 10, drawings: int = 10, seed: int = 0) -> np.ndarray:
    """A picture of a split: one line a class, chosen by `seed`, with its first drawings; ink dark on white,
    photographs as they are.

    Returns float32 in [0, 1], [height, width] or [height, width, C]. Raises DataError for data that has no images.
    """
    if not isinstance(dataset, ImageDataset):
        raise DataError(f"{dataset.name} has no images to show")
    images = dataset.images(split)
    classes, drawings = min(classes, images.num_classes), min(drawings, int(images.drawings.min()))
    sampler = EpisodeSampler(images, ways=classes, shots=1, queries=1, meta_batch=1, seed=seed, stream="sheet")
    chosen = sampler.indices(0).classes.repeat(drawings, axis=1)  # [1, classes · drawings]
    pictures = images.gather(chosen[0], np.tile(np.arange(drawings), classes))
    return image_grid(1 - pictures if dataset.drawn else pictures, columns=drawings, background=0.8)
