"""Pictures in folders, one folder a class: decoded, reduced to one size, and packed once into the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imaml_ext.errors import DataError

from .cache import load_arrays, save_arrays

SPLITS = ("train", "val", "test")
_SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class LabelledImages:
    """Images of named classes, one class after another.

    images: uint8 [n, H, W], or [n, H, W, 3]; names: one a class; counts: images of each class, int [classes], n in sum;
    splits: the classes of each split, indices into ``names``.
    """

    images: np.ndarray
    names: tuple[str, ...]
    counts: np.ndarray
    splits: Mapping[str, np.ndarray]


def number_range(counts: np.ndarray) -> str:
    """Such as "600", or "20 to 35"."""
    low, high = int(counts.min()), int(counts.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def list_classes(folder: Path) -> dict[str, list[Path]]:
    """The pictures of every class: {name of a folder in ``folder``: its .png and .jpg files}, in order of name.

    Raises DataError where there is no folder of a class, or one without pictures.
    """
    classes = {
        path.name: sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES and not p.name.startswith("."))
        for path in sorted(folder.iterdir())
        if path.is_dir() and not path.name.startswith(".")
    }
    if not classes:
        raise DataError(f"{folder} must hold one folder of pictures a class, found none")
    for name, pictures in classes.items():
        if not pictures:
            raise DataError(f"class {name!r} has no pictures: {folder / name} holds no .png or .jpg file")
    return classes


def load_split_tree(folder: Path, *, size: int, greyscale: bool, cache: Path) -> LabelledImages:
    """Pictures in ``train/<class>/``, ``val/<class>/`` and ``test/<class>/``; ``val`` may be missing.

    Raises DataError where ``train`` or ``test`` is missing, a class is in two splits, or as ``read_pictures`` does.
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
    """The pictures of {split: {class: its pictures}}, all below ``folder``.

    Raises DataError where a class is in two splits, or as ``read_pictures`` does.
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
    """Pictures below ``folder`` as uint8 [n, size, size, 3], or [n, size, size] in greyscale; each is scaled to that
    size as a whole (Lanczos).

    They are decoded once: the file that they are packed into carries names, sizes and times of the pictures in its
    name, and is read from then on.

    Raises DataError where a picture is missing or damaged, Pillow is not installed, or the cache cannot be written.
    """
    shape = (len(pictures), size, size) if greyscale else (len(pictures), size, size, 3)
    state = hashlib.blake2b(f"{folder.resolve()} {shape}".encode(), digest_size=8)
    for path in pictures:
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"the picture {path} cannot be read ({error.strerror})") from error
        state.update(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    packed = cache / "pictures" / f"{folder.resolve().name}-{size}-{state.hexdigest()}.npz"
    if packed.is_file():
        try:
            return load_arrays(packed, {"images": ("uint8", shape)})["images"]
        except DataError:
            packed.unlink(missing_ok=True)  # damaged; it holds nothing that is not read from the pictures again below
    images = np.empty(shape, dtype=np.uint8)
    for row, path in enumerate(pictures):
        images[row] = _read_picture(path, size, "L" if greyscale else "RGB")
    save_arrays(packed, {"images": images})
    return images


def _read_picture(path: Path, size: int, mode: str) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("reading pictures needs Pillow: pip install pillow") from error
    try:
        with Image.open(path) as file:
            return np.asarray(file.convert(mode).resize((size, size), Image.Resampling.LANCZOS))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"the picture {path} is damaged or not a picture ({error})") from error
