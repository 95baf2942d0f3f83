"""Pictures from files, read once and packed into the cache."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from imaml_ext.data.cache import Arrays, Expected, cached_arrays, files_digest, short_name
from imaml_ext.errors import DataError, argument
from imaml_ext.pictures import READING_VERSION, Reading, StoredPicture
from imaml_ext.progress import ProgressBar, first_process

FOLDER = "pictures"  # in the cache
_TEXTS = ("names", "items", "problems", "files", "folder")


class Item(NamedTuple):
    """A picture that is to be read."""

    label: str  # its class
    source: Path | StoredPicture


@dataclass(frozen=True)
class Pictures:
    """Pictures of named classes, in any order."""

    images: np.ndarray  # uint8 [n, H, W], or [n, H, W, 3]
    labels: np.ndarray  # int64 [n], indices into `names`
    names: tuple[str, ...]  # of the classes, without those whose pictures could all not be read
    digests: np.ndarray  # uint64 [n], equal where pixels are
    items: tuple[str, ...]  # what each picture is called: its path below the folder
    problems: tuple[str, ...]  # a sentence for each picture that could not be read

    @property
    def counts(self) -> dict[str, int]:
        """How many pictures each class has."""
        return dict(zip(self.names, np.bincount(self.labels, minlength=len(self.names)).tolist(), strict=True))


def packed_pictures(
    folder: Path,
    files: Sequence[Path],
    items: Callable[[], Iterable[Item]],
    reading: Reading,
    *,
    cache: Path,
    total: int,
    skip_damaged: bool | None = None,
) -> Pictures:
    """Reads pictures once, and packs them into a file whose name carries the reading, and the state of `files`.

    Args:
        folder, files: what is read, and the files of it.
        items: makes the pictures, in order. total: how many there are.
        skip_damaged: goes on without pictures that cannot be read. None: no, and the data set has no such option.

    Raises:
        DataError: pictures cannot be read, and `skip_damaged` is not set: it names each of them.
    """
    colours, size, _ = reading.shape
    shape = (None, size, size) if colours == 1 else (None, size, size, 3)
    expected: Expected = {"images": ("uint8", shape), "labels": ("i", (None,)), "digests": ("u", (None,))}
    expected = {**expected, **dict.fromkeys(_TEXTS, ("uint8", (None,)))}
    where = f"{folder.resolve()} {reading}".encode("utf-8", "surrogatepass")
    place = hashlib.blake2b(where, digest_size=4).hexdigest()

    def read() -> Arrays:
        arrays = _read(folder, items(), reading, total)
        if arrays["problems"].size and not skip_damaged:
            raise _damaged(_lines(arrays["problems"]), total, skip_damaged)
        return {
            **arrays,
            "files": _bytes(_below(folder, path) for path in files),
            "folder": _bytes([str(folder.resolve())]),
        }

    name = f"{short_name(folder)}-{size}-{place}-{files_digest(folder, files, READING_VERSION)}.npz"
    arrays = cached_arrays(cache / FOLDER / name, expected, read, superseded=f"*-{place}-*.npz")
    problems = _lines(arrays["problems"])
    if problems and not skip_damaged:
        raise _damaged(problems, total, skip_damaged)
    return Pictures(
        arrays["images"],
        arrays["labels"],
        _lines(arrays["names"]),
        arrays["digests"],
        _lines(arrays["items"]),
        problems,
    )


def origin(arrays: Mapping[str, np.ndarray]) -> tuple[Path, list[Path]]:
    """Returns the folder that a packed file was made of, and the files in it."""
    (folder,) = _lines(arrays["folder"])
    return Path(folder), [Path(folder, name) for name in _lines(arrays["files"])]


ORIGIN: Expected = {"folder": ("uint8", (None,)), "files": ("uint8", (None,))}


def _read(folder: Path, items: Iterable[Item], reading: Reading, total: int) -> dict[str, np.ndarray]:
    colours, size, _ = reading.shape
    images = np.empty((total, size, size) if colours == 1 else (total, size, size, 3), np.uint8)
    digests = np.empty(total, np.uint64)
    names: dict[str, int] = {}
    labels: list[int] = []
    read: list[str] = []
    problems: list[str] = []
    began = time.monotonic()
    with ProgressBar(f"reading {short_name(folder)}", total=total, hidden=not first_process()) as bar:
        for done, (label, source) in enumerate(items, start=1):
            try:
                image = reading.read(source)
            except DataError as error:
                problems.append(str(error))
            else:
                row = len(labels)
                images[row] = image
                digests[row] = int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8).digest(), "little")
                labels.append(names.setdefault(label, len(names)))
                read.append(str(source) if isinstance(source, StoredPicture) else _below(folder, source))
            bar.update(done, {"pictures/s": f"{done / (time.monotonic() - began + 1e-9):,.0f}"})
    return {
        "images": images[: len(labels)],
        "labels": np.array(labels, np.int64),
        "digests": digests[: len(labels)],
        "names": _bytes(names),
        "items": _bytes(read),
        "problems": _bytes(problems),
    }


def _below(folder: Path, path: Path) -> str:
    return str(path.relative_to(folder))


def _damaged(problems: Sequence[str], total: int, skip_damaged: bool | None) -> DataError:
    one = len(problems) == 1
    which = "it" if one else "them"
    leave = "" if skip_damaged is None else f", or give {argument('skip_damaged', True)} to leave {which} out"
    if one:
        return DataError(f"{problems[0]}; mend it{leave}")
    return DataError("\n".join([f"{len(problems)} of {total} pictures cannot be read; mend them{leave}:", *problems]))


def _bytes(lines: Iterable[str]) -> np.ndarray:
    """Keeps text that may hold any character but zero, names of files that are not UTF-8 included."""
    return np.frombuffer(b"".join(line.encode("utf-8", "surrogatepass") + b"\0" for line in lines), np.uint8)


def _lines(array: np.ndarray) -> tuple[str, ...]:
    return tuple(line.decode("utf-8", "surrogatepass") for line in array.tobytes().split(b"\0")[:-1])
