"""Pickles that hold arrays and plain containers, read without running anything that they name."""

from __future__ import annotations

import collections
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from imaml_ext.errors import DataError


def load_pickle(path: Path, *keys: str) -> dict[str, Any]:
    """Reads the dictionary in a pickle file of Python 2 or 3, with keys as text; it has `keys`, perhaps others.

    A pickle may name any function to be called. Only what makes arrays, numbers, text and plain containers is admitted.

    Raises:
        DataError: the file is missing or damaged, names anything else, or holds no such dictionary.
    """
    content = _load(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold a dictionary, got {type(content).__name__}")
    named = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()}
    for key in keys:
        if key not in named:
            raise DataError(f"{path} has no entry '{key}' (it holds {', '.join(map(str, named)) or 'nothing'})")
    return named


def load_pickled_list(path: Path) -> list[Any]:
    """Reads the list in a pickle file; otherwise as `load_pickle`."""
    content = _load(path)
    if not isinstance(content, list | tuple | np.ndarray):
        raise DataError(f"{path} must hold a list, got {type(content).__name__}")
    return list(content)


def _load(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _ArraysOnly(file, encoding="latin1").load()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged pickle raises errors of many kinds
        reason = error or type(error).__name__
        wanted = f"damaged or not a pickle of arrays ({reason})"
        raise DataError(f"{path} is {wanted}; download or create it again") from error


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # NumPy 2 renamed numpy.core; a file names whichever there was when it was written.
        known = (module.replace("numpy._core", "numpy.core"), name)
        if known not in _ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is neither an array nor a plain container")
        return _ADMITTED[known]


def _encode(text: str, encoding: str) -> bytes:
    """Makes bytes as Python 3 writes them into a pickle of protocol 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes bytes as {encoding!r}")
    return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np.zeros(1).__reduce__()[0],  # type: ignore[dict-item]
    ("numpy.core.multiarray", "scalar"): np.float64(0).__reduce__()[0],  # type: ignore[dict-item]
    ("numpy.core.numeric", "_frombuffer"): np.zeros(1).__reduce_ex__(5)[0],  # type: ignore[dict-item]
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _encode,
}
