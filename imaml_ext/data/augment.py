"""Random changes to the images of training tasks: flip, shift, colours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor

from imaml_ext.rng import uniform
from imaml_ext.settings import NOT_NEGATIVE, Bounds, Settings

_CHANGE = Bounds(at_least=0, at_most=1)


@dataclass(frozen=True)
class Augmentation(Settings):
    """Random changes to the images of a task, support and query alike; each image draws for itself.

    Brightness is x ← f x, contrast x ← m + f (x − m) with m the mean of the image's luma, and saturation
    x ← y + f (x − y) with y the luma of the pixel; f is uniform in [1 − change, 1 + change], and values outside [0, 1]
    are set to the nearer bound.
    """

    WORDS: ClassVar[int] = 6  # random words per image

    flip: bool = False  # Mirror every other image left to right.
    # Shift each image by up to so many pixels in each direction; what is uncovered is black.
    crop_padding: Annotated[int, NOT_NEGATIVE] = 0
    # Multiply each image by a random factor in 1 - brightness .. 1 + brightness.
    brightness: Annotated[float, _CHANGE] = 0.0
    contrast: Annotated[float, _CHANGE] = 0.0  # Likewise the differences from the image's mean.
    saturation: Annotated[float, _CHANGE] = 0.0  # Likewise the differences of colours from grey.

    def check_images(self, image_shape: tuple[int, int, int]) -> None:
        """Raises ValueError where images (C, H, W) cannot be changed so."""
        channels, height, width = image_shape
        if self.saturation and channels != 3:
            raise ValueError(f"saturation must be 0 for images without colours, got {self.saturation}")
        if self.crop_padding >= min(height, width):
            raise ValueError(f"crop_padding must be below the {height} × {width} pixels, got {self.crop_padding}")

    def __call__(self, images: Tensor, words: np.ndarray) -> Tensor:
        """Changes images [n, C, H, W] in [0, 1] by words uint64 [n, WORDS]; the result is like the images."""
        draws = uniform(words)  # [n, WORDS]: flip, down, right, brightness, contrast, saturation
        if self.flip or self.crop_padding:
            mirrored = (draws[:, 0] < 0.5) & self.flip
            shifts = np.floor(draws[:, 1:3] * (2 * self.crop_padding + 1)).astype(np.int64)  # [n, 2]
            images = self._move(images, _to(mirrored, images.device), _to(shifts, images.device))
        spread = (self.brightness, self.contrast, self.saturation)
        if any(spread):
            factors = _to(1 + (2 * draws[:, 3:] - 1) * spread, images.device).to(images.dtype)
            images = self._colour(images, factors[:, :, None, None, None])
        return images

    def _move(self, images: Tensor, mirrored: Tensor, shifts: Tensor) -> Tensor:
        """Row r, column c of the result is row r + shifts[:, 0], column c + shifts[:, 1] of the padded image, columns
        counted from the right where it is mirrored."""
        count, channels, height, width = images.shape
        padded = torch.nn.functional.pad(images, (self.crop_padding,) * 4)
        down, right = (torch.arange(size, device=images.device) for size in (height, width))
        columns = torch.where(mirrored[:, None], right.flip(0), right) + shifts[:, 1:]  # [n, W]
        rows = down + shifts[:, :1]  # [n, H]
        image = torch.arange(count, device=images.device)[:, None, None, None]
        channel = torch.arange(channels, device=images.device)[None, :, None, None]
        return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]

    def _colour(self, images: Tensor, factors: Tensor) -> Tensor:
        """Changes brightness, contrast and saturation by factors [n, 3, 1, 1, 1]."""
        if self.brightness:
            images = (images * factors[:, 0]).clamp_(0, 1)
        if self.contrast:
            # In float64: the sum of an image does not depend on how many there are.
            mean = _luma(images).mean((1, 2, 3), keepdim=True, dtype=torch.float64).to(images.dtype)  # [n, 1, 1, 1]
            images = (mean + factors[:, 1] * (images - mean)).clamp_(0, 1)
        if self.saturation:
            luma = _luma(images)
            images = (luma + factors[:, 2] * (images - luma)).clamp_(0, 1)
        return images


def _luma(images: Tensor) -> Tensor:
    """Returns the luma [n, 1, H, W] of images [n, C, H, W]."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-R BT.601


def _to(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)
