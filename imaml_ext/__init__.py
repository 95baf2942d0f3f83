"""imaml_ext: batched conjugate gradients over Hessian-vector products, and meta-learning with implicit gradients."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from imaml_ext._version import __version__

if TYPE_CHECKING:
    from imaml_ext.errors import NativeUnavailableError, SolveError, SolveWarning
    from imaml_ext.inner import GradientDescent, NewtonCG
    from imaml_ext.losses import TaskLoss
    from imaml_ext.meta import FOMAML, IMAML, MAML, Reptile, prox_solve  # type: ignore[no-redef]  # submodules have these names too
    from imaml_ext.models import MLP, Conv4, from_module
    from imaml_ext.solvers import CG, Solution, SolveStatus, cg  # type: ignore[no-redef]

__all__ = [
    "CG",
    "FOMAML",
    "IMAML",
    "MAML",
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
    "__version__",
    "cg",
    "from_module",
    "prox_solve",
]

_ROOMS = ("errors", "solvers", "models", "losses", "inner", "meta")  # each imports those before it


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
