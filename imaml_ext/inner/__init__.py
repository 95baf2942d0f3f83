"""The inner problem, argmin_φ L(φ) + ½ Σ λ (φ − θ)², and its solvers."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from imaml_ext._renamed import old_names
from imaml_ext.inner.gradient_descent import GradientDescent
from imaml_ext.inner.newton_cg import NewtonCG, NewtonResult
from imaml_ext.inner.solver import InnerResult, InnerSolver, Moments
from imaml_ext.losses.loss import Loss, LossFunction

__all__ = [
    "GradientDescent",
    "InnerResult",
    "InnerSolver",
    "Moments",
    "NewtonCG",
    "NewtonResult",
    "gradient_descent",
    "newton_cg",
]
torch.serialization.add_safe_globals([InnerResult, Moments, NewtonResult])

_OF_A_SOLVE = ("lam", "num_tasks", "measure")


def _solved(kind: type[InnerSolver], loss: Loss | LossFunction, theta: Tensor, data: Any, options: dict) -> Any:
    solve = {name: options.pop(name) for name in _OF_A_SOLVE if name in options}
    return kind(**options).solve(loss, theta, data, **solve)


def gradient_descent(loss: Loss | LossFunction, theta: Tensor, data: Any, **options: Any) -> InnerResult:
    """Returns `GradientDescent(…).solve(loss, theta, data, …)`; options are the settings, and those of `solve`."""
    return _solved(GradientDescent, loss, theta, data, options)


def newton_cg(loss: Loss | LossFunction, theta: Tensor, data: Any, **options: Any) -> NewtonResult:
    """Returns `NewtonCG(…).solve(loss, theta, data, …)`; options are the settings, and those of `solve`."""
    return _solved(NewtonCG, loss, theta, data, options)


if not TYPE_CHECKING:  # a type checker would believe that every name exists
    __getattr__ = old_names(__name__, {"HessianFree": "imaml_ext.inner.NewtonCG"})
