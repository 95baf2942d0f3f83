"""Tells `torch.compile` what the native ops return; their implementations are in csrc/."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from imaml_ext._native import error as load_error


def register_fake(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorates the function that gives the op's outputs their shapes; does nothing without the compiled part."""
    return torch.library.register_fake(f"imaml_ext::{name}") if load_error is None else lambda function: function


def register_in_place(*names: str) -> None:
    """Registers ops that only write into their arguments."""
    for name in names:
        register_fake(name)(lambda *args, **kwargs: None)


register_in_place("cg_begin_", "cg_direction_", "cg_step_")  # called by the solver itself
