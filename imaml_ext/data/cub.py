"""CUB-200-2011: photographs of 200 kinds of birds, 11,788 in all (Wah et al. 2011), as published: `images.txt`,
`image_class_labels.txt`, `classes.txt` and `images/`.

Classes are split by their number i from 0, as in Chen et al., A Closer Look at Few-shot Classification, ICLR 2019: even
ones train (100), those with i mod 4 = 1 validate (50), and those with i mod 4 = 3 test (50).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from imaml_ext.data.cache import cache_folder, data_folder, not_found
from imaml_ext.data.datasets import Dataset
from imaml_ext.data.labelled import LabelledImages, labelled, load_tree
from imaml_ext.data.listing import Listing
from imaml_ext.data.source import FileSource
from imaml_ext.errors import DataError
from imaml_ext.pictures import Reading

SIZE = 84
READING = Reading(size=SIZE)
NUM_CLASSES = 200
NUM_PICTURES = 11788
_FILES = ("images.txt", "image_class_labels.txt", "classes.txt")
_PLACES = (".", "CUB_200_2011", "cub", "cub/CUB_200_2011")


@dataclass(frozen=True, kw_only=True)
class Cub(FileSource):
    """CUB-200-2011: photographs of 200 kinds of birds."""

    def load(self) -> Dataset:
        found = self.read()
        count = len(found.images)
        few = f" of the published {NUM_PICTURES:,}: results do not compare" if count != NUM_PICTURES else ""
        description = f"CUB-200-2011, 200 kinds of birds, 84×84 in colour, {count:,} photographs{few}"
        return found.dataset("cub", description, READING)

    def read(self) -> LabelledImages:
        """Reads all photographs, uint8 [n, 84, 84, 3], and the classes of each split.

        `root` is `CUB_200_2011/`, its parent, or the tar archive of it.

        Raises:
            DataError: the files are not found, incomplete or damaged.
        """
        cache = cache_folder(self.cache_dir)
        where, origin = data_folder(self.root, cache)
        folder = next((where / place for place in _PLACES if (where / place / _FILES[0]).is_file()), None)
        if folder is None:
            raise not_found("CUB-200-2011", f"{_FILES[0]} nor CUB_200_2011/{_FILES[0]}", where, origin, download=False)
        names, pictures, labels = (_pairs(folder / file) for file in (_FILES[2], _FILES[0], _FILES[1]))
        if sorted(names) != list(range(1, NUM_CLASSES + 1)) or len(set(names.values())) != NUM_CLASSES:
            raise DataError(
                f"{folder / _FILES[2]} must name {NUM_CLASSES} classes, 1 to {NUM_CLASSES}, got {len(names)}"
            )
        if labels.keys() != pictures.keys():
            raise DataError(
                f"{folder / _FILES[1]} must label the {len(pictures)} pictures of {_FILES[0]}, and no others"
            )
        classes: dict[str, list[Path]] = {names[number]: [] for number in sorted(names)}
        for picture, path in pictures.items():
            label = labels[picture]
            if not label.isdecimal() or int(label) not in names or ".." in Path(path).parts or Path(path).is_absolute():
                raise DataError(
                    f"{folder}: picture {picture} ({path!r}) must lie in images/ and have a class, got {label!r}"
                )
            classes[names[int(label)]].append(folder / "images" / path)
        found = load_tree(Listing(folder, classes), READING, cache=cache)
        return labelled(found, cub_split(list(classes)))


def cub_split(names: list[str]) -> dict[str, list[str]]:
    """Splits the classes in the order of their numbers, 100 / 50 / 50."""
    return {"train": names[::2], "val": names[1::4], "test": names[3::4]}


def _pairs(path: Path) -> dict[int, str]:
    """Reads lines of a number and a word."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    found: dict[int, str] = {}
    for row, line in enumerate(lines, start=1):
        number, _, word = line.strip().partition(" ")
        if line.strip():
            if not number.isdecimal() or not word or int(number) in found:
                raise DataError(f"{path}: line {row} must be a number, used once, and a word, got {line!r}")
            found[int(number)] = word
    return found
