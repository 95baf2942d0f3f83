"""What a data set is: named splits, each of which has samplers of tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor

from imaml_ext.checks import check_int

from .augment import Augmentation
from .class_images import ClassImages
from .episodes import EpisodeBatch, EpisodeSampler
from .linear import LinearSampler
from .pictures import number_range
from .sinusoid import SinusoidSampler


class Sampler(Protocol):
    """What a training loop needs of any sampler."""

    meta_batch: int

    def sample(self, step: int, *, shard: tuple[int, int] | None = None) -> EpisodeBatch: ...


class Dataset(ABC):
    """A source of tasks with named splits.

    Attributes: name; kind, "classification" or "regression"; description, one line; splits, the names ``sampler``
    accepts.
    """

    name: str
    kind: Literal["classification", "regression"]
    description: str
    splits: tuple[str, ...]

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example: (C, H, W) of an image, (features,) in regression."""

    @abstractmethod
    def sampler(
        self,
        split: str,
        *,
        ways: int | None,
        shots: int,
        queries: int,
        meta_batch: int,
        seed: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        augmentation: Augmentation | None = None,
    ) -> Sampler:
        """Tasks of one split; the split's name is the random stream. ``ways`` and ``augmentation``, of training images,
        are None in regression.

        Raises ValueError for an unknown split, or numbers that the data cannot fill.
        """

    @abstractmethod
    def rows(self) -> list[dict[str, str | int]]:
        """One entry a split for a table: its name and what it holds."""

    def _check_split(self, split: str) -> None:
        if split not in self.splits:
            raise ValueError(f"split of {self.name} must be one of {', '.join(map(repr, self.splits))}, got {split!r}")


class ImageDataset(Dataset):
    """Classification tasks from images; all splits share one uint8 image tensor, of which one copy a device is kept.

    ``drawn``: classes are characters, ink = 1, which pictures show dark on white; otherwise images are photographs.
    """

    kind: Literal["classification", "regression"] = "classification"

    def __init__(
        self, name: str, description: str, parts: Mapping[str, ClassImages], notes: Mapping[str, str], *, drawn: bool
    ) -> None:
        self.name = name
        self.description = description
        self.drawn = drawn
        self.splits = tuple(parts)
        self._parts = dict(parts)
        self._notes = dict(notes)
        self._on_device: dict[torch.device, Tensor] = {}

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return next(iter(self._parts.values())).image_shape

    def images(self, split: str, *, device: torch.device | str | None = None) -> ClassImages:
        """The classes of a split, their images on ``device``."""
        self._check_split(split)
        part = self._parts[split]
        if device is None:
            return part
        where = torch.device(device)
        if where.type == "cuda" and where.index is None:
            where = torch.device("cuda", torch.cuda.current_device())
        if where == part.device:
            return part
        if where not in self._on_device:
            self._on_device[where] = part.images.to(where)
        return part.with_images(self._on_device[where])

    def sampler(
        self,
        split: str,
        *,
        ways: int | None,
        shots: int,
        queries: int,
        meta_batch: int,
        seed: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        augmentation: Augmentation | None = None,
    ) -> EpisodeSampler:
        return EpisodeSampler(
            self.images(split, device=device),
            ways=check_int("ways", ways, minimum=1),
            shots=shots,
            queries=queries,
            meta_batch=meta_batch,
            seed=seed,
            stream=split,
            dtype=dtype,
            augmentation=augmentation,
        )

    def rows(self) -> list[dict[str, str | int]]:
        return [
            {
                "split": split,
                **({"characters": part.num_characters} if self.drawn else {}),
                "classes": part.num_classes,
                "images of a class": part.num_drawings or number_range(part.drawings),
                "what": self._notes.get(split, ""),
            }
            for split, part in self._parts.items()
        ]


class SinusoidDataset(Dataset):
    """Sinusoid regression; the splits are independent streams of tasks from one distribution."""

    name = "sinusoid"
    kind: Literal["classification", "regression"] = "regression"
    description = "regression of A·sin(x − p), A in [0.1, 5], p in [0, π], x in [−5, 5] (Finn et al. 2017)"
    splits = ("train", "val", "test")
    input_shape = (1,)

    def sampler(
        self,
        split: str,
        *,
        ways: int | None = None,
        shots: int,
        queries: int,
        meta_batch: int,
        seed: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        augmentation: Augmentation | None = None,
    ) -> SinusoidSampler:
        self._check_split(split)
        _regression(self.name, ways, augmentation)
        return SinusoidSampler(
            shots=shots, queries=queries, meta_batch=meta_batch, seed=seed, stream=split, device=device, dtype=dtype
        )

    def rows(self) -> list[dict[str, str | int]]:
        return [{"split": split, "what": "an unlimited stream of tasks"} for split in self.splits]


class LinearDataset(Dataset):
    """Linear regression with a closed form; the splits are independent streams of tasks from one distribution."""

    name = "linear"
    kind: Literal["classification", "regression"] = "regression"
    splits = ("train", "val", "test")

    def __init__(self, *, features: int, condition_number: float, noise: float) -> None:
        self.features, self.condition_number, self.noise = features, condition_number, noise
        self.description = f"linear regression on {features} features, XᵀX of condition number {condition_number:g}"

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.features,)

    def sampler(
        self,
        split: str,
        *,
        ways: int | None = None,
        shots: int,
        queries: int,
        meta_batch: int,
        seed: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        augmentation: Augmentation | None = None,
    ) -> LinearSampler:
        self._check_split(split)
        _regression(self.name, ways, augmentation)
        return LinearSampler(
            features=self.features,
            shots=shots,
            queries=queries,
            meta_batch=meta_batch,
            seed=seed,
            condition_number=self.condition_number,
            noise=self.noise,
            stream=split,
            device=device,
            dtype=dtype,
        )

    def rows(self) -> list[dict[str, str | int]]:
        return [{"split": split, "what": "an unlimited stream of tasks"} for split in self.splits]


def _regression(name: str, ways: int | None, augmentation: Augmentation | None) -> None:
    if ways is not None:
        raise ValueError(f"ways must be None for {name}, which is regression, got {ways}")
    if augmentation is not None:
        raise ValueError(f"augmentation must be None for {name}, which has no images")
