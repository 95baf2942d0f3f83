"""Tells `torch.compile` what the native ops return; their implementations are in csrc/."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from imaml_ext._native import error as load_error


def register_fake(name: str, fake: Callable[..., Any] = lambda *args, **kwargs: None) -> None:
    """Registers the function that gives an op's outputs their shapes, by default none; needs the compiled part."""
    if load_error is None:
        torch.library.register_fake(f"imaml_ext::{name}", fake)


_OF_SOLVERS = {
    "cg": ("begin", "direction", "step"),
    "lsqr": ("begin", "direction", "residual"),
    "minres": ("begin", "step"),
}
for _family, _steps in _OF_SOLVERS.items():  # called by the solvers themselves
    for _step in _steps:
        register_fake(f"{_family}_{_step}_")
