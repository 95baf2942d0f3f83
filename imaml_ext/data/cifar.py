"""CIFAR-FS and FC100: the 100 classes of CIFAR-100 (Krizhevsky 2009), 32×32 in colour, as few-shot data sets.

CIFAR-FS (Bertinetto et al., ICLR 2019) splits the classes at random, 64 / 16 / 20. FC100 (Oreshkin et al., NeurIPS
2018) splits them by superclass, 60 / 20 / 20, so that test classes are unlike training classes. Both splits are fixed
lists in `cifar_splits.json`.

The images are read from whichever of these a root folder holds, the first that is found:

- `cifar-100-python/`, the files `train`, `test` and `meta` as published, which torchvision downloads: 600
  images per class from both;
- `cifar100_100_per_class.npz`: `images` uint8 [n, 32, 32, 3], `fine_label`, `class_names`.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from imaml_ext.data import cache
from imaml_ext.data.datasets import Dataset
from imaml_ext.data.labelled import LabelledImages
from imaml_ext.data.pickles import load_pickle
from imaml_ext.data.source import FileSource
from imaml_ext.errors import DataError
from imaml_ext.pictures import Reading

SIZE = 32
_BATCHES = "cifar-100-python"
_PACKED = "cifar100_100_per_class.npz"
_PLACES = (".", "cifar100", "cifar-100")
_PACKED_ARRAYS: cache.Expected = {
    "images": ("uint8", (None, SIZE, SIZE, 3)),
    "fine_label": ("u", (None,)),
    "class_names": ("U", (100,)),
}


@functools.cache
def _split_file() -> dict[str, dict[str, list[str]]]:
    return json.loads(cache.shipped_text("cifar_splits.json"))


@functools.cache
def class_names() -> tuple[str, ...]:
    """Lists the 100 classes in the order of CIFAR-100's labels, which is that of their names."""
    return tuple(sorted(name for members in _split_file()["superclasses"].values() for name in members))


def cifar_split(name: str) -> dict[str, np.ndarray]:
    """Returns the indices into `class_names()` of "train", "val" and "test"; `name`: "cifar-fs" or "fc100"."""
    table = _split_file()
    splits = {}
    for split, members in table[name].items():
        if name == "fc100":
            members = [c for superclass in members for c in table["superclasses"][superclass]]
        splits[split] = np.array(sorted(map(class_names().index, members)))
    return splits


@dataclass(frozen=True, kw_only=True)
class _Cifar(FileSource):
    """CIFAR-100 in some splits."""

    download: bool = False  # Download the data set through torchvision when it is not under the root.

    description: ClassVar[str]

    def load(self) -> Dataset:
        return self.read().dataset(self.kind_name, self.description, Reading(size=SIZE, square="middle"), published=600)

    def read(self) -> LabelledImages:
        """Reads CIFAR-100, images uint8 [n, 32, 32, 3], and its splits.

        `root` is a folder that holds one of the forms above, or the parent of one. `download=True` fetches
        `cifar-100-python` through torchvision into `root` where it has none, or an incomplete one.

        Raises:
            DataError: nothing is found, or what is found is incomplete, damaged or of the wrong format.
        """
        where, origin = cache.data_folder(self.root, cache.cache_folder(self.cache_dir))
        batches, packed = _find(where, _BATCHES), _find(where, _PACKED)
        complete = batches is not None and all((batches / file).is_file() for file in ("train", "test", "meta"))
        if self.download and not complete:
            cache.download_through_torchvision(
                "CIFAR-100",
                where,
                lambda datasets: [datasets.CIFAR100(str(where), train=train, download=True) for train in (True, False)],
                by_hand="cifar-100-python/ (cs.toronto.edu/~kriz/cifar.html)",
            )
            batches = where / _BATCHES
        source = batches or packed
        if source is None:
            raise cache.not_found("CIFAR-100", f"{_BATCHES}/ nor {_PACKED}", where, origin, download=True)
        images, labels = _read_batches(source) if batches else _read_packed(source)
        if labels.size != len(images) or labels.size == 0 or not 0 <= labels.min() <= labels.max() < 100:
            raise DataError(f"{source} must hold one label from 0 to 99 per image, of which it has {len(images)}")
        counts = np.bincount(labels, minlength=100)
        if counts.min() == 0:
            raise DataError(f"{source} holds no image of the class {class_names()[int(counts.argmin())]!r}")
        images = images[np.argsort(labels, kind="stable")]
        return LabelledImages(images, class_names(), counts, cifar_split(self.kind_name))


@dataclass(frozen=True, kw_only=True)
class CifarFS(_Cifar):
    """CIFAR-FS: the classes of CIFAR-100 split at random."""

    description: ClassVar[str] = "CIFAR-FS, the classes of CIFAR-100, 32×32 in colour"


@dataclass(frozen=True, kw_only=True)
class FC100(_Cifar):
    """FC100: the classes of CIFAR-100 split by superclass."""

    description: ClassVar[str] = "FC100, CIFAR-100 split by superclass, 32×32 in colour"


def _find(where: Path, name: str) -> Path | None:
    return next((where / place / name for place in _PLACES if (where / place / name).exists()), None)


def _read_batches(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads images [n, 32, 32, 3] and labels [n] of the published files."""
    _check_names(folder / "meta", load_pickle(folder / "meta", "fine_label_names")["fine_label_names"])
    images, labels = [], []
    for path in (folder / "train", folder / "test"):
        content = load_pickle(path, "data", "fine_labels")
        data = cache.check_array(path, "data", content["data"], "uint8", (None, 3 * SIZE * SIZE))
        images.append(data.reshape(-1, 3, SIZE, SIZE).transpose(0, 2, 3, 1))
        labels.append(np.asarray(content["fine_labels"]))
        if labels[-1].shape != data.shape[:1] or labels[-1].dtype.kind not in "iu":
            raise DataError(f"{path}: 'fine_labels' must hold one integer per image, of which there are {len(data)}")
    return np.concatenate(images), np.concatenate(labels)


def _read_packed(path: Path) -> tuple[np.ndarray, np.ndarray]:
    arrays = cache.load_arrays(path, _PACKED_ARRAYS)
    _check_names(path, arrays["class_names"].tolist())
    return arrays["images"], arrays["fine_label"].astype(np.int64)


def _check_names(path: Path, names: list[str]) -> None:
    if list(names) != list(class_names()):
        raise DataError(f"{path} does not name the 100 classes of CIFAR-100 in the expected order; create it again")
