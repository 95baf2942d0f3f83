"""Data sets to look at: a table of the splits, images side by side, and how hard the tasks are."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from imaml_ext.checks import check_int
from imaml_ext.data.datasets import Dataset, ImageDataset
from imaml_ext.data.episodes import EpisodeSampler
from imaml_ext.errors import DataError


def summary(dataset: Dataset) -> str:
    """Describes a data set in a few lines of text: description, shape, and a table of its splits."""
    rows = dataset.rows()
    cells = [list(rows[0])] + [[f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    aligned = [">" if isinstance(value, int) else "<" for value in rows[0].values()]
    table = ["  ".join(map("{:{}{}}".format, line, aligned, widths)).rstrip() for line in cells]
    shape = " × ".join(map(str, dataset.input_shape))
    return "\n".join([dataset.description, f"{dataset.kind}, one example: {shape}", "", *table])


def image_grid(images: Tensor | np.ndarray, *, columns: int, padding: int = 2, background: float = 1.0) -> np.ndarray:
    """Puts images side by side into one picture.

    Args:
        images: [n, C, H, W] or [n, H, W], values in [0, 1] (or uint8, 0 to 255).
        columns: images in a line. padding: pixels between.

    Returns:
        float32 [rows·(H + padding) + padding, columns·(W + padding) + padding, C], C dropped where it is 1.

    Raises:
        ValueError: a wrong shape, or no columns.
    """
    columns, padding = check_int("columns", columns, minimum=1), check_int("padding", padding, minimum=0)
    array = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if array.ndim == 3:
        array = array[:, None]
    if array.ndim != 4 or 0 in array.shape:
        raise ValueError(f"images must be non-empty [n, C, H, W] or [n, H, W], got {array.shape}")
    scale = 1 / 255 if array.dtype == np.uint8 else 1.0
    array = array.astype(np.float32).transpose(0, 2, 3, 1) * np.float32(scale)  # [n, H, W, C]
    count, height, width, channels = array.shape
    down, right = height + padding, width + padding
    size = (-(-count // columns) * down + padding, columns * right + padding, channels)
    sheet = np.full(size, background, np.float32)
    for i in range(count):
        top, left = padding + i // columns * down, padding + i % columns * right
        sheet[top : top + height, left : left + width] = array[i]
    return sheet[..., 0] if channels == 1 else sheet


def sample_sheet(dataset: Dataset, split: str, *, classes: int = 10, drawings: int = 10, seed: int = 0) -> np.ndarray:
    """Draws a picture of a split: one line per class, chosen by `seed`, with its first drawings.

    Ink is dark on white, photographs are as they are. Returns float32 in [0, 1], [height, width] or [height, width, C].

    Raises:
        DataError: the data has no images.
    """
    if not isinstance(dataset, ImageDataset):
        raise DataError(f"{dataset.name} has no images to show")
    images = dataset.images(split)
    classes, drawings = min(classes, images.num_classes), min(drawings, int(images.drawings.min()))
    sampler = EpisodeSampler(images, ways=classes, shots=1, queries=1, meta_batch=1, seed=seed, stream="sheet")
    chosen = sampler.indices(0).classes.repeat(drawings, axis=1)  # [1, classes · drawings]
    pictures = images.gather(chosen[0], np.tile(np.arange(drawings), classes))
    return image_grid(1 - pictures if dataset.drawn else pictures, columns=drawings, background=0.8)


def nearest_neighbour_accuracy(sampler: EpisodeSampler, *, tasks: int) -> tuple[float, float]:
    """Measures how often the support image at the least Euclidean distance of pixels has a query image's label.

    Returns the accuracy (0 to 1), the mean over at least `tasks` tasks (whole batches from step 0), and 1.96 standard
    errors of it.
    """
    accuracies = []
    for step in range(-(-check_int("tasks", tasks, minimum=2) // sampler.meta_batch)):
        batch = sampler.sample(step)
        distance = torch.cdist(batch.query_x.flatten(2), batch.support_x.flatten(2))  # [B, Q, S]
        guess = batch.support_y.gather(1, distance.argmin(-1))
        accuracies.append((guess == batch.query_y).double().mean(1))
    accuracy = torch.cat(accuracies)
    return accuracy.mean().item(), 1.96 * accuracy.std().item() / accuracy.numel() ** 0.5
