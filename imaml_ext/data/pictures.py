"""Pictures in folders, one folder per class: decoded, reduced to one size, and packed once into the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from imaml_ext.data.cache import cached_arrays
from imaml_ext.data.class_images import ClassImages, number_range
from imaml_ext.data.datasets import ImageDataset
from imaml_ext.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

SPLITS = ("train", "val", "test")
_SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class LabelledImages:
    """Images of named classes, one class after another.

    Attributes:
        images: uint8 [n, H, W], or [n, H, W, 3].
        names: one per class.
        counts: images of each class, int [classes], n in sum.
        splits: the classes of each split, indices into `names`.
    """

    images: np.ndarray
    names: tuple[str, ...]
    counts: np.ndarray
    splits: Mapping[str, np.ndarray]

    def dataset(self, name: str, description: str, *, published: int | None = None) -> ImageDataset:
        """Makes the data set of these photographs; `published` images per class make a published one complete."""
        if published is not None and (self.counts == published).all():
            description += f", {published} images per class"
        elif published is not None:
            have = number_range(self.counts)
            description += f", {have} images per class of the published {published}: "
            description += "results do not compare with published ones"
        images = torch.from_numpy(self.images)
        parts, notes = {}, {}
        for split, members in self.splits.items():
            parts[split] = ClassImages(images, counts=self.counts, names=self.names, characters=members)
            first = ", ".join(self.names[i] for i in islice(members, 4))
            notes[split] = first + (", …" if members.size > 4 else "")
        return ImageDataset(name, description, parts, notes, drawn=False)


def open_picture(path: Path, mode: str, *, upright: bool = False) -> Image:
    """Decodes a picture file.

    Args:
        mode: "RGB", or "L" for grey.
        upright: turn the picture as its EXIF orientation says.

    Raises:
        DataError: the file is missing, damaged or no picture, or Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise DataError("reading pictures needs Pillow: pip install pillow") from error
    try:
        with Image.open(path) as file:
            return (ImageOps.exif_transpose(file) if upright else file).convert(mode)
    except FileNotFoundError as error:
        raise DataError(f"the picture {path} does not exist") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"the picture {path} is damaged or not a picture ({error})") from error


def shrink(picture: Image, size: int) -> np.ndarray:
    """Scales a picture as a whole to size × size by a Lanczos filter: uint8 [size, size] or [size, size, 3]."""
    from PIL.Image import Resampling

    return np.asarray(picture.resize((size, size), Resampling.LANCZOS))


def list_classes(folder: Path) -> dict[str, list[Path]]:
    """Lists the pictures of every class: {name of a folder in `folder`: its .png and .jpg files}, in order of name.

    Raises:
        DataError: there is no folder of a class, or one without pictures.
    """
    classes = {
        path.name: sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES and not p.name.startswith("."))
        for path in sorted(folder.iterdir())
        if path.is_dir() and not path.name.startswith(".")
    }
    if not classes:
        raise DataError(f"{folder} must hold one folder of pictures per class, found none")
    for name, pictures in classes.items():
        if not pictures:
            raise DataError(f"class {name!r} has no pictures: {folder / name} holds no .png or .jpg file")
    return classes


def load_split_tree(folder: Path, *, size: int, greyscale: bool, cache: Path) -> LabelledImages:
    """Loads the pictures in `train/<class>/`, `val/<class>/` and `test/<class>/`; `val` may be missing.

    Raises:
        DataError: `train` or `test` is missing, a class is in two splits, or see `read_pictures`.
    """
    for split in ("train", "test"):
        if not (folder / split).is_dir():
            raise DataError(
                f"{folder} must hold the folders train/ and test/, with or without val/; {split}/ is missing"
            )
    classes = {split: list_classes(folder / split) for split in SPLITS if (folder / split).is_dir()}
    return load_classes(folder, classes, size=size, greyscale=greyscale, cache=cache)


def load_classes(
    folder: Path, classes: Mapping[str, Mapping[str, Sequence[Path]]], *, size: int, greyscale: bool, cache: Path
) -> LabelledImages:
    """Loads the pictures of {split: {class: its pictures}}, all below `folder`.

    Raises:
        DataError: a class is in two splits, or see `read_pictures`.
    """
    splits: dict[str, np.ndarray] = {}
    names: list[str] = []
    counts: list[int] = []
    pictures: list[Path] = []
    for split, members in classes.items():
        for name in members:
            if name in names:
                raise DataError(f"{folder}: class {name!r} is in {split} and in another split; splits share no class")
        splits[split] = np.arange(len(names), len(names) + len(members))
        names += members
        counts += [len(paths) for paths in members.values()]
        pictures += [path for paths in members.values() for path in paths]
    images = read_pictures(folder, pictures, size=size, greyscale=greyscale, cache=cache)
    return LabelledImages(images, tuple(names), np.array(counts), splits)


def read_pictures(folder: Path, pictures: Sequence[Path], *, size: int, greyscale: bool, cache: Path) -> np.ndarray:
    """Reads pictures below `folder` as uint8 [n, size, size, 3], or [n, size, size] in greyscale.

    They are decoded once: the file that they are packed into carries names, sizes and times of the pictures in its
    name, and is read from then on.

    Raises:
        DataError: a picture is missing or damaged, Pillow is not installed, or the cache cannot be written.
    """
    shape = (len(pictures), size, size) if greyscale else (len(pictures), size, size, 3)
    state = hashlib.blake2b(f"{folder.resolve()} {shape}".encode(), digest_size=8)
    for path in pictures:
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"the picture {path} cannot be read ({error.strerror})") from error
        state.update(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n".encode())

    def read() -> dict[str, np.ndarray]:
        images = np.empty(shape, dtype=np.uint8)
        for row, path in enumerate(pictures):
            images[row] = shrink(open_picture(path, "L" if greyscale else "RGB"), size)
        return {"images": images}

    packed = cache / "pictures" / f"{folder.resolve().name}-{size}-{state.hexdigest()}.npz"
    return cached_arrays(packed, {"images": ("uint8", shape)}, read)["images"]
