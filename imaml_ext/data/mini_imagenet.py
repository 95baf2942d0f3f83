"""mini-ImageNet: 100 classes of ImageNet, 600 photographs each at 84×84 (Vinyals et al., NeurIPS 2016), split into 64
classes to train on, 16 for validation and 20 for testing (Ravi and Larochelle, ICLR 2017).

It is read from whichever of these a root folder holds, the first that is found:

- `mini-imagenet-cache-{train,val,test}.pkl` (learn2learn: `validation`): `image_data` uint8 [n, 84, 84, 3],
  `class_dict` class -> rows;
- `miniImageNet_category_split_{train_phase_train,val,test}.pickle`: `data` uint8 [n, 84, 84, 3], `labels`;
- `{train,val,test}_data.hdf5` of torchmeta: an entry per class, uint8 [600, 84, 84, 3];
- `train.csv`, `val.csv`, `test.csv` with the columns filename and label, and all pictures in `images/`;
- .parquet files of Hugging Face, train-*.parquet, validation-*.parquet, test-*.parquet;
- `train/<class>/`, `val/<class>/`, `test/<class>/` with pictures.

Pictures are scaled to 84×84 by a Lanczos filter and packed once into the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from imaml_ext.data import forms
from imaml_ext.data.datasets import Dataset
from imaml_ext.data.labelled import LabelledImages
from imaml_ext.data.listing import SPLITS
from imaml_ext.data.source import FileSource
from imaml_ext.pictures import Reading

SIZE = 84
READING = Reading(size=SIZE)
NUM_CLASSES = {"train": 64, "val": 16, "test": 20}
_PLACES = (".", "mini-imagenet", "mini_imagenet", "miniimagenet", "miniImageNet")


@dataclass(frozen=True, kw_only=True)
class MiniImageNet(FileSource):
    """mini-ImageNet: photographs of 100 classes."""

    def load(self) -> Dataset:
        description = "mini-ImageNet, 100 classes, 84×84 in colour"
        return self.read().dataset("mini-imagenet", description, READING, published=600)

    def read(self) -> LabelledImages:
        """Reads all photographs, uint8 [n, 84, 84, 3], and the classes of each split.

        `root` is a folder that holds one of the forms above, the parent of one, or a tar archive of it.

        Raises:
            DataError: nothing is found, or what is found is incomplete, damaged or of the wrong format.
        """
        return forms.read_first("mini-ImageNet", _FORMS, self, _PLACES, READING, NUM_CLASSES)


_CACHE_FILES = tuple(f"mini-imagenet-cache-{split}.pkl" for split in SPLITS)
_LEARN2LEARN_FILES = tuple(f"mini-imagenet-cache-{split}.pkl" for split in ("train", "validation", "test"))
_CATEGORY_FILES = tuple(f"miniImageNet_category_split_{part}.pickle" for part in ("train_phase_train", "val", "test"))
_CSV_FILES = tuple(f"{split}.csv" for split in SPLITS)
_FORMS = (
    forms.Form((_CACHE_FILES, _LEARN2LEARN_FILES), forms.read_cache_files),
    forms.Form((_CATEGORY_FILES,), forms.read_category_files),
    forms.HDF5,
    forms.Form(((*_CSV_FILES, "images"),), forms.read_csv_files),
    forms.PARQUET,
    forms.TREE,
)
