"""Meta-gradients: what an outer optimiser needs to know of a batch of tasks."""

from imaml_ext.inner.curvature import (
    CurvatureOperator,
    GaussNewtonOperator,
    HessianOperator,
    gauss_newton_operator,
    hessian_operator,
)
from imaml_ext.meta.algorithm import MetaAlgorithm, MetaGradient
from imaml_ext.meta.first_order import FOMAML, Reptile
from imaml_ext.meta.imaml import IMAML
from imaml_ext.meta.implicit import ImplicitSolution, implicit_solve
from imaml_ext.meta.maml import MAML
from imaml_ext.meta.prox_solve import prox_solve
from imaml_ext.meta.regularisation import LearnableLam

__all__ = [
    "FOMAML",
    "IMAML",
    "MAML",
    "CurvatureOperator",
    "GaussNewtonOperator",
    "HessianOperator",
    "ImplicitSolution",
    "LearnableLam",
    "MetaAlgorithm",
    "MetaGradient",
    "Reptile",
    "gauss_newton_operator",
    "hessian_operator",
    "implicit_solve",
    "prox_solve",
]
