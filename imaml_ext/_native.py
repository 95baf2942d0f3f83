"""Loads the compiled part, or remembers why it did not load."""

from __future__ import annotations

from types import ModuleType

import torch  # noqa: F401  (its libraries must be loaded before the extension's)

from imaml_ext.errors import NativeUnavailableError

_C: ModuleType | None
error: ImportError | None

try:
    from imaml_ext import _C  # type: ignore[attr-defined,no-redef]

    error = None
except ImportError as reason:
    _C, error = None, reason


def native() -> ModuleType:
    """The compiled part.

    Raises:
        NativeUnavailableError: it did not load; says why and what to do.
    """
    if _C is None:
        raise NativeUnavailableError(
            f"the compiled part of imaml_ext does not load ({error}): build it against the installed torch with "
            "`pip install --no-build-isolation .`, then look at `imaml doctor`"
        ) from error
    return _C
