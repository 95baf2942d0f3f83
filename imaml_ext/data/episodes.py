"""Episodes (few-shot tasks) and the sampler that makes them from a set of images.

A task of N ways and K shots: N distinct classes; of each, K drawings to learn from (support) and some other drawings to
be judged by (query). A meta-step takes a batch of B tasks. Which tasks is a function of (seed, stream, step) alone, so
that resuming a run, or splitting the batch over processes, changes no task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .rng import check_int, choose_distinct, random_words


class TaskData(NamedTuple):
    """One side of a batch of tasks. x: [B, S, …] inputs; y: [B, S] int64 labels, or [B, S, …] float targets."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class EpisodeBatch:
    """B tasks, each with a support and a query set.

    support_x [B, S, …], support_y [B, S] int64 (or [B, S, …] float); query_x [B, Q, …], query_y [B, Q] likewise.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    def __post_init__(self) -> None:
        for side in ("support", "query"):
            x, y = getattr(self, f"{side}_x"), getattr(self, f"{side}_y")
            if x.dim() < 2 or y.dim() < 2 or x.shape[:2] != y.shape[:2]:
                raise ValueError(
                    f"{side}_x and {side}_y must agree in their first two dimensions [tasks, examples], "
                    f"got {tuple(x.shape)} and {tuple(y.shape)}"
                )
        if self.support_x.shape[0] != self.query_x.shape[0]:
            raise ValueError(
                "support and query must hold the same number of tasks, "
                f"got {self.support_x.shape[0]} and {self.query_x.shape[0]}"
            )

    @property
    def support(self) -> TaskData:
        return TaskData(self.support_x, self.support_y)

    @property
    def query(self) -> TaskData:
        return TaskData(self.query_x, self.query_y)

    @property
    def num_tasks(self) -> int:
        return self.support_x.shape[0]

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> EpisodeBatch:
        """The same episodes on ``device``; ``dtype`` applies to the floating-point tensors, labels stay int64."""

        def move(t: Tensor) -> Tensor:
            return t.to(device=device, dtype=dtype if t.is_floating_point() else None)

        return EpisodeBatch(*(move(t) for t in (self.support_x, self.support_y, self.query_x, self.query_y)))

    def shard(self, rank: int, world_size: int) -> EpisodeBatch:
        """The tasks of process ``rank`` of ``world_size``: a contiguous slice (views, no copies)."""
        rows = shard_slice(self.num_tasks, (rank, world_size))
        return EpisodeBatch(self.support_x[rows], self.support_y[rows], self.query_x[rows], self.query_y[rows])


def shard_slice(num_tasks: int, shard: tuple[int, int] | None) -> slice:
    """Tasks that process ``rank`` of ``world_size`` takes of a batch; sizes differ by one at most.

    Raises ValueError for a rank outside 0 … world_size − 1, or more processes than tasks.
    """
    if shard is None:
        return slice(0, num_tasks)
    rank, world_size = shard
    world_size = check_int("world_size", world_size, minimum=1)
    rank = check_int("rank", rank, minimum=0)
    if rank >= world_size:
        raise ValueError(f"rank must be below world_size = {world_size}, got {rank}")
    if world_size > num_tasks:
        raise ValueError(f"world_size must not exceed the {num_tasks} tasks of a meta-batch, got {world_size}")
    return slice(rank * num_tasks // world_size, (rank + 1) * num_tasks // world_size)


class ClassImages:
    """Images by class, kept as uint8, and the list of classes that may be drawn.

    A class is a character in one of up to four orientations: rotated by 0, 90, 180 or 270 degrees counter-clockwise, a
    character makes new classes (usual for Omniglot since Santoro et al. 2016). Rotated images are not stored; pixels
    are permuted when a batch is gathered. With ``rotations = 4`` the class id is 4 · (position of the character) +
    quarter turns.

    Args:
        images: uint8 [characters, drawings, H, W] or [characters, drawings, H, W, C].
        names: one name a character of ``images``; numbers where omitted.
        characters: which characters of ``images`` belong (indices; all by default). Several splits share one tensor.
        rotations: 1 or 4; 4 needs square images.
        orientations: bool [len(characters), rotations]: which orientations are classes. By default all. Where a
            character turned by some angle looks like itself or another one, that orientation is left out.

    Raises TypeError or ValueError that name the argument.
    """

    def __init__(
        self,
        images: Tensor,
        *,
        names: Sequence[str] | None = None,
        characters: Sequence[int] | np.ndarray | None = None,
        rotations: int = 1,
        orientations: np.ndarray | None = None,
    ) -> None:
        if not isinstance(images, Tensor) or images.dtype != torch.uint8:
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images must be a torch.uint8 tensor, got {got}")
        if images.dim() not in (4, 5) or 0 in images.shape:
            raise ValueError(
                "images must be [characters, drawings, H, W] or [characters, drawings, H, W, C] with no empty "
                f"dimension, got {tuple(images.shape)}"
            )
        if rotations not in (1, 4):
            raise ValueError(f"rotations must be 1 or 4, got {rotations!r}")
        if rotations == 4 and images.shape[2] != images.shape[3]:
            raise ValueError(f"rotations = 4 needs square images, got {images.shape[2]} × {images.shape[3]}")
        if names is not None and len(names) != images.shape[0]:
            raise ValueError(f"names must be one a character ({images.shape[0]}), got {len(names)}")
        chosen = np.arange(images.shape[0]) if characters is None else np.asarray(characters, dtype=np.int64)
        if chosen.ndim != 1 or chosen.size == 0 or chosen.min() < 0 or chosen.max() >= images.shape[0]:
            raise ValueError(f"characters must be a non-empty list of indices below {images.shape[0]}")
        if np.unique(chosen).size != chosen.size:
            raise ValueError("characters must be distinct indices, got repeated ones")
        if orientations is None:
            orientations = np.ones((chosen.size, rotations), dtype=bool)
        if orientations.shape != (chosen.size, rotations) or orientations.dtype != np.bool_:
            raise ValueError(
                f"orientations must be bool [{chosen.size}, {rotations}], "
                f"got {orientations.dtype} {list(orientations.shape)}"
            )
        position, turn = np.nonzero(orientations)
        self.images = images.contiguous()
        self.rotations = rotations
        self.character = chosen[position]  # [classes] which character of `images` each class shows
        self.quarter_turns = turn.astype(np.int64)  # [classes]
        self._names = tuple(names) if names is not None else None

    @property
    def num_classes(self) -> int:
        return self.character.size

    @property
    def num_characters(self) -> int:
        return np.unique(self.character).size

    @property
    def num_drawings(self) -> int:
        return self.images.shape[1]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image as episodes give it."""
        height, width = self.images.shape[2:4]
        return (self.images.shape[4] if self.images.dim() == 5 else 1, height, width)

    @property
    def device(self) -> torch.device:
        return self.images.device

    def name(self, class_id: int) -> str:
        """Readable name of a class, with its rotation in degrees where it is turned."""
        character, turns = int(self.character[class_id]), int(self.quarter_turns[class_id])
        name = self._names[character] if self._names is not None else str(character)
        return f"{name} rotated {90 * turns}°" if turns else name

    def with_images(self, images: Tensor) -> ClassImages:
        """The same classes over another copy of the image tensor (on another device, say)."""
        if images.shape != self.images.shape or images.dtype != torch.uint8:
            raise ValueError(
                f"images must be uint8 {tuple(self.images.shape)}, got {images.dtype} {tuple(images.shape)}"
            )
        other = object.__new__(ClassImages)
        other.__dict__.update(self.__dict__, images=images.contiguous())
        return other

    def to(self, device: torch.device | str) -> ClassImages:
        return self.with_images(self.images.to(device))

    def gather(self, classes: np.ndarray, drawings: np.ndarray, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Images of the given classes and drawings, on the device of the images.

        Args: classes, drawings: int64 arrays of one shape […]. Returns dtype […, C, H, W], values in [0, 1].
        """
        shape = classes.shape
        classes = classes.reshape(-1)
        rows = self.character[classes] * self.num_drawings + drawings.reshape(-1)
        flat = self.images.flatten(0, 1)  # [characters · drawings, H, W(, C)]
        if self.rotations == 1:
            picked = flat.index_select(0, self._index(rows))
        else:
            # Grouped by angle on the host, which knows the angles: no index of the size of the pixels, no device look.
            picked = torch.empty((rows.size, *flat.shape[1:]), dtype=torch.uint8, device=self.device)
            turns = self.quarter_turns[classes]
            for turn in np.unique(turns):
                where = np.nonzero(turns == turn)[0]
                turned = torch.rot90(flat.index_select(0, self._index(rows[where])), int(turn), (1, 2))
                picked.index_copy_(0, self._index(where), turned)
        picked = picked.permute(0, 3, 1, 2) if picked.dim() == 4 else picked.unsqueeze(1)  # [rows, C, H, W]
        images = torch.empty(picked.shape, dtype=dtype, device=self.device).copy_(picked)
        return images.div_(255).view(*shape, *self.image_shape)

    def _index(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows)).to(self.device, non_blocking=True)


@dataclass(frozen=True)
class EpisodeIndices:
    """Which images make a batch. classes [B, ways]; support [B, ways, shots] and query [B, ways, queries]: drawings."""

    classes: np.ndarray
    support: np.ndarray
    query: np.ndarray


class EpisodeSampler:
    """Few-shot classification tasks out of a set of images.

    ``sample(step)`` is a function of (seed, stream, step) alone: the same tasks in every process and on every machine.
    Within a task classes are distinct, and no drawing is in both support and query. Both sets are ordered by class:
    example i of the support has label ⌊i / shots⌋.

    Args:
        images: the classes to draw from.
        ways, shots, queries: classes a task; support and query images a class.
        meta_batch: tasks a step.
        seed, stream: what the tasks depend on beside the step; give each use (train, val, test) a stream of its own.
        device: where episodes are made; the uint8 images are kept there.
        dtype: floating-point type of the images.

    Raises ValueError where a number is not positive, ``ways`` exceeds the classes or ``shots + queries`` the drawings.
    """

    def __init__(
        self,
        images: ClassImages,
        *,
        ways: int,
        shots: int,
        queries: int,
        meta_batch: int,
        seed: int,
        stream: str = "train",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.ways = check_int("ways", ways, minimum=1)
        self.shots = check_int("shots", shots, minimum=1)
        self.queries = check_int("queries", queries, minimum=1)
        self.meta_batch = check_int("meta_batch", meta_batch, minimum=1)
        self.seed = check_int("seed", seed, minimum=0)
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point type, got {dtype}")
        if self.ways > images.num_classes:
            raise ValueError(f"ways must not exceed the {images.num_classes} classes there are, got {self.ways}")
        if self.shots + self.queries > images.num_drawings:
            raise ValueError(
                f"shots + queries must not exceed the {images.num_drawings} drawings a class has, "
                f"got {self.shots} + {self.queries}"
            )
        self.images = images if device is None else images.to(device)
        self.stream = stream
        self.dtype = dtype

    def indices(self, step: int, *, shard: tuple[int, int] | None = None) -> EpisodeIndices:
        """Classes and drawings of meta-step ``step`` (of the slice ``shard = (rank, world_size)`` of its tasks)."""
        step = check_int("step", step, minimum=0)
        tasks = shard_slice(self.meta_batch, shard)
        count = tasks.stop - tasks.start
        each = self.shots + self.queries
        words = random_words(
            seed=self.seed,
            stream=self.stream,
            step=step,
            first_task=tasks.start,
            num_tasks=count,
            words_per_task=self.ways * (1 + each),
        )
        classes = choose_distinct(words[:, : self.ways], self.images.num_classes)  # [B, ways]
        drawings = choose_distinct(words[:, self.ways :].reshape(-1, each), self.images.num_drawings)
        drawings = drawings.reshape(count, self.ways, each)
        return EpisodeIndices(classes, drawings[..., : self.shots], drawings[..., self.shots :])

    def sample(self, step: int, *, shard: tuple[int, int] | None = None) -> EpisodeBatch:
        """Episodes of meta-step ``step``; with ``shard = (rank, world_size)`` only that process's slice is made.

        Returns support_x [B, ways · shots, C, H, W] and query_x [B, ways · queries, C, H, W] in [0, 1], and int64
        labels.
        """
        chosen = self.indices(step, shard=shard)
        support_x, support_y = self._side(chosen.classes, chosen.support)
        query_x, query_y = self._side(chosen.classes, chosen.query)
        return EpisodeBatch(support_x, support_y, query_x, query_y)

    def _side(self, classes: np.ndarray, drawings: np.ndarray) -> tuple[Tensor, Tensor]:
        tasks, ways, each = drawings.shape
        x = self.images.gather(np.repeat(classes, each, axis=1), drawings.reshape(tasks, ways * each), dtype=self.dtype)
        labels = torch.arange(ways, device=self.images.device).repeat_interleave(each, output_size=ways * each)
        return x, labels.repeat(tasks, 1)  # [B, S, C, H, W], [B, S]
