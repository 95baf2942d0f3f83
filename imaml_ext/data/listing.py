"""Which pictures a folder holds, class by class; whatever else is in it is counted."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from imaml_ext.errors import DataError
from imaml_ext.pictures import SUFFIXES

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_NO_CLASS = "__MACOSX"  # what some programs add to an archive


@dataclass
class Listing:
    """The pictures in a folder.

    Attributes:
        classes: the pictures of each class, in order of name.
        splits: the classes in the folders train/, val/ and test/, where there are these.
        left_out: what is in the folder and is not read, by its kind.
    """

    folder: Path
    classes: dict[str, list[Path]] = field(default_factory=dict)
    splits: dict[str, list[str]] | None = None
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, kind: str, what: str) -> None:
        self.left_out.setdefault(kind, []).append(what)

    def omissions(self) -> str:
        """One line that counts what is left out; empty where all is read."""
        parts = [f"{kind} {len(names):,} ({named(names, 2)})" for kind, names in self.left_out.items() if names]
        return f"left out of {self.folder}: {', '.join(parts)}" if parts else ""

    def drop_small(self, minimum: int, counts: Mapping[str, int]) -> set[str]:
        """Returns the classes that have fewer pictures than `minimum`, and counts them as left out."""
        small = {name for name in self.classes if counts.get(name, 0) < minimum}
        for name in small:
            self.leave_out(f"classes of fewer than {minimum} pictures", name)
        return small

    def require_pictures(self, advice: str = "") -> None:
        """Raises the DataError that names the classes that have no pictures, where there are such."""
        empty = [name for name, pictures in self.classes.items() if not pictures]
        if empty:
            which = f"class {empty[0]!r} has" if len(empty) == 1 else f"{len(empty)} classes ({named(empty)}) have"
            counted = f" ({self.omissions()})" if self.left_out else ""
            suffixes = ", ".join(sorted(SUFFIXES))
            raise DataError(f"{self.folder}: {which} no pictures{counted}; add pictures ({suffixes}){advice}")

    def _add(self, folder: Path) -> str:
        """Adds the class whose pictures a folder holds; returns its name."""
        name, found = class_name(folder), []
        for entry in _visible(folder, self):
            where = f"{name}/{entry.name}"
            if entry.is_dir():
                inside = [p for p in entry.rglob("*") if is_picture(p)]
                for path in inside:
                    self.leave_out("pictures in folders inside a class", f"{name}/{path.relative_to(folder)}")
            elif is_picture(entry):
                found.append(entry)
            else:
                self.leave_out("files of other kinds", where)
        self.classes[name] = found
        return name

    def _add_all(self, folder: Path) -> list[str]:
        """Adds the classes whose folders are in `folder`; returns their names."""
        names = []
        for entry in _visible(folder, self):
            if not entry.is_dir():
                self.leave_out("files beside the classes", str(entry.relative_to(self.folder)))
            elif class_name(entry) in self.classes:
                raise DataError(f"{self.folder}: class {class_name(entry)!r} is in two splits; splits share no class")
            else:
                names.append(self._add(entry))
        return names


def pictures_below(folder: Path) -> tuple[list[Path], Listing]:
    """Returns the pictures in a folder and in all folders below it, and a listing of what is left out.

    Raises:
        DataError: there are none, or a folder cannot be read.
    """
    found, listing, places = [], Listing(folder), [folder]
    try:
        while places:
            for entry in _visible(places.pop(), listing):
                if entry.is_dir() and not entry.is_symlink():
                    places.append(entry)
                elif is_picture(entry):
                    found.append(entry)
                else:
                    listing.leave_out("files of other kinds", str(entry.relative_to(folder)))
    except OSError as error:
        raise _cannot_be_read(folder, error) from error
    if not found:
        counted = f" ({listing.omissions()})" if listing.left_out else ""
        raise DataError(f"the folder {folder} holds no pictures{counted}")
    return sorted(found), listing


def list_folder(folder: Path) -> Listing:
    """Lists the pictures in `folder`/<class>/, or in train/<class>/, val/<class>/ (or valid/, validation/) and
    test/<class>/.

    Raises:
        DataError: there are none, a class is in two splits, one of train/ and test/ is missing, or a folder cannot be
            read.
    """
    try:
        listing = _listed(folder)
    except OSError as error:
        raise _cannot_be_read(folder, error) from error
    if not listing.classes:
        raise DataError(f"{folder} must hold one folder of pictures per class, found none")
    return listing


def _cannot_be_read(folder: Path, error: OSError) -> DataError:
    return DataError(f"{error.filename or folder} cannot be read ({error.strerror or error})")


def _listed(folder: Path) -> Listing:
    listing = Listing(folder)
    parts = _split_folders(folder)
    if not parts:
        listing._add_all(folder)
        return listing
    for split in ("train", "test"):
        if split not in parts:
            needed = "the folders train/ and test/, with or without val/"
            raise DataError(f"{folder} must hold {needed}; {split}/ is missing")
    listing.splits = {split: listing._add_all(parts[split]) for split in SPLITS if split in parts}
    for entry in _visible(folder, listing):
        if entry not in parts.values():
            listing.leave_out("entries beside the splits", entry.name)
    return listing


def is_picture(path: Path) -> bool:
    """Tells whether a file is read as a picture, by its name; a broken link is, and reading it says so."""
    usual = path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    return usual and (path.is_file() or not path.exists())


def class_name(folder: Path) -> str:
    """Returns the name of a folder; bytes that are not UTF-8 are written as `\\xe9`."""
    return os.fsencode(folder.name).decode("utf-8", "backslashreplace")


def named(names: list[str], most: int = 10) -> str:
    """Lists some names, and how many there are beside."""
    more = f", and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _split_folders(folder: Path) -> dict[str, Path]:
    """Returns {split: its folder} where folders of a folder are splits, which hold folders and no pictures.

    A class may be called train: it is one where pictures lie in it, or folders beside it are no splits.
    """
    found: dict[str, Path] = {}
    for entry in _visible(folder):
        split = SPLIT_NAMES.get(entry.name)
        if split is not None and entry.is_dir() and _holds_classes(entry):
            if split in found:
                raise DataError(f"{folder} holds {found[split].name}/ and {entry.name}/, which are the same split")
            found[split] = entry
    if {"train", "test"} <= found.keys():
        return found
    others = [entry for entry in _visible(folder) if entry.is_dir() and entry not in found.values()]
    return {} if any(is_picture(path) for entry in others for path in _visible(entry)) else found


def _holds_classes(folder: Path) -> bool:
    entries = list(_visible(folder))
    return any(entry.is_dir() for entry in entries) and not any(map(is_picture, entries))


def _visible(folder: Path, listing: Listing | None = None) -> Iterator[Path]:
    """What is in a folder, in order of name; hidden entries are counted."""
    for entry in sorted(folder.iterdir()):
        if not entry.name.startswith(".") and entry.name != _NO_CLASS:
            yield entry
        elif listing is not None:
            listing.leave_out("hidden entries", str(entry.relative_to(listing.folder)))
