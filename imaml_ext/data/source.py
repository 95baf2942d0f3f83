"""Data sets by name: `load_dataset("omniglot").sampler("train", ways=5, shots=1, …).sample(step)`.

A data set is one file and one entry of `DataSource.kinds`: the file holds a subclass of `DataSource` whose fields are
the data set's options and whose `load` reads or makes the data.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from imaml_ext.data.datasets import Dataset
from imaml_ext.errors import ConfigTypeError
from imaml_ext.settings import Choice


@dataclass(frozen=True, kw_only=True)
class DataSource(Choice):
    """Where tasks come from: a data set and its options; `kind_of_task` is what its tasks are."""

    kinds: ClassVar[dict[str, str]] = {
        "glyphs": "imaml_ext.data.glyphs.Glyphs",
        "omniglot": "imaml_ext.data.omniglot.Omniglot",
        "mini-imagenet": "imaml_ext.data.mini_imagenet.MiniImageNet",
        "tiered-imagenet": "imaml_ext.data.tiered_imagenet.TieredImageNet",
        "cub": "imaml_ext.data.cub.Cub",
        "cifar-fs": "imaml_ext.data.cifar.CifarFS",
        "fc100": "imaml_ext.data.cifar.FC100",
        "folder": "imaml_ext.data.folder.Folder",
        "sinusoid": "imaml_ext.data.sinusoid.Sinusoid",
        "linear": "imaml_ext.data.linear.Linear",
    }
    kind_of_task: ClassVar[Literal["classification", "regression"]] = "classification"

    @abstractmethod
    def load(self) -> Dataset:
        """Reads the data set, or makes it.

        Raises:
            ConfigError: options that do not fit together.
            DataError: the data is missing, damaged or not of the expected format, or the cache cannot be written.
        """


@dataclass(frozen=True, kw_only=True)
class CachedSource(DataSource):
    """A data set that is prepared once and kept in the cache."""

    cache_dir: Path | None = None  # Folder for rendered or packed images; unset: the user's cache folder.


@dataclass(frozen=True, kw_only=True)
class FileSource(CachedSource):
    """A published data set that is read from files."""

    # Folder of the data set's files, or a tar archive of it; unset: the environment variable IMAML_DATA_ROOT, else the
    # cache.
    root: Path | None = None


def load_dataset(name: str, **options: Any) -> Dataset:
    """Loads a data set by name, one of `DataSource.kinds`; `options` are the fields of its class.

    Raises:
        ConfigError: an unknown name, or an option outside its range.
        ConfigTypeError: an option that the data set does not have, or of the wrong type.
        DataError: the data is missing or damaged.
    """
    kind = DataSource.kind(name)
    taken = [field.name for field in dataclasses.fields(kind)]
    for option in options:
        if option not in taken:
            raise ConfigTypeError(f"{option} is no option of {name}, which has {', '.join(taken) or 'none'}")
    return kind(**options).load()
