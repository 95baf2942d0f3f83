"""Images of named classes in splits, as every data set of pictures has them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from imaml_ext.data.class_images import ClassImages, number_range
from imaml_ext.data.datasets import ImageDataset
from imaml_ext.data.listing import Listing, list_folder
from imaml_ext.data.packing import Item, Pictures, packed_pictures
from imaml_ext.errors import DataError
from imaml_ext.pictures import Reading


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
    folder: Path | str, sizes: Mapping[str, Mapping[str, int]]
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


def labelled(pictures: Pictures, splits: Mapping[str, Iterable[str]]) -> LabelledImages:
    """Puts pictures in order of their classes; those of classes that are in no split are left out."""
    names = [name for members in splits.values() for name in members]
    rank = {name: position for position, name in enumerate(names)}
    ranks = np.array([rank.get(name, -1) for name in pictures.names], np.int64)[pictures.labels]  # [n]
    order = np.argsort(ranks, kind="stable")[np.count_nonzero(ranks < 0) :]
    ordered = np.array_equal(order, np.arange(len(pictures.images)))
    counts, sizes = pictures.counts, {}
    for split, members in splits.items():
        sizes[split] = {name: counts.get(name, 0) for name in members}
    return LabelledImages(pictures.images if ordered else pictures.images[order], *label_splits("the data", sizes))


def equal_pictures(pictures: Pictures, splits: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns a sentence each on pictures of equal pixels in two splits, in two classes, and within a class."""
    split_of = {name: split for split, members in splits.items() for name in members}
    order = np.argsort(pictures.digests, kind="stable")
    same = np.diff(pictures.digests[order]) == 0  # as the next one
    equal = order[np.append(same, False) | np.insert(same, 0, False)]
    ends = np.flatnonzero(np.diff(pictures.digests[equal])) + 1
    found: dict[str, list[tuple[int, int, int]]] = {}  # (how many there are, two such pictures)
    for group in np.split(equal, ends):
        rows = [int(row) for row in group if pictures.names[pictures.labels[row]] in split_of]
        classes = {row: pictures.names[pictures.labels[row]] for row in rows}
        kinds = {
            "in two splits, which must share none": {row: split_of[classes[row]] for row in rows},
            "in two classes": classes,
            "in a class more than once": {row: row for row in rows},
        }
        for kind, place in kinds.items():
            other = next((row for row in rows if place[row] != place[rows[0]]), None)
            if other is not None:
                copies = len(rows) - 1 if len(set(classes.values())) == 1 else 1
                found.setdefault(kind, []).append((copies, rows[0], other))
                break
    sentences = []
    for kind, each in found.items():
        number, (_, one, other) = sum(count for count, _, _ in each), each[0]
        such = f"such as {pictures.items[one]} and {pictures.items[other]}"
        sentences.append(f"{number} picture{'s are' if number > 1 else ' is'} {kind}, {such}")
    return sentences


def load_tree(listing: Listing, reading: Reading, *, cache: Path, skip_damaged: bool | None = None) -> Pictures:
    """Reads the pictures of a listing once, and packs them; errors as of `packed_pictures`."""
    files = [path for paths in listing.classes.values() for path in paths]

    def items() -> Iterator[Item]:
        return (Item(name, path) for name, paths in listing.classes.items() for path in paths)

    folder, total = listing.folder, len(files)
    return packed_pictures(folder, files, items, reading, cache=cache, total=total, skip_damaged=skip_damaged)


def load_split_tree(folder: Path, reading: Reading, *, cache: Path) -> LabelledImages:
    """Reads a published data set in the folders train/, val/ and test/ of classes."""
    listing = list_folder(folder)
    listing.require_pictures()
    if listing.splits is None:
        raise DataError(f"{folder} must hold one folder per class in train/, val/ and test/")
    return labelled(load_tree(listing, reading, cache=cache), listing.splits)
