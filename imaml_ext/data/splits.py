"""Which classes train, validate and test: by the hash of a class's name, by a file, or as recorded by a run."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from imaml_ext.data.datasets import Dataset
from imaml_ext.data.listing import SPLIT_NAMES, SPLITS, named
from imaml_ext.errors import DataError, argument
from imaml_ext.files import atomic_write

Classes = Mapping[str, Sequence[str]]  # {split: its classes}


def _one_form(name: str) -> str:
    """Returns a name in one of the forms in which Unicode writes accents; systems differ in which they keep."""
    return unicodedata.normalize("NFC", name)


def place_of(name: str) -> float:
    """Returns where a class's name falls in [0, 1]: its SHA-256 over 2²⁵⁶, the same on every machine."""
    text = _one_form(name).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest(), "big") / 2**256


def hashed_splits(names: Iterable[str], val_fraction: float, test_fraction: float) -> dict[str, list[str]]:
    """Splits classes by their names alone: a class stays where it is, whatever other classes there are.

    The last `test_fraction` of [0, 1] tests, `val_fraction` before it validates, and the rest trains.
    """
    bounds = {"test": 1 - test_fraction, "val": 1 - test_fraction - val_fraction, "train": -1.0}
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in sorted(names):
        place = place_of(name)
        splits[next(split for split, bound in bounds.items() if place >= bound)].append(name)
    return splits


def ranked_splits(names: Iterable[str], val_fraction: float, test_fraction: float) -> dict[str, list[str]]:
    """Splits classes by the rank of their hashes: the sizes are exact, and a new class may move others."""
    ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest())
    val, test = (int(len(ranked) * fraction + 0.5) for fraction in (val_fraction, test_fraction))
    train = max(0, len(ranked) - val - test)
    parts = {"train": ranked[:train], "val": ranked[train : train + val], "test": ranked[train + val :]}
    return {split: sorted(members) for split, members in parts.items()}


def check_not_empty(folder: Path, splits: Classes, val_fraction: float, test_fraction: float) -> str:
    """Checks that splits by fractions have classes to train and to test with.

    Returns a sentence where only validation has none; empty otherwise.

    Raises:
        DataError: there is no class to train or to test with; it says how there would be.
    """
    names = [name for members in splits.values() for name in members]
    empty = [split for split in ("train", "test", "val") if not splits[split]]
    if not empty or (empty == ["val"] and val_fraction == 0):
        return ""
    wanted = f"{argument('val_fraction', f'{val_fraction:g}')} and {argument('test_fraction', f'{test_fraction:g}')}"
    leave = (
        f"{folder} holds {len(names)} classes, and the hashes of their names leave none for {empty[0]!r} with {wanted}"
    )
    ways = f"name a file of splits ({argument('splits', 'FILE')}), split by rank ({argument('split_by', 'rank')})"
    advice = f"{ways}, make folders train/ and test/, or give other fractions"
    if empty[0] == "val":
        return f"{leave}: there is no validation; {advice}"
    least = math.ceil((1 - max(map(place_of, names), default=0.0)) * 1000) / 1000
    hint = f" ({argument('test_fraction', f'{least:g}')} gives one)" if empty[0] == "test" and least < 1 else ""
    raise DataError(f"{leave}; {advice}{hint}")


# ---- a file of splits -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SplitFile:
    """What a file of splits says.

    Attributes:
        splits: {split: its classes}.
        files: {class: names of its pictures, relative to the data's folder}; None where the file names classes alone.
    """

    splits: dict[str, list[str]]
    files: dict[str, list[str]] | None


def read_split_file(path: Path) -> SplitFile:
    """Reads which split each class is in.

    The file is one of: JSON {"train": [classes], "val": […], "test": […]}; CSV with the columns class and split; CSV
    with the columns filename, label and split. `valid` and `validation` are other names of val, which may be missing.

    Raises:
        DataError: the file is missing or none of these, names a class twice, or has no class to train or to test with.
    """
    found = SplitFile(_json_splits(path), None) if path.suffix.lower() == ".json" else _csv_splits(path)
    for split in ("train", "test"):
        if not found.splits.get(split):
            raise DataError(f"{path} must name classes of train and of test, has none of {split}")
    found.splits.setdefault("val", [])
    return found


def write_split_file(path: Path, dataset: Dataset) -> None:
    """Writes the classes of a data set as CSV with the columns class and split.

    Raises:
        DataError: the data set has no classes.
        WriteError: the file cannot be written.
    """
    if not dataset.classes():
        raise DataError(f"{dataset.name} has no classes to write")
    text = io.StringIO()
    rows = [(name, split) for split, members in dataset.classes().items() for name in members]
    csv.writer(text, lineterminator="\n").writerows([("class", "split"), *sorted(rows)])
    atomic_write(path, text.getvalue().encode())


