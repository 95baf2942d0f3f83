"""imaml_ext: batched conjugate gradients over Hessian-vector products, and meta-learning with implicit gradients."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from imaml_ext._version import __version__

if TYPE_CHECKING:
    from imaml_ext.errors import NativeUnavailableError, SolveError
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
    "TaskLoss",
    "__version__",
    "cg",
    "from_module",
    "prox_solve",
]

# Where each public name lives; loaded when first used, so that `imaml --help` does not wait for torch.
_HOMES = {
    "SolveError": "errors",
    "Solution": "solvers",
    "SolveStatus": "solvers",
    "CG": "solvers",
    "Conv4": "models",
    "FOMAML": "meta",
    "GradientDescent": "inner",
    "NewtonCG": "inner",
    "IMAML": "meta",
    "MAML": "meta",
    "MLP": "models",
    "NativeUnavailableError": "errors",
    "Reptile": "meta",
    "TaskLoss": "losses",
    "cg": "solvers",
    "from_module": "models",
    "prox_solve": "meta",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
