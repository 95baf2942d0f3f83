"""What a data set is: named splits, each of which has samplers of tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from imaml_ext.batch import EpisodeBatch
from imaml_ext.checks import check_choice
from imaml_ext.data.augment import Augmentation
from imaml_ext.data.class_images import ClassImages, number_range
from imaml_ext.data.episodes import EpisodeSampler
from imaml_ext.pictures import Reading


class Sampler(Protocol):
    """What a training loop needs of any sampler."""

    meta_batch: int

    def sample(self, step: int, *, shard: tuple[int, int] | None = None) -> EpisodeBatch: ...


class Dataset(ABC):
    """A source of tasks with named splits."""

    name: str  # as `load_dataset` knows it
    kind: Literal["classification", "regression"]  # what its tasks are
    description: str  # one line
    splits: tuple[str, ...]  # the names that `sampler` accepts
    input_shape: tuple[int, ...]  # of one example: (C, H, W) of an image, (features,) in regression
    reading: Reading | None = None  # how pictures of one's own are read, to be like the images of this data set

    @abstractmethod
    def sampler(
        self, split: str, *, ways: int | None = None, augmentation: Augmentation | None = None, **sizes: Any
    ) -> Sampler:
        """Makes a sampler of the tasks of one split, whose name is the random stream.

        Args:
            ways, augmentation: see `EpisodeSampler`; None in regression.
            sizes: shots, queries, meta_batch, seed; device and dtype (float32) where wanted: see `TaskSampler`.

        Raises:
            ValueError, TypeError: an unknown split, or numbers that the data cannot fill.
        """

    def classes(self) -> dict[str, tuple[str, ...]]:
        """Returns the names of the classes of each split; empty in regression, which has none."""
        return {}

    @abstractmethod
    def rows(self) -> list[dict[str, str | int]]:
        """Describes each split for a table: its name and what it holds."""


class ImageDataset(Dataset):
    """Classification tasks from images; all splits share one uint8 image tensor, of which each device keeps one copy.

    Args:
        parts: the classes of each split. notes: what each split holds, in words.
        reading: how pictures of one's own are read, to be like these images. Where it looks for ink, classes are
            characters, ink = 1, which pictures show dark on white; otherwise images are photographs.
    """

    kind: Literal["classification", "regression"] = "classification"

    reading: Reading

    def __init__(
        self,
        name: str,
        description: str,
        parts: Mapping[str, ClassImages],
        notes: Mapping[str, str],
        *,
        reading: Reading,
    ) -> None:
        self.name, self.description, self.reading, self.splits = name, description, reading, tuple(parts)
        self.drawn = reading.colours == "ink"
        self.input_shape = next(iter(parts.values())).image_shape
        self._parts, self._notes = dict(parts), dict(notes)
        self._on_device: dict[torch.device, Tensor] = {}

    def images(self, split: str, *, device: torch.device | str | None = None) -> ClassImages:
        """Returns the classes of a split, their images on `device`."""
        part = self._parts[check_choice(f"split of {self.name}", split, self.splits)]
        where = part.device if device is None else torch.empty(0, device=device).device  # "cuda" gets its number
        if where == part.device:
            return part
        if where not in self._on_device:
            self._on_device[where] = part.images.to(where)
        return part.with_images(self._on_device[where])

    def sampler(self, split: str, *, ways: Any = None, **sizes: Any) -> EpisodeSampler:
        images = self.images(split, device=sizes.pop("device", None))
        return EpisodeSampler(images, ways=ways, stream=split, **sizes)

    def classes(self) -> dict[str, tuple[str, ...]]:
        return {split: part.character_names() for split, part in self._parts.items()}

    def rows(self) -> list[dict[str, str | int]]:
        rows = []
        for split, part in self._parts.items():
            row: dict[str, str | int] = {"split": split}
            if self.drawn:
                row["characters"] = part.num_characters
            row |= {"classes": part.num_classes, "images per class": part.num_drawings or number_range(part.drawings)}
            rows.append(row | {"what": self._notes.get(split, "")})
        return rows


class RegressionDataset(Dataset):
    """Regression tasks that are made, not stored; the splits are independent streams of tasks from one distribution.

    Args:
        sampler_class: makes the sampler of a stream from `stream` and the sizes that `sampler` takes.
    """

    kind: Literal["classification", "regression"] = "regression"
    splits = ("train", "val", "test")

    def __init__(self, name: str, description: str, features: int, sampler_class: Callable[..., Sampler]) -> None:
        self.name, self.description, self.input_shape = name, description, (features,)
        self._sampler_class = sampler_class

    def sampler(self, split: str, *, ways: Any = None, augmentation: Any = None, **sizes: Any) -> Sampler:
        check_choice(f"split of {self.name}", split, self.splits)
        if ways is not None:
            raise ValueError(f"ways must be None for {self.name}, which is regression, got {ways}")
        if augmentation is not None:
            raise ValueError(f"augmentation must be None for {self.name}, which has no images")
        return self._sampler_class(stream=split, **{"dtype": torch.float32} | sizes)

    def rows(self) -> list[dict[str, str | int]]:
        return [{"split": split, "what": "an unlimited stream of tasks"} for split in self.splits]
