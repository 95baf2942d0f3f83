"""curvlinops 3.0.1: the inverse of a linear operator by conjugate gradients, each column to its own tolerance.

from imaml_ext.integrations.curvlinops import CGInverseLinearOperator  # the one line that changes
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from imaml_ext.integrations.outcome import Reaction, check_reactions, report
from imaml_ext.solvers.cg import cg
from imaml_ext.solvers.linear import Solution
from imaml_ext.solvers.operators import multi_rhs

if TYPE_CHECKING:
    from curvlinops._torch_base import PyTorchLinearOperator

    CGInverseLinearOperator: Any

__all__ = ["CGInverseLinearOperator"]


@cache
def _operator_class() -> type:
    """The class, made when it is first asked for, because it inherits from one of the library's."""
    from curvlinops.inverse import _InversePyTorchLinearOperator

    class CGInverseLinearOperator(_InversePyTorchLinearOperator):
        """A⁻¹ of a symmetric positive definite linear operator A, by conjugate gradients.

        `@` takes what A takes: a vector [N], a matrix [N, K], or a list of tensors, one per parameter, with or without
        a last dimension K. K columns are K right-hand sides of one solve, and a product of all of them is one call of
        A. A column stops on its own residual, where the library's own class stops on the mean of all.

        Args:
            A: the operator.
            tolerance: of ‖b − A x‖ / ‖b‖, for each column b. None asks for `stop_updating_after`, and a column that
                ends above it after `max_iter` products is no failure.
            stop_updating_after: relative residual at which a column ends, whatever `tolerance` is.
            max_iter: largest number of products of a column, that which measures its residual included.
            initial_guess: X₀ of the shape of all columns, [N] or [N, K].
            preconditioner: M ≈ A⁻¹, a function R [N, K] -> M R or a linear operator.
            on_breakdown: "raise", "warn" or "ignore" where A is not positive definite to working precision for a
                column, or a number is not finite.
            on_unfinished: the same, where a column ends above a tolerance that was asked for.
            eps, max_tridiag_iter: taken as the library's class takes them, and without effect: the quotients of this
                solver are safe at every scale, and an inverse needs no tridiagonal matrix.

        Attributes:
            solution: the `Solution` of the last product; None before. Its x is [N, K], and its status, iterations and
                residual_norm are [K], one per column.

        Raises:
            SolveError: in a product, as `on_breakdown` and `on_unfinished` say.
        """

        SELF_ADJOINT = True

        def __init__(
            self,
            A: PyTorchLinearOperator,
            *,
            tolerance: float | None = None,
            eps: float = 1e-10,
            stop_updating_after: float = 1e-10,
            max_iter: int = 1000,
            max_tridiag_iter: int | None = None,
            initial_guess: Tensor | None = None,
            preconditioner: PyTorchLinearOperator | Callable[[Tensor], Tensor] | None = None,
            on_breakdown: Reaction = "raise",
            on_unfinished: Reaction = "warn",
        ) -> None:
            super().__init__(A)
            check_reactions(on_breakdown=on_breakdown, on_unfinished=on_unfinished)
            self.solution: Solution | None = None
            self._initial_guess = initial_guess
            self._on_breakdown = on_breakdown
            self._on_unfinished: Reaction = "ignore" if tolerance is None else on_unfinished
            M = preconditioner
            self._options: dict[str, Any] = {
                "rtol": max(tolerance or 0.0, stop_updating_after),
                "max_iterations": max_iter,
                "preconditioner": multi_rhs(lambda r: M(r[0]).unsqueeze(0)) if callable(M) else M,
            }

        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            b = torch.cat([x.flatten(end_dim=-2) for x in X])  # [N, K]
            x0 = None if self._initial_guess is None else self._initial_guess.reshape(1, *b.shape)
            found = cg(self._A, b.unsqueeze(0), x0=x0, check_every=1, **self._options)
            self.solution = Solution(**{name: getattr(found, name)[0] for name in _FIELDS})
            report(self.solution, on_breakdown=self._on_breakdown, on_unfinished=self._on_unfinished, what="columns")
            parts = self.solution.x.split(self._out_shape_flat)
            return [part.reshape(*shape, -1) for part, shape in zip(parts, self._out_shape, strict=True)]

    return CGInverseLinearOperator


_FIELDS = ("x", "status", "iterations", "residual_norm")

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in __all__:
            return _operator_class()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
