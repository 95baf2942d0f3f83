"""tiered-ImageNet: 608 classes of ImageNet, 779,165 photographs at 84×84, split by their higher categories into 351
classes to train on, 97 for validation and 160 for testing (Ren et al., ICLR 2018).

It is read from whichever of these a root folder holds, the first that is found:

- `{train,val,test}_images_png.pkl`, the contents of PNG files, and `{train,val,test}_labels.pkl`, with
  `label_specific` [n] and perhaps `label_specific_str`, the names (few-shot-ssl-public, learn2learn);
- `{train,val,test}_images.npz`, `images` uint8 [n, 84, 84, 3], and the same labels;
- `{train,val,test}_data.hdf5` of torchmeta: an entry per class, n picture files;
- .parquet files of Hugging Face, train-*.parquet, validation-*.parquet, test-*.parquet;
- `train/<class>/`, `val/<class>/`, `test/<class>/` with pictures.

In memory it takes 15.4 GiB.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imaml_ext.data import forms
from imaml_ext.data.cache import load_arrays
from imaml_ext.data.datasets import Dataset
from imaml_ext.data.labelled import LabelledImages, label_splits, labelled
from imaml_ext.data.listing import SPLITS
from imaml_ext.data.packing import Item, packed_pictures
from imaml_ext.data.pickles import load_pickle, load_pickled_list
from imaml_ext.data.source import FileSource
from imaml_ext.errors import DataError
from imaml_ext.pictures import Reading, StoredPicture

SIZE = 84
READING = Reading(size=SIZE)
NUM_CLASSES = {"train": 351, "val": 97, "test": 160}
_PLACES = (".", "tiered-imagenet", "tiered_imagenet", "tieredimagenet", "tieredImageNet")


@dataclass(frozen=True, kw_only=True)
class TieredImageNet(FileSource):
    """tiered-ImageNet: photographs of 608 classes."""

    def load(self) -> Dataset:
        found = self.read()
        description = f"tiered-ImageNet, 608 classes, {len(found.images):,} photographs, 84×84 in colour"
        return found.dataset("tiered-imagenet", description, READING)

    def read(self) -> LabelledImages:
        """Reads all photographs, uint8 [n, 84, 84, 3], and the classes of each split.

        `root` is a folder that holds one of the forms above, the parent of one, or a tar archive of it.

        Raises:
            DataError: nothing is found, or what is found is incomplete, damaged or of the wrong format.
        """
        return forms.read_first("tiered-ImageNet", _FORMS, self, _PLACES, READING, NUM_CLASSES)


def _read_png_files(folder: Path, files: tuple[str, ...], reading: Reading, cache: Path) -> LabelledImages:
    labels = {split: _labels(folder, split) for split in SPLITS}
    paths = [folder / f"{split}_images_png.pkl" for split in SPLITS]

    def items() -> Iterator[Item]:
        for path, (names, label) in zip(paths, labels.values(), strict=True):
            pictures = load_pickled_list(path)
            if len(pictures) != label.size:
                raise DataError(f"{path} must hold {label.size} pictures, as its labels do, got {len(pictures)}")
            for row, (number, picture) in enumerate(zip(label, pictures, strict=True)):
                yield Item(names[number], StoredPicture(_content(picture), f"{path.name}:{row}"))

    total = sum(label.size for _, label in labels.values())
    pictures = packed_pictures(folder, paths, items, reading, cache=cache, total=total)
    return labelled(pictures, {split: names for split, (names, _) in labels.items()})


def _content(picture: Any) -> bytes:
    """Returns the content of a picture file from an array of its bytes, or text that Python 2 has kept them in."""
    if isinstance(picture, str):
        return picture.encode("latin1")
    return picture if isinstance(picture, bytes) else np.asarray(picture, np.uint8).tobytes()


def _read_npz_files(folder: Path, files: tuple[str, ...], reading: Reading, cache: Path) -> LabelledImages:
    images, sizes = [], {}
    for split in SPLITS:
        path, (names, label) = folder / f"{split}_images.npz", _labels(folder, split)
        found = load_arrays(path, {"images": ("uint8", (None, SIZE, SIZE, 3))})["images"]
        if len(found) != label.size:
            raise DataError(f"{path} must hold {label.size} images, as its labels do, got {len(found)}")
        images.append(found[np.argsort(label, kind="stable")])
        sizes[split] = dict(zip(names, np.bincount(label, minlength=len(names)).tolist(), strict=True))
    return LabelledImages(np.concatenate(images), *label_splits(folder, sizes))


def _labels(folder: Path, split: str) -> tuple[list[str], np.ndarray]:
    """Returns the names of the classes of a split, and which of them each picture has, int64 [n]."""
    path = folder / f"{split}_labels.pkl"
    content = load_pickle(path, "label_specific")
    numbers = forms.integers(path, "label_specific", content["label_specific"])
    found, label = np.unique(numbers, return_inverse=True)
    known = content.get("label_specific_str")
    if known is not None and len(known) <= int(found.max(initial=-1)):
        raise DataError(f"{path}: 'label_specific_str' names {len(known)} classes, the labels go to {found.max()}")
    # Without names, numbers begin at 0 in each file: they are told apart by their split.
    names = [f"{split}/{number}" if known is None else forms.text(known[number]) for number in found.tolist()]
    if len(set(names)) != len(names):
        raise DataError(f"{path}: 'label_specific_str' names a class twice")
    return names, label


_LABELS = tuple(f"{split}_labels.pkl" for split in SPLITS)
_FORMS = (
    forms.Form(((*(f"{split}_images_png.pkl" for split in SPLITS), *_LABELS),), _read_png_files),
    forms.Form(((*(f"{split}_images.npz" for split in SPLITS), *_LABELS),), _read_npz_files),
    forms.HDF5,
    forms.PARQUET,
    forms.TREE,
)
