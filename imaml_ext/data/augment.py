"""Random changes to the images of training tasks: flip, shift, affine distortion, colours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from imaml_ext.rng import uniform
from imaml_ext.settings import NOT_NEGATIVE, Bounds, Settings

_CHANGE = Bounds(at_least=0, at_most=1)


@dataclass(frozen=True)
class Augmentation(Settings):
    """Random changes to the images of a task, support and query alike; each image draws for itself.

    A distorted image shows at p what was at A p before, bilinearly interpolated, p = (right, down) from the centre in
    half sides; the entries of A are those of the identity and differences that are uniform in [−affine, affine].

    Brightness is x ← f x, contrast x ← m + f (x − m) with m the mean of the image's luma, and saturation
    x ← y + f (x − y) with y the luma of the pixel; f is uniform in [1 − change, 1 + change], and values outside [0, 1]
    are set to the nearer bound.
    """

    flip: bool = False  # Mirror every other image left to right.
    # Shift each image by up to so many pixels in each direction; what is uncovered is black.
    crop_padding: Annotated[int, NOT_NEGATIVE] = 0
    # Distort each image by a random matrix, whose entries are those of the identity changed by up to so much.
    affine: Annotated[float, Bounds(at_least=0, at_most=0.5)] = 0.0
    # Multiply each image by a random factor in 1 - brightness .. 1 + brightness.
    brightness: Annotated[float, _CHANGE] = 0.0
    contrast: Annotated[float, _CHANGE] = 0.0  # Likewise the differences from the image's mean.
    saturation: Annotated[float, _CHANGE] = 0.0  # Likewise the differences of colours from grey.

    @classmethod
    def upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {"affine": 0.0, **values}

    @property
    def words(self) -> int:
        """Random words per image."""
        return 10 if self.affine else 6

    def check_images(self, image_shape: tuple[int, int, int]) -> None:
        """Raises ValueError where images (C, H, W) cannot be changed so."""
        channels, height, width = image_shape
        if self.saturation and channels != 3:
            raise ValueError(f"saturation must be 0 for images without colours, got {self.saturation}")
        if self.crop_padding >= min(height, width):
            raise ValueError(f"crop_padding must be below the {height} × {width} pixels, got {self.crop_padding}")

    def __call__(self, images: Tensor, words: np.ndarray) -> Tensor:
        """Changes images [n, C, H, W] in [0, 1] by words uint64 [n, words]; the result is like the images."""
        draws = uniform(words)  # [n, words]: flip, down, right, brightness, contrast, saturation, four of a matrix
        if self.flip or self.crop_padding:
            mirrored = (draws[:, 0] < 0.5) & self.flip
            shifts = np.floor(draws[:, 1:3] * (2 * self.crop_padding + 1)).astype(np.int64)  # [n, 2]
            images = self._move(images, _to(mirrored, images.device), _to(shifts, images.device))
        if self.affine:
            matrices = np.eye(2) + self.affine * (2 * draws[:, 6:10].reshape(-1, 2, 2) - 1)
            images = self._distort(images, _to(matrices, images.device).to(images.dtype))
        spread = (self.brightness, self.contrast, self.saturation)
        if any(spread):
            factors = _to(1 + (2 * draws[:, 3:] - 1) * spread, images.device).to(images.dtype)
            images = self._colour(images, factors[:, :, None, None, None])
        return images

    def _move(self, images: Tensor, mirrored: Tensor, shifts: Tensor) -> Tensor:
        """Row r, column c of the result is row r + shifts[:, 0], column c + shifts[:, 1] of the padded image, columns
        counted from the right where it is mirrored."""
        count, channels, height, width = images.shape
        padded = F.pad(images, (self.crop_padding,) * 4)
        down, right = (torch.arange(size, device=images.device) for size in (height, width))
        columns = torch.where(mirrored[:, None], right.flip(0), right) + shifts[:, 1:]  # [n, W]
        rows = down + shifts[:, :1]  # [n, H]
        image = torch.arange(count, device=images.device)[:, None, None, None]
        channel = torch.arange(channels, device=images.device)[None, :, None, None]
        return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]

    def _distort(self, images: Tensor, matrices: Tensor) -> Tensor:
        """Changes images [n, C, H, W] by matrices [n, 2, 2] of (right, down); what was outside is black."""
        grid = F.affine_grid(F.pad(matrices, (0, 1)), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)

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
