"""Meta-gradients: what an outer optimiser needs to know of a batch of tasks."""

from typing import TYPE_CHECKING

import torch

from imaml_ext._renamed import old_names
from imaml_ext.bilevel.implicit import ImplicitSolution, implicit_solve
from imaml_ext.bilevel.prox_solve import prox_solve
from imaml_ext.losses.curvature import CurvatureOperator, GaussNewtonOperator, HessianOperator
from imaml_ext.meta.algorithm import MetaAlgorithm, MetaGradient
from imaml_ext.meta.first_order import FOMAML, Reptile
from imaml_ext.meta.imaml import IMAML
from imaml_ext.meta.maml import MAML

__all__ = [
    "FOMAML",
    "IMAML",
    "MAML",
    "CurvatureOperator",
    "GaussNewtonOperator",
    "HessianOperator",
    "ImplicitSolution",
    "MetaAlgorithm",
    "MetaGradient",
    "Reptile",
    "implicit_solve",
    "prox_solve",
]

torch.serialization.add_safe_globals([ImplicitSolution, MetaGradient])

if not TYPE_CHECKING:  # a type checker would believe that every name exists
    __getattr__ = old_names(
        __name__,
        {
            "LearnableLam": 'imaml_ext._renamed.LearnableLam = the setting learn={"lam": "global"} of an algorithm',
            "gauss_newton_operator": (
                'imaml_ext._renamed.gauss_newton_operator = loss.linearize(phi, data, "gauss_newton")'
            ),
            "hessian_operator": "imaml_ext._renamed.hessian_operator = loss.linearize(phi, data)",
        },
    )
