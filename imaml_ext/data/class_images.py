"""Images by class, on the device that episodes are made on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from imaml_ext.rng import choose_distinct, uniform


class ClassImages:
    """Images by class, kept as uint8, and the list of classes that may be drawn.

    A class is a character in one of up to four orientations: rotated by 0, 90, 180 or 270 degrees counter-clockwise, a
    character makes new classes (usual for Omniglot since Santoro et al. 2016). Rotated images are not stored; pixels
    are permuted when a batch is gathered. With `rotations = 4` the class id is 4 · (position of the character) +
    quarter turns.

    Args:
        images: uint8 [characters, drawings, H, W] or [characters, drawings, H, W, C]; with `counts` one character
            after another, [sum of counts, H, W] or [sum of counts, H, W, C].
        counts: how many drawings each character has, where that differs: int [characters].
        names: one name per character of `images`; numbers where omitted.
        characters: which characters of `images` belong (indices; all by default). Several splits share one tensor.
        rotations: 1 or 4; 4 needs square images.
        orientations: bool [len(characters), rotations]: which orientations are classes. By default all. Where a
            character turned by some angle looks like itself or another one, that orientation is left out.
        distinct_characters: a task shows a character in one orientation at most. By default orientations of one
            character may meet in a task, as any classes may.

    Raises:
        TypeError, ValueError: an argument of the wrong type or shape.
    """

    def __init__(
        self,
        images: Tensor,
        *,
        counts: Sequence[int] | np.ndarray | None = None,
        names: Sequence[str] | None = None,
        characters: Sequence[int] | np.ndarray | None = None,
        rotations: int = 1,
        orientations: np.ndarray | None = None,
        distinct_characters: bool = False,
    ) -> None:
        self._leading = 2 if counts is None else 1
        self._check_images(images, rotations)
        each = np.asarray(np.full(*images.shape[:2]) if counts is None else counts, dtype=np.int64)  # [characters]
        if each.ndim != 1 or each.min(initial=1) < 1 or each.sum() != images.shape[: self._leading].numel():
            wanted = f"one positive number per character, {images.shape[0]} in sum"
            raise ValueError(f"counts must be {wanted}, got {each.tolist()}")
        if names is not None and len(names) != each.size:
            raise ValueError(f"names must be one per character ({each.size}), got {len(names)}")
        chosen = np.arange(each.size) if characters is None else np.asarray(characters, dtype=np.int64)
        if chosen.ndim != 1 or chosen.size == 0 or chosen.min() < 0 or chosen.max() >= each.size:
            raise ValueError(f"characters must be a non-empty list of indices below {each.size}")
        if np.unique(chosen).size != chosen.size:
            raise ValueError("characters must be distinct indices, got repeated ones")
        allowed = np.ones((chosen.size, rotations), dtype=bool) if orientations is None else orientations
        if allowed.shape != (chosen.size, rotations) or allowed.dtype != np.bool_:
            wanted = f"bool [{chosen.size}, {rotations}]"
            raise ValueError(f"orientations must be {wanted}, got {allowed.dtype} {list(allowed.shape)}")
        position, turn = np.nonzero(allowed)
        self.distinct_characters = distinct_characters
        self.orientations = allowed.sum(1)[
            allowed.any(1)
        ]  # [characters that belong] classes of each, one after another
        self.images = images.contiguous()
        self.rotations = rotations
        self.character = chosen[position]  # [classes] which character of `images` each class shows
        self.quarter_turns = turn.astype(np.int64)  # [classes]
        self.drawings = each[self.character]  # [classes] how many there are
        self._first_row = (np.cumsum(each) - each)[self.character]  # [classes] where they begin in `images`
        self._names = tuple(names) if names is not None else None

    def _check_images(self, images: Tensor, rotations: int) -> None:
        if not isinstance(images, Tensor) or images.dtype != torch.uint8:
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images must be a torch.uint8 tensor, got {got}")
        if images.dim() not in (self._leading + 2, self._leading + 3) or 0 in images.shape:
            first = "characters, drawings" if self._leading == 2 else "drawings"
            wanted = f"[{first}, H, W] or [{first}, H, W, C] with no empty dimension"
            raise ValueError(f"images must be {wanted}, got {tuple(images.shape)}")
        height, width = images.shape[self._leading : self._leading + 2]
        if rotations not in (1, 4):
            raise ValueError(f"rotations must be 1 or 4, got {rotations!r}")
        if rotations == 4 and height != width:
            raise ValueError(f"rotations = 4 needs square images, got {height} × {width}")

    @property
    def num_classes(self) -> int:
        return self.character.size

    @property
    def num_characters(self) -> int:
        return np.unique(self.character).size

    @property
    def most_ways(self) -> int:
        """How many classes a task can have."""
        return self.num_characters if self.distinct_characters else self.num_classes

    def choose(self, words: np.ndarray, ways: int) -> np.ndarray:
        """Draws the classes of tasks by random words, uint64 [tasks, ways], with twice as many for distinct characters.

        Those come from two independent uniform draws: distinct characters, then an orientation of each.

        Returns:
            int64 [tasks, ways], distinct in every row.
        """
        if not self.distinct_characters:
            return choose_distinct(words, self.num_classes)
        character = choose_distinct(words[:, :ways], self.num_characters)
        turn = np.floor(uniform(words[:, ways:]) * self.orientations[character]).astype(np.int64)
        return (np.cumsum(self.orientations) - self.orientations)[character] + turn

    @property
    def num_drawings(self) -> int | None:
        """How many drawings each class has; None where classes differ in it."""
        return int(self.drawings[0]) if (self.drawings == self.drawings[0]).all() else None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image as episodes give it."""
        height, width, *channels = self.images.shape[self._leading :]
        return (channels[0] if channels else 1, height, width)

    @property
    def device(self) -> torch.device:
        return self.images.device

    def character_names(self) -> tuple[str, ...]:
        """Returns the names of the characters, each once whatever its orientations are."""
        names = self._names
        return tuple(str(i) if names is None else names[i] for i in np.unique(self.character))

    def name(self, class_id: int) -> str:
        """Returns the readable name of a class, with its rotation in degrees where it is turned."""
        character, turns = int(self.character[class_id]), int(self.quarter_turns[class_id])
        name = self._names[character] if self._names is not None else str(character)
        return f"{name} rotated {90 * turns}°" if turns else name

    def with_images(self, images: Tensor) -> ClassImages:
        """Returns the same classes over another copy of the image tensor (on another device, say)."""
        if images.shape != self.images.shape or images.dtype != torch.uint8:
            wanted = f"uint8 {tuple(self.images.shape)}"
            raise ValueError(f"images must be {wanted}, got {images.dtype} {tuple(images.shape)}")
        other = object.__new__(ClassImages)
        other.__dict__.update(self.__dict__, images=images.contiguous())
        return other

    def to(self, device: torch.device | str) -> ClassImages:
        return self.with_images(self.images.to(device))

    def gather(self, classes: np.ndarray, drawings: np.ndarray, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the images of classes and drawings, both int64 […]: `dtype` […, C, H, W] in [0, 1], on the device."""
        shape, classes = classes.shape, classes.reshape(-1)
        rows = self._first_row[classes] + drawings.reshape(-1)
        flat = self.images.flatten(0, self._leading - 1)  # [all drawings, H, W(, C)]
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
        return unit_range(picked, dtype).view(*shape, *self.image_shape)

    def table(self) -> tuple[Tensor, np.ndarray]:
        """Returns every drawing in every orientation, and where the drawings of each class begin in it.

        These are uint8 [rotations · all drawings, H, W(, C)], `images` itself without rotations, and int64 [classes].
        """
        flat = self.images.flatten(0, self._leading - 1)
        turned = [torch.rot90(flat, turns, (1, 2)) for turns in range(self.rotations)]
        return torch.cat(turned) if self.rotations > 1 else flat, self.quarter_turns * len(flat) + self._first_row

    def _index(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows)).to(self.device, non_blocking=True)


def unit_range(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns uint8 [rows, H, W] or [rows, H, W, C] as `dtype` [rows, C, H, W], values in [0, 1]."""
    images = images.permute(0, 3, 1, 2) if images.dim() == 4 else images.unsqueeze(1)
    # By a tensor: CUDA multiplies by the reciprocal of a number, which gives other bits than the CPU's quotient.
    white = torch.full((), 255, dtype=dtype, device=images.device)
    return torch.empty(images.shape, dtype=dtype, device=images.device).copy_(images).div_(white)


def number_range(counts: np.ndarray) -> str:
    """Writes the range of some counts, such as "600", or "20 to 35"."""
    low, high = int(counts.min()), int(counts.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
