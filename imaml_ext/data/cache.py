"""Where prepared data is kept, and how files get there: whole or not at all."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path

import numpy as np

from imaml_ext.errors import DataError, WriteError
from imaml_ext.files import atomic_write

Expected = Mapping[str, tuple[str, tuple[int | None, ...]]]  # array -> (dtype kind or name, shape with None = any)


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
    """Finds where a data set's own files are looked for, and what says so: `root`, else `$IMAML_DATA_ROOT`, else the
    cache."""
    if root is not None:
        return Path(root).expanduser(), "root"
    if given := os.environ.get("IMAML_DATA_ROOT"):
        return Path(given).expanduser(), "IMAML_DATA_ROOT"
    return cache, "the cache"


def not_found(what: str, holds: str, where: Path, origin: str, *, download: bool) -> DataError:
    """Says where a data set was looked for; `holds`: what would have been one, and whether it can be downloaded."""
    state = f"holds neither {holds}" if where.is_dir() else "is not a folder"
    way = ", or pass download=True to fetch it through torchvision" if download else ""
    return DataError(
        f"{what} was not found: {origin} {where} {state}; "
        f"give the folder that has it as root or in IMAML_DATA_ROOT{way}"
    )


def cached_arrays(
    path: Path, expected: Expected, make: Callable[[], Mapping[str, np.ndarray]]
) -> Mapping[str, np.ndarray]:
    """Reads the arrays of a cache file; where it is missing or damaged, they are made and saved.

    Raises:
        DataError: the cache cannot be written, or as `make` does.
    """
    if path.is_file():
        try:
            return load_arrays(path, expected)
        except DataError:
            path.unlink(missing_ok=True)  # damaged; it holds nothing that is not made again below
    arrays = make()
    save_arrays(path, arrays)
    return arrays


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a compressed .npz: a reader sees the whole file or none.

    Raises:
        DataError: the file cannot be written.
    """
    content = io.BytesIO()
    np.savez_compressed(content, **dict(arrays))  # type: ignore[arg-type]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, content.getvalue())
    except (OSError, WriteError) as error:
        cause = error.__cause__ if isinstance(error, WriteError) else error
        raise DataError(
            f"the data cache {path} could not be written ({getattr(cause, 'strerror', None) or cause}); "
            "set IMAML_CACHE to a folder with space that you may write to"
        ) from error


def load_arrays(path: Path, expected: Expected) -> dict[str, np.ndarray]:
    """Reads the named arrays of an .npz, and checks them.

    Raises:
        DataError: the file is missing or truncated, or an array is absent or of another dtype or shape.
    """
    arrays: dict[str, np.ndarray] = {}
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError(f"{path} is not an .npz archive; download or create it again")
        with archive:
            for name, (dtype, shape) in expected.items():
                if name not in archive.files:
                    raise DataError(f"{path} has no array '{name}' (it holds {', '.join(archive.files) or 'nothing'})")
                array = archive[name]
                right_type = array.dtype.kind == dtype if len(dtype) == 1 else array.dtype == np.dtype(dtype)
                right_shape = array.ndim == len(shape) and all(
                    want is None or want == got for want, got in zip(shape, array.shape, strict=True)
                )
                if not (right_type and right_shape):
                    wanted = ", ".join("any" if n is None else str(n) for n in shape)
                    raise DataError(
                        f"{path}: array '{name}' must be {_KINDS.get(dtype, dtype)} ({wanted}), "
                        f"got {array.dtype} {array.shape}"
                    )
                arrays[name] = array
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise DataError(
            f"{path} is damaged or not an .npz archive ({error or type(error).__name__}); download or create it again"
        ) from error
    return arrays


_KINDS = {"u": "an unsigned integer", "U": "text"}
