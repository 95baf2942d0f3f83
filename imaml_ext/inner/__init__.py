"""The inner problem, argmin_φ L(φ) + ½ Σ λ (φ − θ)², and its solvers."""

from imaml_ext._renamed import old_names
from imaml_ext.inner.gradient_descent import GradientDescent, gradient_descent
from imaml_ext.inner.newton_cg import NewtonCG, NewtonResult, newton_cg
from imaml_ext.inner.solver import InnerResult, InnerSolver

__all__ = [
    "GradientDescent",
    "InnerResult",
    "InnerSolver",
    "NewtonCG",
    "NewtonResult",
    "gradient_descent",
    "newton_cg",
]

__getattr__ = old_names(__name__, {"HessianFree": "imaml_ext.inner.NewtonCG"})
