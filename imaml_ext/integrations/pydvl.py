"""pyDVL 0.10.0: influence functions by conjugate gradients, all right-hand sides in one solve.

from imaml_ext.integrations.pydvl import CgInfluence  # the one line that changes
"""

from __future__ import annotations

import copy
import logging
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import Parameter
from torch.utils.data import DataLoader

from imaml_ext.integrations.outcome import Reaction, report
from imaml_ext.solvers.cg import cg
from imaml_ext.solvers.linear import Solution

if TYPE_CHECKING:
    CgInfluence: Any
    CgOperator: Any

__all__ = ["CgInfluence", "CgOperator"]

_log = logging.getLogger(__name__)


@cache
def _operator_class() -> type:
    """`CgOperator`, made when it is first asked for, because it inherits from a class of the library."""
    from pydvl.influence.torch import operator

    class CgOperator(operator.CgOperator):
        """(A + regularization I)⁻¹ of a symmetric positive definite operator A, by conjugate gradients.

        The arguments are those of the library's class of this name. A matrix [K, N] is K right-hand sides of one solve,
        whatever `use_block_cg` is, and `progress` shows nothing. A row ends once a product has measured its residual to
        be within max(rtol ‖b‖, atol) for its own b; the library's own class squares both tolerances, and takes the norm
        of b over the rows. `maxiter` is the largest number of products with one row, 10 N where it is None.

        Attributes:
            solution: the `Solution` of the last product; None before. Its x is [K, N]; its status, iterations and
                residual_norm are [K].

            on_breakdown: "raise", "warn" or "ignore" where A + regularization I is not positive definite to working
                precision for a row, or a number is not finite; the row is then the last iterate.

        Raises:
            SolveError: in a product, as `on_breakdown` says. A row above its tolerance gives a `SolveWarning`, or a
                message at level DEBUG where `warn_on_max_iteration` is False.
        """

        solution: Solution | None = None
        on_breakdown: Reaction = "raise"

        def _apply_to_mat(self, mat: Tensor) -> Tensor:
            preconditioner = self.preconditioner
            self.solution = cg(
                self.operator.apply,
                mat,
                shift=self.regularization or 0.0,
                max_iterations=10 * self.input_size if self.maxiter is None else self.maxiter,
                rtol=self.rtol,
                atol=self.atol,
                preconditioner=None if preconditioner is None else lambda r: preconditioner.solve(r.T).T,
                check_every=1,
            )
            on_unfinished: Reaction = "warn" if self.warn_on_max_iteration else "ignore"
            report(self.solution, on_breakdown=self.on_breakdown, on_unfinished=on_unfinished, what="right-hand sides")
            if not self.warn_on_max_iteration:
                _log.debug("status of the right-hand sides: %s", self.solution.status.tolist())
            return self.solution.x

        def _apply_to_vec(self, vec: Tensor) -> Tensor:
            return self._apply_to_mat(vec.unsqueeze(0)).squeeze(0)

    return CgOperator


@cache
def _influence_class() -> type:
    """`CgInfluence`, made likewise."""
    from pydvl.influence import torch as library
    from pydvl.influence.torch import base, operator, util

    class CgInfluence(library.CgInfluence):
        """Influence functions by a `CgOperator` of this module; the arguments are those of the library's class.

        A preconditioner is fitted and used. The library's own class loses it, as its `fit` returns None.

        Attributes:
            on_breakdown: of the operators that `fit` makes.
        """

        on_breakdown: Reaction = "raise"

        def _create_block(
            self, block_params: dict[str, Parameter], data: DataLoader, regularization: float | None
        ) -> base.TorchOperatorGradientComposition:
            gauss_newton = self.second_order_mode is util.SecondOrderMode.GAUSS_NEWTON
            curvature = operator.GaussNewtonOperator if gauss_newton else operator.HessianOperator
            A = curvature(self.model, self.loss, data, restrict_to=block_params)
            preconditioner = copy.copy(self.preconditioner)
            if preconditioner is not None:
                preconditioner.fit(A, regularization)
            inverse = _operator_class()(
                A,
                regularization,
                rtol=self.rtol,
                atol=self.atol,
                maxiter=self.maxiter,
                preconditioner=preconditioner,
                warn_on_max_iteration=self.warn_on_max_iteration,
            )
            inverse.on_breakdown = self.on_breakdown
            gradients = base.TorchGradientProvider(self.model, self.loss, restrict_to=block_params)
            return base.TorchOperatorGradientComposition(inverse, gradients)

    return CgInfluence


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in __all__:
            return _operator_class() if name == "CgOperator" else _influence_class()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
