"""imaml_ext: batched conjugate gradients over Hessian-vector products, and meta-learning with implicit gradients."""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from imaml_ext._record import unfit_for_installed_torch
from imaml_ext._version import __version__

if TYPE_CHECKING:  # from the modules themselves: `imaml_ext.solvers.cg` is a module and a function
    from imaml_ext.bilevel.argmin import argmin
    from imaml_ext.bilevel.prox_solve import prox_solve
    from imaml_ext.bilevel.root import root
    from imaml_ext.errors import NativeUnavailableError, SolveError, SolveWarning
    from imaml_ext.inner import GradientDescent, NewtonCG
    from imaml_ext.losses import TaskLoss
    from imaml_ext.meta import FOMAML, IMAML, MAML, Reptile
    from imaml_ext.models import MLP, Conv4, from_module
    from imaml_ext.solvers import CG, MINRES, Solution, SolveStatus
    from imaml_ext.solvers.cg import cg
    from imaml_ext.solvers.differentiable import WarmStart, solve
    from imaml_ext.solvers.least_squares import lsqr
    from imaml_ext.solvers.minres import minres
    from imaml_ext.solvers.multi_shift import multi_shift_cg

__all__ = [
    "CG",
    "FOMAML",
    "IMAML",
    "MAML",
    "MINRES",
    "MLP",
    "Conv4",
    "GradientDescent",
    "NativeUnavailableError",
    "NewtonCG",
    "Reptile",
    "Solution",
    "SolveError",
    "SolveStatus",
    "SolveWarning",
    "TaskLoss",
    "WarmStart",
    "__version__",
    "argmin",
    "cg",
    "from_module",
    "lsqr",
    "minres",
    "multi_shift_cg",
    "prox_solve",
    "root",
    "solve",
]

_ROOMS = ("errors", "solvers", "models", "losses", "inner", "bilevel", "meta")  # each imports those before it


if not TYPE_CHECKING:  # a type checker would believe that every name exists

    def __getattr__(name: str) -> Any:
        """Finds a public name when it is first used, so that `imaml --help` does not wait for torch."""
        if name in __all__:
            for room in _ROOMS:
                module = importlib.import_module(f"{__name__}.{room}")
                if name in module.__dict__:
                    return getattr(module, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# An error only where the compiled part is used: `imaml doctor` and the torch engine work without it.
if reason := unfit_for_installed_torch():
    warnings.warn(reason, RuntimeWarning, stacklevel=2)
del reason
