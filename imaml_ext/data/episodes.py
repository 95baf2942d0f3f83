"""Episodes (few-shot tasks) and the sampler that makes them from a set of images.

A task of N ways and K shots has N distinct classes; of each, K drawings to learn from (support) and some others to be
judged by (query). A meta-step takes a batch of B tasks. Which tasks is a function of (seed, stream, step) alone:
resuming a run, or splitting the batch over processes, changes no task.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from imaml_ext.batch import EpisodeBatch, shard_slice
from imaml_ext.checks import check_int
from imaml_ext.data.augment import Augmentation
from imaml_ext.data.class_images import ClassImages, number_range
from imaml_ext.rng import choose_distinct, random_words


def class_labels(tasks: int, ways: int, each: int, device: torch.device) -> Tensor:
    """Returns int64 [tasks, ways · each]: example i of a task has label ⌊i / each⌋."""
    return torch.arange(ways, device=device).repeat_interleave(each, output_size=ways * each).repeat(tasks, 1)


class EpisodeIndices(NamedTuple):
    """Which images make a batch. classes [B, ways]; support [B, ways, shots] and query [B, ways, queries]: drawings."""

    classes: np.ndarray
    support: np.ndarray
    query: np.ndarray


@dataclass(kw_only=True, eq=False, repr=False)
class TaskSampler:
    """The sizes that all samplers share, checked, and the words that the tasks of a meta-step are drawn from.

    Raises:
        TypeError, ValueError: an argument of the wrong type, or a number that is not positive.
    """

    shots: int  # support examples, per class or per task
    queries: int  # query examples, likewise
    meta_batch: int  # tasks per step
    seed: int
    stream: str = "train"  # beside the seed and the step, what tasks depend on: train, val and test have their own
    device: torch.device | str | None = None
    dtype: torch.dtype = torch.float32  # a floating-point type

    def __post_init__(self) -> None:
        for name, minimum in (("shots", 1), ("queries", 1), ("meta_batch", 1), ("seed", 0)):
            setattr(self, name, check_int(name, getattr(self, name), minimum=minimum))
        if not self.dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point type, got {self.dtype}")

    def _words(self, step: int, shard: tuple[int, int] | None, each: int, *, stream: str) -> np.ndarray:
        """Draws `each` random words for every task of meta-step `step` (of the slice `shard`): uint64 [B, each]."""
        tasks = shard_slice(self.meta_batch, shard)
        return random_words(
            seed=self.seed,
            stream=stream,
            step=check_int("step", step, minimum=0),
            first_task=tasks.start,
            num_tasks=tasks.stop - tasks.start,
            words_per_task=each,
        )


@dataclass(kw_only=True, eq=False, repr=False)
class EpisodeSampler(TaskSampler):
    """Few-shot classification tasks out of a set of images.

    `sample(step)` is a function of (seed, stream, step) alone: the same tasks in every process and on every machine.
    Within a task classes are distinct, and no drawing is in both support and query. Both sets are ordered by class:
    example i of the support has label ⌊i / shots⌋.

    Shots and queries are images per class. `device` is where episodes are made, and the uint8 images are kept; by
    default where they are. For the others see `TaskSampler`.

    Raises:
        TypeError, ValueError: see `TaskSampler`; `ways` exceeds the classes, `shots + queries` the drawings of a class,
            or images cannot be augmented so.
    """

    images: ClassImages = field(kw_only=False)  # the classes to draw from
    ways: int  # classes per task
    augmentation: Augmentation | None = None  # changes to every image, a function of (seed, stream, step) too

    def __post_init__(self) -> None:
        super().__post_init__()
        images = self.images
        self.ways = check_int("ways", self.ways, minimum=1)
        if self.ways > images.most_ways:
            what = "characters" if images.distinct_characters else "classes"
            raise ValueError(f"ways must not exceed the {images.most_ways} {what} there are, got {self.ways}")
        each = self.shots + self.queries
        small = np.flatnonzero(images.drawings < each)
        if small.size:
            raise ValueError(
                f"shots + queries must not exceed {_few(images, small)}, got {self.shots} + {self.queries}"
            )
        if self.augmentation is not None:
            self.augmentation.check_images(images.image_shape)
        self.images = images if self.device is None else images.to(self.device)
        self.device = self.images.device

    def indices(self, step: int, *, shard: tuple[int, int] | None = None) -> EpisodeIndices:
        """Chooses classes and drawings of meta-step `step` (of the slice `shard = (rank, world_size)` of its tasks)."""
        each = self.shots + self.queries
        of_classes = self.ways * (2 if self.images.distinct_characters else 1)
        words = self._words(step, shard, of_classes + self.ways * each, stream=self.stream)
        classes = self.images.choose(words[:, :of_classes], self.ways)  # [B, ways]
        drawings = choose_distinct(words[:, of_classes:].reshape(-1, each), self.images.drawings[classes.reshape(-1)])
        drawings = drawings.reshape(-1, self.ways, each)
        return EpisodeIndices(classes, drawings[..., : self.shots], drawings[..., self.shots :])

    def sample(self, step: int, *, shard: tuple[int, int] | None = None) -> EpisodeBatch:
        """Makes the episodes of meta-step `step`; with `shard = (rank, world_size)` only that process's slice is made.

        Returns support_x [B, ways · shots, C, H, W] and query_x [B, ways · queries, C, H, W] in [0, 1], and int64
        labels.
        """
        chosen = self.indices(step, shard=shard)
        words = self._augmentation_words(step, shard)
        tensors: list[Tensor] = []
        for drawings in (chosen.support, chosen.query):
            tasks, ways, each = drawings.shape
            classes = np.repeat(chosen.classes, each, axis=1)  # [B, ways · each]
            x = self.images.gather(classes, drawings.reshape(tasks, -1), dtype=self.dtype)
            if self.augmentation is not None:
                own, words = words[:, : ways * each], words[:, ways * each :]
                x = self.augmentation(x.flatten(0, 1), own.reshape(-1, self.augmentation.words)).view(x.shape)
            tensors += [x, class_labels(tasks, ways, each, x.device)]
        return EpisodeBatch(*tensors)

    def _augmentation_words(self, step: int, shard: tuple[int, int] | None) -> np.ndarray:
        """Draws the words that change each image, apart from those that chose it: [B, images, words]."""
        if self.augmentation is None:
            return np.empty((0, 0, 0))
        images, each = self.ways * (self.shots + self.queries), self.augmentation.words
        words = self._words(step, shard, images * each, stream=f"{self.stream}/augmentation")
        return words.reshape(len(words), images, each)


def _few(images: ClassImages, small: np.ndarray) -> str:
    """Says how few drawings classes have."""
    if images.num_drawings is not None:
        return f"the {images.num_drawings} drawings a class has"
    names = [repr(images.name(int(i))) for i in small[:10]]
    if small.size == 1:
        return f"the {images.drawings[small[0]]} drawings class {names[0]} has"
    more = f" and {small.size - 10} more" if small.size > 10 else ""
    return (
        f"the {number_range(images.drawings[small])} drawings that {small.size} classes have ({', '.join(names)}{more})"
    )
