"""Linear solvers over Hessian-vector products, one system per row."""

from imaml_ext.solvers.cg import CG, cg
from imaml_ext.solvers.linear import LinearSolver, Solution, SolveStatus
from imaml_ext.solvers.stationary import FixedPoint, Neumann

__all__ = ["CG", "FixedPoint", "LinearSolver", "Neumann", "Solution", "SolveStatus", "cg"]
