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


_OF_SOLVERS = (
    "cg_begin_",
    "cg_direction_",
    "cg_step_",
    "cg_shifts_step_",
    "lsqr_begin_",
    "lsqr_direction_",
    "lsqr_residual_",
)
for _name in (*_OF_SOLVERS, "minres_begin_", "minres_step_", "next_round_"):
    register_fake(_name)
