"""Linear solvers over Hessian-vector products, one system per row."""

from typing import TYPE_CHECKING, Any

from imaml_ext._renamed import old_names
from imaml_ext.solvers.cg import CG, cg
from imaml_ext.solvers.differentiable import WarmStart, solve
from imaml_ext.solvers.lanczos import ExtremeEigenvalues, TraceEstimate, extreme_eigenvalues, logdet, trace_of
from imaml_ext.solvers.least_squares import LeastSquaresSolution, lsqr
from imaml_ext.solvers.linear import Lanczos, LinearSolver, Solution, SolveStatus
from imaml_ext.solvers.minres import MINRES, minres
from imaml_ext.solvers.multi_shift import multi_shift_cg
from imaml_ext.solvers.operators import check_symmetry, multi_rhs
from imaml_ext.solvers.stationary import FixedPoint, Neumann

__all__ = [
    "CG",
    "MINRES",
    "ExtremeEigenvalues",
    "FixedPoint",
    "Lanczos",
    "LeastSquaresSolution",
    "LinearSolver",
    "Neumann",
    "Solution",
    "SolveStatus",
    "TraceEstimate",
    "WarmStart",
    "cg",
    "check_symmetry",
    "extreme_eigenvalues",
    "logdet",
    "lsqr",
    "minres",
    "multi_rhs",
    "multi_shift_cg",
    "solve",
    "trace_of",
]

_old = old_names(
    __name__,
    {
        "CGError": "imaml_ext.errors.SolveError",
        "CGResult": "imaml_ext.solvers.Solution",
        "CGStatus": "imaml_ext.solvers.SolveStatus",
    },
)

if not TYPE_CHECKING:  # a type checker would believe that every name exists

    def __getattr__(name: str) -> Any:
        """Any solver of `LinearSolver.kinds` by the name of its class, and old names."""
        for kind, path in LinearSolver.kinds.items():
            if path.endswith(f".{name}"):
                return LinearSolver.kind(kind)
        return _old(name)
