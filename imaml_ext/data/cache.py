"""Where prepared data is kept, and how files get there: whole or not at all."""

from __future__ import annotations

import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from imaml_ext.errors import DataError


def default_cache_dir() -> Path:
    """``$IMAML_CACHE``, else ``$XDG_CACHE_HOME/imaml_ext``, else ``~/.cache/imaml_ext``."""
    if os.environ.get("IMAML_CACHE"):
        return Path(os.environ["IMAML_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "imaml_ext"


def cache_folder(cache_dir: Path | str | None) -> Path:
    """``cache_dir``, or the default."""
    return Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()


def data_folder(root: Path | str | None, cache: Path) -> tuple[Path, str]:
    """Where a data set's own files are looked for, and what says so: ``root``, else ``$IMAML_DATA_ROOT``, else the
    cache."""
    if root is not None:
        return Path(root).expanduser(), "root"
    if given := os.environ.get("IMAML_DATA_ROOT"):
        return Path(given).expanduser(), "IMAML_DATA_ROOT"
    return cache, "the cache"


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a compressed .npz under a temporary name and rename it: a reader sees the whole file or none.

    Raises DataError where the folder cannot be written.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".part")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, **dict(arrays))  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(
            f"the data cache {path} could not be written ({error.strerror or error}); "
            "set IMAML_CACHE to a folder with space that you may write to"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def load_arrays(path: Path, expected: Mapping[str, tuple[str, tuple[int | None, ...]]]) -> dict[str, np.ndarray]:
    """The named arrays of an .npz, checked: ``expected`` maps a name to (dtype kind or name, shape with None = any).

    Raises DataError where the file is missing, truncated, or an array is absent or of another dtype or shape.
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