def _json_splits(path: Path) -> dict[str, list[str]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"the file of splits {path} cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from error
    shape = 'must be {"train": [classes], "val": [classes], "test": [classes]}'
    if not isinstance(content, dict):
        raise DataError(f"{path} {shape}, got {type(content).__name__}")
    split_of: dict[str, str] = {}
    for key, members in content.items():
        if key not in SPLIT_NAMES or not isinstance(members, list) or not all(isinstance(m, str) for m in members):
            raise DataError(f"{path} {shape}, got {key!r}: {json.dumps(members)[:60]}")
        for name in members:
            _put(split_of, name, SPLIT_NAMES[key], str(path), once=True)
    return _by_split(split_of)


def _csv_splits(path: Path) -> SplitFile:
    rows = read_csv(path, {"class", "split"}, {"label", "split"}, {"filename", "label", "split"})
    split_of: dict[str, str] = {}
    files: dict[str, list[str]] = {}
    for number, row in enumerate(rows, start=2):
        where = f"{path}: row {number}"
        if row["split"] not in SPLIT_NAMES:
            raise DataError(f"{where}: split must be one of {', '.join(SPLIT_NAMES)}, got {row['split']!r}")
        name = row.get("class") or row["label"]
        _put(split_of, name, SPLIT_NAMES[row["split"]], where, once="filename" not in row)
        if "filename" in row:
            parts = Path(row["filename"]).parts
            if Path(row["filename"]).is_absolute() or ".." in parts:
                raise DataError(f"{where}: filename must be a path below the folder, got {row['filename']!r}")
            files.setdefault(name, []).append(row["filename"])
    return SplitFile(_by_split(split_of), files or None)


def _put(split_of: dict[str, str], name: str, split: str, where: str, *, once: bool) -> None:
    if name in split_of and (once or split_of[name] != split):
        twice = f"in {split_of[name]} and in {split}" if split_of[name] != split else f"twice in {split}"
        raise DataError(f"{where}: class {name!r} is {twice}; name each class once")
    split_of[name] = split


def _by_split(split_of: Mapping[str, str]) -> dict[str, list[str]]:
    return {split: sorted(n for n, where in split_of.items() if where == split) for split in SPLITS}


def read_csv(path: Path, *headers: set[str]) -> list[dict[str, str]]:
    """Reads the rows of a CSV file in UTF-8, with a byte order mark or without one, as {column: value}.

    Args:
        headers: sets of columns that the first row may name, in any order.

    Raises:
        DataError: the file cannot be read, has other columns, or a row lacks a value.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    first = [column.strip() for column in rows[0]] if rows else []
    if set(first) not in headers or len(set(first)) != len(first):
        wanted = " or ".join(repr(",".join(sorted(header))) for header in headers)
        raise DataError(f"{path} must begin with the line {wanted}, got {','.join(first)!r}")
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(first) or not all(row):
            raise DataError(
                f"{path}: row {number} must have a value for each of {','.join(first)}, got {','.join(row)!r}"
            )
    return [dict(zip(first, row, strict=True)) for row in rows[1:]]


def splits_of_file(path: Path, wanted: Mapping[str, list[str]], names: Iterable[str]) -> dict[str, list[str]]:
    """Returns the splits of a file for the classes that there are; DataError where it names others."""
    known = {_one_form(name): name for name in names}
    missing = [name for members in wanted.values() for name in members if _one_form(name) not in known]
    if missing:
        raise DataError(f"{path} names {len(missing)} classes that the folder does not hold: {named(missing)}")
    return {split: [known[_one_form(name)] for name in members] for split, members in wanted.items()}


# ---- recorded classes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecordedClasses:
    """The classes that something was trained with.

    Attributes:
        data: the name of the data set. classes: {split: its classes}.
    """

    data: str
    classes: Classes

    def check(self, dataset: Dataset, *, what: str) -> list[str]:
        """Checks that no class that was learnt from is one that is judged by now; of another data set, nothing.

        Args:
            what: was trained, in words.

        Returns:
            The classes that were in no split then, and are in one now.

        Raises:
            DataError: classes of train are in another split now, or classes of val in test.
        """
        if dataset.name != self.data:
            return []
        now = {_one_form(name): split for split, members in dataset.classes().items() for name in members}
        for split, elsewhere in (("train", ("val", "test")), ("val", ("test",))):
            moved = [n for n in map(_one_form, self.classes.get(split, ())) if now.get(n) in elsewhere]
            if moved:
                places = " and ".join(dict.fromkeys(now[name] for name in moved))
                advice = f"name a file of splits ({argument('splits', 'FILE')}) that leaves them there"
                did = "trained on" if split == "train" else "validated with"
                raise DataError(f"{what} {did} {_quoted(moved)}, which would be in {places} now; {advice}")
        known = {_one_form(name) for members in self.classes.values() for name in members}
        return [name for name in now if name not in known]


def _quoted(names: list[str]) -> str:
    return f"{'class' if len(names) == 1 else 'classes'} {named([repr(name) for name in names], 5)}"
