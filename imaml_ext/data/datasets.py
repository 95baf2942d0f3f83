"""The data sets by name: ``load_dataset("omniglot").sampler("train", ways=5, shots=1, …).sample(step)``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from .episodes import ClassImages, EpisodeBatch, EpisodeSampler
from .errors import DataError
from .glyphs import GLYPHS_DESCRIPTION, glyph_split, load_glyphs
from .linear import LinearSampler
from .omniglot import PROTOCOLS, character_names, load_omniglot, omniglot_split
from .rng import check_int
from .sinusoid import SinusoidSampler

DATASETS = ("glyphs", "omniglot", "sinusoid", "linear")


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
    ) -> Sampler:
        """Tasks of one split; the split's name is the random stream. ``ways`` is None in regression.

        Raises ValueError for an unknown split, or numbers that the data cannot fill.
        """

    @abstractmethod
    def rows(self) -> list[dict[str, str | int]]:
        """One entry a split for a table: its name and what it holds."""

    def _check_split(self, split: str) -> None:
        if split not in self.splits:
            raise ValueError(f"split of {self.name} must be one of {', '.join(map(repr, self.splits))}, got {split!r}")


class ImageDataset(Dataset):
    """Classification tasks from images; all splits share one uint8 image tensor, of which one copy a device is kept."""

    kind: Literal["classification", "regression"] = "classification"

    def __init__(self, name: str, description: str, parts: Mapping[str, ClassImages], notes: Mapping[str, str]) -> None:
        self.name = name
        self.description = description
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
        )

    def rows(self) -> list[dict[str, str | int]]:
        return [
            {
                "split": split,
                "characters": part.num_characters,
                "classes": part.num_classes,
                "drawings of a class": part.num_drawings,
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
    ) -> SinusoidSampler:
        self._check_split(split)
        _no_ways(self.name, ways)
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
    ) -> LinearSampler:
        self._check_split(split)
        _no_ways(self.name, ways)
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


def load_dataset(
    name: str,
    *,
    root: Path | str | None = None,
    split_protocol: str = "1200/423",
    validation: int = 0,
    rotations: bool = True,
    cache_dir: Path | str | None = None,
    download: bool = False,
    features: int = 20,
    condition_number: float = 10.0,
    noise: float = 0.1,
) -> Dataset:
    """A data set by name: "glyphs", "omniglot", "sinusoid" or "linear".

    Args:
        root: omniglot: the folder of its files, by default ``$IMAML_DATA_ROOT``, else the cache.
        split_protocol: omniglot: "1200/423" (the paper's) or "vinyals" (1,028/172/423).
        validation: omniglot, "1200/423": characters of the 1,200 held out as the split "val"; without it there is no
            "val".
        rotations: omniglot, glyphs: each orientation of a character is a class (glyphs: in training only).
        cache_dir: omniglot, glyphs: where prepared files are kept, by default ``$IMAML_CACHE``, else
            ``~/.cache/imaml_ext``.
        download: omniglot: fetch it through torchvision where root holds none.
        features, condition_number, noise: linear, see ``LinearSampler``.

    Raises ValueError for an unknown name or protocol, DataError where the data is missing or damaged.
    """
    if name == "glyphs":
        return _glyphs(cache_dir, rotations)
    if name == "omniglot":
        return _omniglot(root, split_protocol, validation, rotations, cache_dir, download)
    if name == "sinusoid":
        return SinusoidDataset()
    if name == "linear":
        return LinearDataset(features=features, condition_number=condition_number, noise=noise)
    raise ValueError(f"name must be one of {', '.join(map(repr, DATASETS))}, got {name!r}")


def _omniglot(
    root: Path | str | None,
    split_protocol: str,
    validation: int,
    rotations: bool,
    cache_dir: Path | str | None,
    download: bool,
) -> ImageDataset:
    if split_protocol not in PROTOCOLS:
        raise ValueError(f"split_protocol must be one of {', '.join(map(repr, PROTOCOLS))}, got {split_protocol!r}")
    split = omniglot_split(split_protocol, validation=check_int("validation", validation, minimum=0))
    images = torch.from_numpy(load_omniglot(root=root, cache_dir=cache_dir, download=download))
    names = character_names()
    parts = {
        part: ClassImages(images, names=names, characters=members, rotations=4 if rotations else 1)
        for part, members in split.items()
    }
    turned = ", four orientations each" if rotations else ""
    return ImageDataset(
        "omniglot",
        f"Omniglot, 1,623 handwritten characters × 20 drawers, 28×28, split {split_protocol}",
        parts,
        {part: f"{members.size:,} characters{turned}" for part, members in split.items()},
    )


def _glyphs(cache_dir: Path | str | None, rotations: bool) -> ImageDataset:
    split = glyph_split()
    images = torch.from_numpy(load_glyphs(cache_dir=cache_dir))
    parts, notes = {}, {}
    for part, members in split.items():
        turn = rotations and members.orientations is not None
        parts[part] = ClassImages(
            images,
            names=members.names,
            characters=members.indices,
            rotations=4 if turn else 1,
            orientations=members.orientations if turn else None,
        )
        notes[part] = ", ".join(members.scripts)
    return ImageDataset("glyphs", GLYPHS_DESCRIPTION, parts, notes)


def _no_ways(name: str, ways: int | None) -> None:
    if ways is not None:
        raise ValueError(f"ways must be None for {name}, which is regression, got {ways}")


def summary(name: str, **options: object) -> str:
    """What ``load_dataset(name, …)`` gives, as a few lines of text: description, shape, and a table of its splits."""
    dataset = load_dataset(name, **options)  # type: ignore[arg-type]
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
    Raises ValueError for a wrong shape or non-positive ``columns``.
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
    """A picture of a split: one line a class, chosen by ``seed``, with its first drawings; ink dark on white,
    colours as they are.

    Returns float32 in [0, 1], [height, width] or [height, width, C]. Raises DataError for data that has no images.
    """
    if not isinstance(dataset, ImageDataset):
        raise DataError(f"{dataset.name} has no images to show")
    images = dataset.images(split)
    classes, drawings = min(classes, images.num_classes), min(drawings, images.num_drawings)
    sampler = EpisodeSampler(images, ways=classes, shots=1, queries=1, meta_batch=1, seed=seed, stream="sheet")
    chosen = sampler.indices(0).classes.repeat(drawings, axis=1)  # [1, classes · drawings]
    pictures = images.gather(chosen[0], np.tile(np.arange(drawings), classes))
    dark_on_white = 1 - pictures if images.image_shape[0] == 1 else pictures
    return image_grid(dark_on_white, columns=drawings, background=0.8)
