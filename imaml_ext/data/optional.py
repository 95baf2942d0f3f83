"""Packages that a data set needs and the others do without."""

from __future__ import annotations

import importlib
from typing import Any

from imaml_ext.errors import DataError


def optional(module: str, *, extra: str, what: str) -> Any:
    """Imports a module; where it is missing, the DataError says which files need it and how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        how = f"pip install {package}, or install imaml_ext with its extra {extra!r}"
        raise DataError(f"{what} is read with {package}, which cannot be imported here ({error}): {how}") from error
