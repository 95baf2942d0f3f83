"""Other people's libraries, for the tests of `imaml_ext.integrations`."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest


def library(name: str) -> ModuleType:
    """The module `name`; skips the tests that ask where it is missing, unless IMAML_INTEGRATIONS=1 demands it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if os.environ.get("IMAML_INTEGRATIONS") == "1":
            raise
        pytest.skip(f"{name} is not installed: {error}", allow_module_level=True)
