"""Preconditioners that are made from products with the matrix, or from a model's layers; one class per file."""

from imaml_ext.solvers.preconditioners.jacobi import Jacobi
from imaml_ext.solvers.preconditioners.kfac import KFAC, KroneckerBlock, KroneckerFactors
from imaml_ext.solvers.preconditioners.nystrom import Nystrom
from imaml_ext.solvers.preconditioners.preconditioner import MadePreconditioner, Preconditioner
from imaml_ext.solvers.preconditioners.refreshed import Refreshed

__all__ = [
    "KFAC",
    "Jacobi",
    "KroneckerBlock",
    "KroneckerFactors",
    "MadePreconditioner",
    "Nystrom",
    "Preconditioner",
    "Refreshed",
]
