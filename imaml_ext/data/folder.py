"""Pictures of your own: a folder that holds one folder of pictures per class."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from imaml_ext.data.cache import cache_folder
from imaml_ext.data.datasets import Dataset
from imaml_ext.data.pictures import SPLITS, LabelledImages, list_classes, list_splits, load_classes
from imaml_ext.data.source import CachedSource
from imaml_ext.errors import ConfigError, DataError
from imaml_ext.pictures import Reading
from imaml_ext.settings import FRACTION, to_json


@dataclass(frozen=True, kw_only=True)
class Folder(CachedSource):
    """Pictures of your own: a folder that holds one folder of pictures per class."""

    root: Path | None = None  # Folder that holds one folder of pictures per class.
    pictures: Reading = field(default_factory=Reading)  # How a picture is read.
    # Fraction of the classes for validation, where there are no folders train, val and test.
    val_fraction: Annotated[float, FRACTION] = 0.16
    test_fraction: Annotated[float, FRACTION] = 0.2  # Fraction of the classes for testing, likewise.

    def load(self) -> Dataset:
        found = self.read()
        read = self.pictures
        colours = {"rgb": "in colour", "grey": "in grey", "ink": "as ink"}[read.colours]
        description = f"{self.root}, {len(found.names):,} classes, {read.size}×{read.size} {colours}"
        return found.dataset("folder", description, read)

    @classmethod
    def upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        if "greyscale" in values:
            colours: Literal["grey", "rgb"] = "grey" if values.pop("greyscale") else "rgb"
            values["pictures"] = to_json(Reading(size=values.pop("image_size"), colours=colours))
        return values

    def read(self) -> LabelledImages:
        """Reads the pictures `root/<class>/*.png` (.jpg, .jpeg) as `pictures` says.

        Where root holds `train/` or `test/` with one folder per class, these, and `val/` where it is there, are the
        splits. Otherwise classes are put in the order of the SHA-256 of their names, a shuffle that needs no random
        generator: the last `test_fraction` of them test, `val_fraction` before these validate, and the rest train; a
        fraction is rounded to whole classes.

        Raises:
            ConfigError: there is no root.
            DataError: the folder, or pictures in it, are missing or damaged, or a class or a split is empty.
        """
        if self.root is None:
            raise ConfigError("root must be given: a folder that holds one folder of pictures per class")
        folder, cache = self.root.expanduser(), cache_folder(self.cache_dir)
        if not folder.is_dir():
            raise DataError(f"root {folder} is not a folder; it must hold one folder of pictures per class")
        if any(path.is_dir() for split in SPLITS for path in (folder / split).glob("*")):
            parts = list_splits(folder)
        else:
            parts = self._split(folder, list_classes(folder))
        return load_classes(folder, parts, self.pictures, cache=cache)

    def _split(self, folder: Path, classes: dict[str, list[Path]]) -> dict[str, dict[str, list[Path]]]:
        ranked = sorted(classes, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        val, test = (int(len(ranked) * fraction + 0.5) for fraction in (self.val_fraction, self.test_fraction))
        parts, begin = {}, 0
        for split, size in {"train": len(ranked) - val - test, "val": val, "test": test}.items():
            if size < 1 and not (split == "val" and self.val_fraction == 0):
                given = f"val_fraction = {self.val_fraction:g} and test_fraction = {self.test_fraction:g}"
                raise DataError(f"{folder} holds {len(ranked)} classes, which leaves none for {split!r} with {given}")
            parts[split] = {name: classes[name] for name in sorted(ranked[begin : begin + size])}
            begin += size
        return {split: members for split, members in parts.items() if members}
