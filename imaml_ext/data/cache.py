"""Where a data set's files are found, downloaded and cached, and how arrays that were read are checked."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from imaml_ext.data.archives import unpacked
from imaml_ext.errors import DataError, WriteError, argument
from imaml_ext.files import written_whole
from imaml_ext.progress import say_once

Shape = tuple[int | None, ...]  # None stands for any size
Arrays = Mapping[str, np.ndarray]
Expected = Mapping[str, tuple[str, Shape]]  # {array: (name or kind of its dtype, its shape)}
_KINDS = {"u": "an unsigned integer", "U": "text"}
_DAMAGE = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError)


def shipped_text(name: str) -> str:
    """Reads a table that ships with the data sets."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def cache_folder(cache_dir: Path | str | None) -> Path:
    """Returns `cache_dir`, else `$IMAML_CACHE`, `$XDG_CACHE_HOME/imaml_ext` or `~/.cache/imaml_ext`."""
    if given := cache_dir or os.environ.get("IMAML_CACHE"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "imaml_ext"


def data_folder(root: Path | str | None, cache: Path) -> tuple[Path, str]:
    """Returns where a data set's files are looked for, and what says so: `root`, `$IMAML_DATA_ROOT` or the cache."""
    given = named_folder(root)
    if given is None:
        return cache, "the cache"
    return unpacked(given, cache), "IMAML_DATA_ROOT" if root is None else argument("root")


def named_folder(root: Path | str | None) -> Path | None:
    """Returns `root` or `$IMAML_DATA_ROOT`; None where neither is given, which means the cache."""
    given = (os.environ.get("IMAML_DATA_ROOT") or None) if root is None else root
    return None if given is None else Path(given).expanduser()


def not_found(what: str, holds: str, where: Path, origin: str, *, download: bool) -> DataError:
    """Makes the error of a data set that is nowhere; `holds` is what would have been one."""
    state = f"holds neither {holds}" if where.is_dir() else "is not a folder"
    way = f", or pass {argument('download', True)} to fetch it through torchvision" if download else ""
    advice = f"give the folder that has it as {argument('root')} or in IMAML_DATA_ROOT{way}"
    return DataError(f"{what} was not found: {origin} {where} {state}; {advice}")


def download_through_torchvision(what: str, where: Path, fetch: Callable[[Any], object], *, by_hand: str) -> None:
    """Calls `fetch` with torchvision.datasets, to put a data set into `where`; `by_hand` can be put there instead."""
    try:
        from torchvision import datasets
    except Exception as error:  # one built for another torch fails with RuntimeError or OSError, not ImportError
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise DataError(
            f"{what} is downloaded through torchvision, which cannot be imported here ({reason}); install the "
            f"torchvision that belongs to this torch, or put {by_hand} into a folder and give it as {argument('root')}"
        ) from error
    try:
        where.mkdir(parents=True, exist_ok=True)
        fetch(datasets)
    except Exception as error:
        reason, advice = f"{type(error).__name__}: {error}", f"try again, or put {by_hand} there"
        raise DataError(f"downloading {what} into {where} failed ({reason}); {advice}") from error


def short_name(path: Path) -> str:
    """Returns the beginning of a file's name in letters that every file system has, for the name of a cache file."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", path.name)[:40].strip("-") or "data"


def files_digest(folder: Path, paths: Iterable[Path], *also: object) -> str:
    """Returns what tells a state of files in a folder: a digest of their names, sizes and times, 16 digits."""
    state = hashlib.blake2b(f"{also}".encode(), digest_size=8)
    for path in paths:
        try:
            stat = path.stat()
            facts = f"{stat.st_size} {stat.st_mtime_ns}"
        except OSError:  # said by whoever reads it
            facts = "missing"
        state.update(f"{path.relative_to(folder)} {facts}\n".encode("utf-8", "surrogatepass"))
    return state.hexdigest()


def cached_arrays(path: Path, expected: Expected, make: Callable[[], Arrays], *, superseded: str = "") -> Arrays:
    """Reads the arrays of a cache file; where it is missing or damaged, they are made and saved.

    A file that cannot be read for another reason (another user's, a failing disk) is left alone. Where nothing can be
    saved, a line says so, and what was made is used.

    Args:
        superseded: a pattern of files beside it that a new one takes the place of.
    """
    keep = True
    if os.path.lexists(path):
        try:
            return load_arrays(path, expected)
        except UnreadableError as error:
            keep = False
            say_once(f"the data cache is passed over: {error}")
        except DataError:
            pass  # damaged: what is made below takes its place
    arrays = make()
    if not keep:
        return arrays
    try:
        save_arrays(path, arrays)
    except DataError as error:
        say_once(f"going on without the cache: {error}")
        return arrays
    for old in path.parent.glob(superseded) if superseded else ():
        if old != path:
            with contextlib.suppress(OSError):  # another user's
                old.unlink()
    return arrays


def save_arrays(path: Path, arrays: Arrays) -> None:
    """Writes a compressed .npz whole or not at all; raises DataError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            np.savez_compressed(file, **dict(arrays))  # type: ignore[arg-type]
    except (OSError, WriteError) as error:
        cause: Any = error.__cause__ if isinstance(error, WriteError) else error
        advice = "set IMAML_CACHE to a folder with space that you may write to"
        raise DataError(f"the data cache {path} could not be written ({cause.strerror or cause}); {advice}") from error


class UnreadableError(DataError):
    """A file that may be whole, and cannot be read: it is another user's, or its disk fails."""


def load_arrays(path: Path, expected: Expected) -> dict[str, np.ndarray]:
    """Reads the named arrays of an .npz.

    Raises:
        UnreadableError: the operating system does not let it be read.
        DataError: the file or one of the arrays is missing or damaged.
    """
    try:
        with path.open("rb") as file:  # NumPy leaves one that it opens by name open where it is damaged
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path} is not an .npz archive; download or create it again")
            for name in expected:
                if name not in archive.files:
                    raise DataError(f"{path} has no array '{name}' (it holds {', '.join(archive.files) or 'nothing'})")
            return {name: check_array(path, name, archive[name], *wanted) for name, wanted in expected.items()}
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path} does not exist") from None
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: an offset before the start
            raise UnreadableError(f"{path} cannot be read ({error.strerror})") from error
        reason = error or type(error).__name__
        raise DataError(f"{path} is damaged or not an .npz archive ({reason}); download or create it again") from error


def check_array(path: Path, name: str, array: Any, dtype: str, shape: Shape) -> np.ndarray:
    """Returns `array`, the entry `name` of a file; raises DataError unless it has this dtype and shape."""
    if isinstance(array, np.ndarray):
        fits = len(shape) == array.ndim and all(n in (None, m) for n, m in zip(shape, array.shape, strict=True))
        if fits and dtype in (array.dtype.name, array.dtype.kind):
            return array
    got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
    wanted = ", ".join("any" if n is None else str(n) for n in shape)
    raise DataError(f"{path}: '{name}' must be {_KINDS.get(dtype, dtype)} ({wanted}), got {got}")
