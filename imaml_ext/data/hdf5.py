"""Pictures in .hdf5 files, as torchmeta makes them: the group `datasets` has an entry per class.

An entry holds images, uint8 [n, size, size, 3], or n picture files, each as an array of its bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from imaml_ext.data.cache import check_array
from imaml_ext.data.labelled import LabelledImages, label_splits, labelled
from imaml_ext.data.listing import SPLITS
from imaml_ext.data.optional import optional
from imaml_ext.data.packing import Item, packed_pictures
from imaml_ext.errors import DataError
from imaml_ext.pictures import Reading, StoredPicture

FILES = tuple(f"{split}_data.hdf5" for split in SPLITS)


def load(folder: Path, reading: Reading, *, cache: Path) -> LabelledImages:
    """Reads `train_data.hdf5`, `val_data.hdf5` and `test_data.hdf5`; picture files in them are packed.

    Raises:
        DataError: h5py is missing, or a file is damaged or holds something else.
    """
    paths = [folder / file for file in FILES]
    sizes: dict[str, dict[str, int]] = {}
    encoded = False
    for split, path in zip(SPLITS, paths, strict=True):
        with _opened(path) as classes:
            sizes[split] = {name: len(classes[name]) for name in sorted(classes)}
            encoded = encoded or any(classes[name].ndim == 1 for name in classes)

    def entries() -> Iterator[tuple[Path, str, np.ndarray]]:
        for split, path in zip(SPLITS, paths, strict=True):
            with _opened(path) as classes:
                for name in sizes[split]:
                    yield path, name, classes[name][()]

    if not encoded:
        shape = (None, reading.size, reading.size, 3)
        images = [check_array(path, name, array, "uint8", shape) for path, name, array in entries()]
        return LabelledImages(np.concatenate(images), *label_splits(folder, sizes))

    def items() -> Iterator[Item]:
        for path, name, pictures in entries():
            for row, picture in enumerate(pictures):
                yield Item(name, StoredPicture(np.asarray(picture, np.uint8).tobytes(), f"{path.name}:{name}:{row}"))

    total = sum(sum(counts.values()) for counts in sizes.values())
    return labelled(packed_pictures(folder, paths, items, reading, cache=cache, total=total), sizes)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Opens the group `datasets` of a file, which has an entry per class."""
    h5py = optional("h5py", extra="hdf5", what=path.name)
    try:
        with h5py.File(path, "r") as file:
            if "datasets" not in file or not len(file["datasets"]):
                raise DataError(f"{path} must hold a group 'datasets' with an entry per class, it has {list(file)}")
            yield file["datasets"]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged or not an .hdf5 file of classes ({error})") from error
