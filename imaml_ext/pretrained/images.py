"""Photographs and drawings as the networks were trained to see them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from imaml_ext.errors import RunError
from imaml_ext.pictures import Reading, read_pictures


def read_images(paths: Sequence[Path | str], reading: Reading | Sequence[int]) -> Tensor:
    """Reads image files as a batch [n, C, H, W] in [0, 1].

    Args:
        paths: the files, in any format that Pillow reads. reading: `FewShotLearner.reading`, how the data set of the
            weights was read. A shape (1, H, H) stands for ink on a plain ground, as in Omniglot, and (3, H, H) for the
            middle square of a photograph.

    Raises:
        DataError: files are missing, no images, or (where ink is looked for) blank: names each of them.
        ValueError: a shape that cannot be, or no files. TypeError: a single path in place of a list.
    """
    if not isinstance(reading, Reading):
        reading = reading_of_shape(reading)
    pixels = torch.from_numpy(read_pictures(paths, reading))  # [n, H, W] or [n, H, W, 3]
    if not len(pixels):
        raise ValueError("paths must name at least one file, got none")
    pixels = pixels.permute(0, 3, 1, 2) if pixels.dim() == 4 else pixels.unsqueeze(1)
    return pixels.to(torch.float32) / 255


def read_as(reading: Reading | None, paths: Sequence[Path | str], weights: str) -> Tensor:
    """`read_images`, for a learner from weights of that name; RunError where they are of regression."""
    if reading is None:
        raise RunError(f"the learner from {weights} is of regression: it reads no pictures")
    return read_images(paths, reading)


def reading_of_shape(shape: Sequence[int]) -> Reading:
    """Returns how pictures are read where nothing but the shape (C, H, H) is known."""
    if len(shape) != 3 or shape[0] not in (1, 3) or shape[1] != shape[2]:
        raise ValueError(f"shape must be (1, H, H) or (3, H, H), got {tuple(shape)}")
    if shape[0] == 1:
        return Reading(size=shape[1], colours="ink", square="ink")
    return Reading(size=shape[1], square="middle")
