"""Pictures of your own: a folder that holds one folder of pictures per class."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from imaml_ext.data import parquet
from imaml_ext.data.archives import unpacked
from imaml_ext.data.cache import cache_folder
from imaml_ext.data.datasets import Dataset
from imaml_ext.data.labelled import LabelledImages, equal_pictures, labelled, load_tree
from imaml_ext.data.listing import Listing, is_picture, list_folder
from imaml_ext.data.packing import Pictures
from imaml_ext.data.source import CachedSource
from imaml_ext.data.splits import (
    SplitFile,
    check_not_empty,
    hashed_splits,
    ranked_splits,
    read_split_file,
    splits_of_file,
)
from imaml_ext.errors import ConfigError, DataError, argument
from imaml_ext.pictures import Reading
from imaml_ext.progress import say_once
from imaml_ext.settings import FRACTION, NOT_NEGATIVE, to_json


@dataclass(frozen=True, kw_only=True)
class Folder(CachedSource):
    """Pictures of your own: a folder that holds one folder of pictures per class."""

    root: Path | None = None  # Folder, or tar archive, that holds one folder of pictures per class.
    pictures: Reading = field(default_factory=Reading)  # How a picture is read.
    # CSV with the columns class,split or filename,label,split, or JSON {"train": [classes], …}; unset: by the names.
    splits: Path | None = None
    # Fraction of the classes for validation, where neither a file of splits nor folders train, val and test say it.
    val_fraction: Annotated[float, FRACTION] = 0.16
    test_fraction: Annotated[float, FRACTION] = 0.2  # Fraction of the classes for testing, likewise.
    # By the hash of a class's name alone, which never moves it; or by the rank of the hash, for splits of exact sizes.
    split_by: Literal["hash", "rank"] = "hash"
    min_per_class: Annotated[int, NOT_NEGATIVE] = 0  # Classes of fewer pictures are left out.
    skip_damaged: bool = False  # Leave out pictures that cannot be read.

    def load(self) -> Dataset:
        found = self.read()
        read = self.pictures
        colours = {"rgb": "in colour", "grey": "in grey", "ink": "as ink"}[read.colours]
        name = self.root.resolve().name if self.root else ""
        description = f"pictures in {name}, {len(found.names):,} classes, {read.size}×{read.size} {colours}"
        return found.dataset("folder", description, read)

    @classmethod
    def upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        if "greyscale" in values:
            colours: Literal["grey", "rgb"] = "grey" if values.pop("greyscale") else "rgb"
            values["pictures"] = to_json(Reading(size=values.pop("image_size"), colours=colours))
        if "split_by" not in values:
            values |= {"splits": None, "split_by": "rank", "min_per_class": 0, "skip_damaged": False}
        return values

    def read(self) -> LabelledImages:
        """Reads the pictures `root/<class>/*.png` (and of other suffixes) as `pictures` says.

        The first of these that there is says which classes are in which split: the file `splits`; the folders
        `root/train/<class>/`, `val/` (or `valid/`, `validation/`) and `test/`; else the SHA-256 of the class's name
        over 2²⁵⁶, u in [0, 1]: it tests with u ≥ 1 − `test_fraction`, validates with u in the `val_fraction` before,
        and trains below. A class so never changes its split, whatever else is in the folder.

        A folder of .parquet files with the columns image and label is read too. What is left out, and pictures of
        equal pixels, are counted in a line on stderr.

        Raises:
            ConfigError: there is no root.
            DataError: the folder, or pictures in it, are missing or damaged, or a class or a split is empty.
        """
        if self.root is None:
            what = "a folder that holds one folder of pictures per class"
            raise ConfigError(f"{argument('root')} must be given: {what}")
        cache = cache_folder(self.cache_dir)
        folder = unpacked(self.root.expanduser(), cache)
        if not folder.is_dir():
            what = "it must hold one folder of pictures per class"
            raise DataError(f"{argument('root')} {folder} is not a folder; {what}")
        file = None if self.splits is None else read_split_file(self.splits.expanduser())
        tables = parquet.find(folder)
        if tables and not any(map(is_picture, folder.rglob("*"))):
            listing = Listing(folder)
            pictures = parquet.load(folder, tables, self.pictures, cache=cache, skip_damaged=self.skip_damaged)
            listing.classes = {name: [] for name in pictures.names}
        else:
            listing = self._listing(folder, file)
            pictures = load_tree(listing, self.pictures, cache=cache, skip_damaged=self.skip_damaged)
        if pictures.problems:
            listing.left_out["damaged pictures"] = list(pictures.problems)
        small = listing.drop_small(self.min_per_class or 1, pictures.counts)
        splits = self._splits(listing, file, small)
        self._tell(listing, pictures, splits)
        return labelled(pictures, {split: members for split, members in splits.items() if members})

    def _listing(self, folder: Path, file: SplitFile | None) -> Listing:
        if file is not None and file.files is not None:
            paths = {name: [folder / each for each in files] for name, files in file.files.items()}
            return Listing(folder, classes=paths)
        listing = list_folder(folder)
        if self.splits is not None and self.splits.name in listing.left_out.get("files beside the classes", ()):
            listing.left_out["files beside the classes"].remove(self.splits.name)
        if not self.min_per_class:
            listing.require_pictures(f", or give {argument('min_per_class', 1)} to leave such classes out")
        return listing

    def _splits(self, listing: Listing, file: SplitFile | None, small: set[str]) -> dict[str, list[str]]:
        """Returns the classes of each split, without the small ones."""
        names = [name for name in listing.classes if name not in small]
        if file is not None and self.splits is not None:
            splits = splits_of_file(self.splits, file.splits, listing.classes)
            chosen = {name for members in splits.values() for name in members}
            for name in names:
                if name not in chosen:
                    listing.leave_out(f"classes that {self.splits.name} does not name", name)
        elif listing.splits is not None:
            splits = listing.splits
        else:
            by = hashed_splits if self.split_by == "hash" else ranked_splits
            splits = by(names, self.val_fraction, self.test_fraction)
            if line := check_not_empty(listing.folder, splits, self.val_fraction, self.test_fraction):
                say_once(line)
        kept = {split: [name for name in members if name not in small] for split, members in splits.items()}
        for split in ("train", "test"):
            if not kept[split]:
                small_ones = f"{argument('min_per_class', self.min_per_class)} leaves no class for {split!r}"
                raise DataError(f"{listing.folder}: {small_ones}")
        return kept

    def _tell(self, listing: Listing, pictures: Pictures, splits: dict[str, list[str]]) -> None:
        if line := listing.omissions():
            say_once(line)
        for line in equal_pictures(pictures, splits):
            say_once(f"{listing.folder}: {line}")
