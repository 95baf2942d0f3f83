"""Solutions of inner problems as differentiable functions of all that the problems depend on."""

import torch

from imaml_ext.bilevel.argmin import argmin
from imaml_ext.bilevel.implicit import ImplicitSolution, implicit_solve
from imaml_ext.bilevel.prox_solve import prox_solve
from imaml_ext.bilevel.root import root

__all__ = ["ImplicitSolution", "argmin", "implicit_solve", "prox_solve", "root"]

torch.serialization.add_safe_globals([ImplicitSolution])
