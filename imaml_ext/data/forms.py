"""The forms in which published data sets of pictures are passed around, each read into `LabelledImages`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from imaml_ext.data import hdf5, parquet
from imaml_ext.data.cache import cache_folder, check_array, data_folder, not_found
from imaml_ext.data.labelled import LabelledImages, label_splits, labelled, load_split_tree, load_tree
from imaml_ext.data.listing import SPLITS, Listing
from imaml_ext.data.pickles import load_pickle
from imaml_ext.data.source import FileSource
from imaml_ext.data.splits import read_csv
from imaml_ext.errors import DataError
from imaml_ext.pictures import Reading

_Read = Callable[[Path, tuple[str, ...], Reading, Path], LabelledImages]  # (folder, files, reading, cache)
_SplitClasses = tuple[np.ndarray, dict[str, np.ndarray]]  # images uint8 [n, size, size, 3], class -> its rows


class Form(NamedTuple):
    """A form of a data set: the files it has, in each of their usual names, and how they are read."""

    files: tuple[tuple[str, ...], ...]
    read: _Read


def read_first(
    what: str,
    known: Sequence[Form],
    source: FileSource,
    places: Sequence[str],
    reading: Reading,
    num_classes: Mapping[str, int],
) -> LabelledImages:
    """Reads the first form that there is in the source's folder, or in one of `places` below it.

    Raises:
        DataError: there is none, its files are incomplete or damaged, or a split has not `num_classes`, as published.
    """
    cache = cache_folder(source.cache_dir)
    where, origin = data_folder(source.root, cache)
    begun: list[tuple[int, Path, str]] = []  # (how many files are missing, where, the first of them)
    for form in known:
        for folder in (where / place for place in places):
            for files in form.files:
                missing = [file for file in files if not any(folder.glob(file))]
                if not missing:
                    return _checked(what, form.read(folder, files, reading, cache), num_classes, where)
                if len(missing) < len(files):
                    begun.append((len(missing), folder, missing[0]))
    if begun:
        _, folder, file = min(begun, key=lambda each: each[0])
        raise DataError(f"{what} in {folder} is incomplete: {file} is missing")
    *others, last = (form.files[0][0] for form in known)
    raise not_found(what, f"{', '.join(others)} nor {last}/", where, origin, download=False)


def _checked(what: str, found: LabelledImages, num_classes: Mapping[str, int], where: Path) -> LabelledImages:
    for split, wanted in num_classes.items():
        got = found.splits[split].size if split in found.splits else 0
        if got != wanted:
            raise DataError(f"{what} in {where} must have {wanted} classes in {split!r}, found {got}")
    return found


# ---- pickles --------------------------------------------------------------------------------------------------------


def read_cache_files(folder: Path, files: tuple[str, ...], reading: Reading, cache: Path) -> LabelledImages:
    """Reads pickles of `image_data` uint8 [n, size, size, 3] and `class_dict` class -> rows."""
    return _joined(folder, files, lambda path, split: _read_cache_file(path, reading.size))


def read_category_files(folder: Path, files: tuple[str, ...], reading: Reading, cache: Path) -> LabelledImages:
    """Reads pickles of `data` uint8 [n, size, size, 3] and `labels` [n]."""
    return _joined(folder, files, lambda path, split: _read_category_file(path, split, reading.size))


def _joined(folder: Path, files: tuple[str, ...], read: Callable[[Path, str], _SplitClasses]) -> LabelledImages:
    """Joins the files of the three splits, each put in order of its classes."""
    sizes, images = {}, []
    for split, file in zip(SPLITS, files, strict=True):
        found, classes = read(folder / file, split)
        order = rows_in_order(folder / file, len(found), classes)
        sizes[split] = {name: rows.size for name, rows in classes.items()}
        images.append(found if np.array_equal(order, np.arange(len(found))) else found[order])
    return LabelledImages(np.concatenate(images), *label_splits(folder, sizes))


def rows_in_order(path: Path, count: int, classes: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the rows of a file, one class after another; DataError unless each is in one class."""
    order = np.concatenate([np.empty(0, np.int64), *classes.values()])
    if not np.array_equal(np.sort(order), np.arange(count)):
        raise DataError(f"{path}: the classes must name each of the {count} images once")
    return order


