"""mini-ImageNet: 100 classes of ImageNet, 600 photographs each at 84×84 (Vinyals et al., NeurIPS 2016), split into 64
classes to train on, 16 for validation and 20 for testing (Ravi and Larochelle, ICLR 2017).

It is read from whichever of these a root folder holds, the first that is found:

- `mini-imagenet-cache-{train,val,test}.pkl`: `image_data` uint8 [n, 84, 84, 3], `class_dict` class -> rows;
- `miniImageNet_category_split_{train_phase_train,val,test}.pickle`: `data` uint8 [n, 84, 84, 3], `labels`;
- `train.csv`, `val.csv`, `test.csv` with the columns filename and label, and all pictures in `images/`;
- `train/<class>/`, `val/<class>/`, `test/<class>/` with .jpg or .png pictures.

Pictures are scaled to 84×84 by a Lanczos filter and packed once into the cache.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imaml_ext.data.cache import cache_folder, check_array, data_folder, not_found
from imaml_ext.data.datasets import Dataset
from imaml_ext.data.pickles import load_pickle
from imaml_ext.data.pictures import SPLITS, LabelledImages, label_splits, list_splits, load_classes
from imaml_ext.data.source import FileSource
from imaml_ext.errors import DataError
from imaml_ext.pictures import Reading

SIZE = 84
READING = Reading(size=SIZE)
NUM_CLASSES = {"train": 64, "val": 16, "test": 20}
_PLACES = (".", "mini-imagenet", "mini_imagenet", "miniimagenet", "miniImageNet")
_SplitClasses = tuple[np.ndarray, dict[str, np.ndarray]]  # images uint8 [n, 84, 84, 3], class -> its rows


@dataclass(frozen=True, kw_only=True)
class MiniImageNet(FileSource):
    """mini-ImageNet: photographs of 100 classes."""

    def load(self) -> Dataset:
        description = "mini-ImageNet, 100 classes, 84×84 in colour"
        return self.read().dataset("mini-imagenet", description, READING, published=600)

    def read(self) -> LabelledImages:
        """Reads all photographs, uint8 [n, 84, 84, 3], and the classes of each split.

        `root` is a folder that holds one of the forms above, or the parent of one.

        Raises:
            DataError: nothing is found, or what is found is incomplete, damaged or of the wrong format.
        """
        cache = cache_folder(self.cache_dir)
        where, origin = data_folder(self.root, cache)
        for files, read in _FORMS:
            for folder in (where / place for place in _PLACES):
                missing = [file for file in files if not (folder / file).exists()]
                if not missing:
                    found = read(folder, cache)
                    for split, wanted in NUM_CLASSES.items():
                        if (got := found.splits[split].size) != wanted:
                            must = f"must have {wanted} classes in {split!r}, found {got}"
                            raise DataError(f"mini-ImageNet in {folder} {must}")
                    return found
                if len(missing) < len(files):
                    raise DataError(f"mini-ImageNet in {folder} is incomplete: {missing[0]} is missing")
        holds = f"{_CACHE_FILES[0]}, {_CATEGORY_FILES[0]}, train.csv nor train/"
        raise not_found("mini-ImageNet", holds, where, origin, download=False)


def _read_pickles(folder: Path, files: tuple[str, ...], read: Callable[[Path, str], _SplitClasses]) -> LabelledImages:
    """Joins the files of the three splits, each put in order of its classes."""
    sizes, images = {}, []
    for split, file in zip(SPLITS, files, strict=True):
        found, classes = read(folder / file, split)
        order = np.concatenate([np.empty(0, np.int64), *classes.values()])
        if not np.array_equal(np.sort(order), np.arange(len(found))):
            raise DataError(f"{folder / file}: the classes must name each of the {len(found)} images once")
        sizes[split] = {name: rows.size for name, rows in classes.items()}
        images.append(found if np.array_equal(order, np.arange(len(found))) else found[order])
    return LabelledImages(np.concatenate(images), *label_splits(folder, sizes))


def _read_cache_file(path: Path, split: str) -> _SplitClasses:
    content = load_pickle(path, "image_data", "class_dict")
    images = check_array(path, "image_data", content["image_data"], "uint8", (None, SIZE, SIZE, 3))
    classes = content["class_dict"]
    if not isinstance(classes, dict):
        raise DataError(f"{path}: 'class_dict' must be a dictionary, got {type(classes).__name__}")
    return images, {_text(name): _integers(path, "class_dict", rows) for name, rows in classes.items()}


def _read_category_file(path: Path, split: str) -> _SplitClasses:
    content = load_pickle(path, "data", "labels")
    images = check_array(path, "data", content["data"], "uint8", (None, SIZE, SIZE, 3))
    labels = _integers(path, "labels", content["labels"])
    if labels.size != len(images):
        raise DataError(f"{path}: 'labels' must hold one label per image ({len(images)}), got {labels.size}")
    names = content.get("catname2label")
    known = {label: _text(name) for name, label in names.items()} if isinstance(names, dict) else {}
    # Where classes have no names, numbers may begin at 0 in each file: they are told apart by their split.
    numbers = np.unique(labels).tolist()
    return images, {known.get(label, f"{split}/{label}"): np.nonzero(labels == label)[0] for label in numbers}


def _integers(path: Path, key: str, values: Any) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise DataError(f"{path}: '{key}' must hold lists of integers, got {array.dtype} {array.shape}")
    return array.astype(np.int64)


def _text(name: Any) -> str:
    return name.decode("latin1") if isinstance(name, bytes) else str(name)


def _read_csv_files(folder: Path, cache: Path) -> LabelledImages:
    classes: dict[str, dict[str, list[Path]]] = {}
    for split, file in zip(SPLITS, _CSV_FILES, strict=True):
        members = classes[split] = {}
        for filename, label in _read_csv(folder / file):
            members.setdefault(label, []).append(folder / "images" / filename)
    return load_classes(folder, classes, READING, cache=cache)


def _read_csv(path: Path) -> list[list[str]]:
    """Returns [filename, label] of every row."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error})") from error
    if not rows or rows[0] != ["filename", "label"]:
        raise DataError(f"{path} must begin with the line 'filename,label', got {','.join(rows[0]) if rows else ''!r}")
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != 2 or not all(row) or Path(row[0]).name != row[0]:
            wanted = "the name of a file in images/ and a label"
            raise DataError(f"{path}: row {number} must be {wanted}, got {','.join(row)!r}")
    return rows[1:]


_CACHE_FILES = tuple(f"mini-imagenet-cache-{split}.pkl" for split in SPLITS)
_CATEGORY_FILES = tuple(f"miniImageNet_category_split_{part}.pickle" for part in ("train_phase_train", "val", "test"))
_CSV_FILES = tuple(f"{split}.csv" for split in SPLITS)
_FORMS: tuple[tuple[tuple[str, ...], Callable[[Path, Path], LabelledImages]], ...] = (
    (_CACHE_FILES, lambda folder, cache: _read_pickles(folder, _CACHE_FILES, _read_cache_file)),
    (_CATEGORY_FILES, lambda folder, cache: _read_pickles(folder, _CATEGORY_FILES, _read_category_file)),
    ((*_CSV_FILES, "images"), _read_csv_files),
    (SPLITS, lambda folder, cache: load_classes(folder, list_splits(folder), READING, cache=cache)),
)
