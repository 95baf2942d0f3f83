"""Pictures in folders, one folder per class: decoded, reduced to one size, and packed once into the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from imaml_ext.data.cache import cached_arrays, files_digest
from imaml_ext.data.class_images import ClassImages, number_range
from imaml_ext.data.datasets import ImageDataset
from imaml_ext.errors import DataError
from imaml_ext.pictures import Reading, read_pictures

SPLITS = ("train", "val", "test")
_SUFFIXES = (".png", ".jpg", ".jpeg")
_Pictures = Mapping[str, Mapping[str, Sequence[Path]]]  # {split: {class: its pictures}}


@dataclass(frozen=True)
class LabelledImages:
    """Images of named classes, one class after another."""

    images: np.ndarray  # uint8 [n, H, W], or [n, H, W, 3]
    names: tuple[str, ...]  # one per class
    counts: np.ndarray  # images of each class, int [classes], n in sum
    splits: Mapping[str, np.ndarray]  # the classes of each split, indices into `names`

    def dataset(self, name: str, description: str, reading: Reading, *, published: int | None = None) -> ImageDataset:
        """Makes a data set of photographs; a published one is complete with `published` images per class."""
        if published is not None:
            description += f", {number_range(self.counts)} images per class"
            if not (self.counts == published).all():
                description += f" of the published {published}: results do not compare with published ones"
        images = torch.from_numpy(self.images)
        parts, notes = {}, {}
        for split, members in self.splits.items():
            parts[split] = ClassImages(images, counts=self.counts, names=self.names, characters=members)
            notes[split] = ", ".join(self.names[i] for i in members[:4]) + (", …" if members.size > 4 else "")
        return ImageDataset(name, description, parts, notes, reading=reading)


def label_splits(
    folder: Path, sizes: Mapping[str, Mapping[str, int]]
) -> tuple[tuple[str, ...], np.ndarray, dict[str, np.ndarray]]:
    """Returns `names`, `counts` and `splits` of `LabelledImages`, from {split: {class: number of its images}}."""
    splits: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for split, members in sizes.items():
        for name, count in members.items():
            if name in counts:
                raise DataError(f"{folder}: class {name!r} is in {split} and in another split; splits share no class")
            if count < 1:
                raise DataError(f"{folder}: class {name!r} has no image")
        splits[split] = np.arange(len(counts), len(counts) + len(members))
        counts |= members
    return tuple(counts), np.array(list(counts.values())), splits


def list_classes(folder: Path) -> dict[str, list[Path]]:
    """Lists the pictures of every class: {name of a folder in `folder`: its .png and .jpg files}, in order of name."""
    classes = {
        path.name: sorted(filter(is_picture, path.iterdir()))
        for path in sorted(folder.iterdir())
        if path.is_dir() and not path.name.startswith(".")
    }
    if not classes:
        raise DataError(f"{folder} must hold one folder of pictures per class, found none")
    for name, pictures in classes.items():
        if not pictures:
            raise DataError(f"class {name!r} has no pictures: {folder / name} holds no .png or .jpg file")
    return classes


def is_picture(path: Path) -> bool:
    """Tells whether a file is read as a picture, by its name."""
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")


def list_splits(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """Lists the pictures in `train/<class>/`, `val/<class>/` and `test/<class>/`; `val` may be missing."""
    for split in ("train", "test"):
        if not (folder / split).is_dir():
            needed = "the folders train/ and test/, with or without val/"
            raise DataError(f"{folder} must hold {needed}; {split}/ is missing")
    return {split: list_classes(folder / split) for split in SPLITS if (folder / split).is_dir()}


def load_classes(folder: Path, classes: _Pictures, reading: Reading, *, cache: Path) -> LabelledImages:
    """Loads pictures below `folder`; they are read once, and packed into a file whose name carries the reading, and
    names, sizes and times of the pictures."""
    labels = label_splits(folder, {split: {c: len(p) for c, p in part.items()} for split, part in classes.items()})
    pictures = [path for part in classes.values() for paths in part.values() for path in paths]
    colours, size, _ = reading.shape
    shape = (len(pictures), size, size) if colours == 1 else (len(pictures), size, size, 3)

    def read() -> dict[str, np.ndarray]:
        return {"images": read_pictures(pictures, reading)}

    packed = cache / "pictures" / f"{folder.resolve().name}-{size}-{files_digest(folder, pictures, reading)}.npz"
    return LabelledImages(cached_arrays(packed, {"images": ("uint8", shape)}, read)["images"], *labels)