def _read_cache_file(path: Path, size: int) -> _SplitClasses:
    content = load_pickle(path, "image_data", "class_dict")
    images = check_array(path, "image_data", content["image_data"], "uint8", (None, size, size, 3))
    classes = content["class_dict"]
    if not isinstance(classes, dict):
        raise DataError(f"{path}: 'class_dict' must be a dictionary, got {type(classes).__name__}")
    return images, {text(name): integers(path, "class_dict", rows) for name, rows in classes.items()}


def _read_category_file(path: Path, split: str, size: int) -> _SplitClasses:
    content = load_pickle(path, "data", "labels")
    images = check_array(path, "data", content["data"], "uint8", (None, size, size, 3))
    labels = integers(path, "labels", content["labels"])
    if labels.size != len(images):
        raise DataError(f"{path}: 'labels' must hold one label per image ({len(images)}), got {labels.size}")
    names = content.get("catname2label")
    known = {label: text(name) for name, label in names.items()} if isinstance(names, dict) else {}
    # Where classes have no names, numbers may begin at 0 in each file: they are told apart by their split.
    numbers = np.unique(labels).tolist()
    return images, {known.get(label, f"{split}/{label}"): np.nonzero(labels == label)[0] for label in numbers}


def integers(path: Path, key: str, values: Any) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise DataError(f"{path}: '{key}' must hold lists of integers, got {array.dtype} {array.shape}")
    return array.astype(np.int64)


def text(name: Any) -> str:
    return name.decode("latin1") if isinstance(name, bytes) else str(name)


# ---- lists and tables -----------------------------------------------------------------------------------------------


def read_csv_files(folder: Path, files: tuple[str, ...], reading: Reading, cache: Path) -> LabelledImages:
    """Reads `train.csv`, `val.csv` and `test.csv` with the columns filename and label, and pictures in `images/`."""
    classes: dict[str, list[Path]] = {}
    splits: dict[str, list[str]] = {}
    for split, file in zip(SPLITS, files, strict=False):  # the last one is images/
        for number, row in enumerate(read_csv(folder / file, {"filename", "label"}), start=2):
            if Path(row["filename"]).name != row["filename"]:
                wanted = "the name of a file in images/ and a label"
                raise DataError(f"{folder / file}: row {number} must be {wanted}, got {row['filename']!r}")
            classes.setdefault(row["label"], []).append(folder / "images" / row["filename"])
            members = splits.setdefault(split, [])
            if row["label"] not in members:
                members.append(row["label"])
    return labelled(load_tree(Listing(folder, classes), reading, cache=cache), splits)


def read_parquet(folder: Path, files: tuple[str, ...], reading: Reading, cache: Path) -> LabelledImages:
    """Reads .parquet files whose names say their split.

    Raises:
        DataError: splits share classes; it says how such files are read.
    """
    paths = parquet.find(folder)
    of_split = {split: [path for path in paths if parquet.split_of(path) == split] for split in SPLITS}
    splits = {split: sorted(parquet.labels_of(members)) for split, members in of_split.items() if members}
    shared = set(splits.get("train", ())) & set(splits.get("test", ()))
    if shared:
        files_of = f"the splits of {folder} share {len(shared)} classes, so that they are none of few-shot learning"
        raise DataError(f"{files_of}; read the files as a folder of your own: `folder` splits them by class")
    files_in_order = [path for members in of_split.values() for path in members]
    return labelled(parquet.load(folder, files_in_order, reading, cache=cache), splits)


HDF5 = Form((hdf5.FILES,), lambda folder, files, reading, cache: hdf5.load(folder, reading, cache=cache))
TREE = Form(
    (SPLITS, ("train", "valid", "test"), ("train", "validation", "test")),
    lambda folder, files, reading, cache: load_split_tree(folder, reading, cache=cache),
)
PARQUET = Form((("train*.parquet",), ("data/train*.parquet",), ("*/train/*.parquet",)), read_parquet)
