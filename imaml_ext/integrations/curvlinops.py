"""curvlinops 3.0.1: the inverse of a linear operator by conjugate gradients, each column to its own tolerance.

from imaml_ext.integrations.curvlinops import CGInverseLinearOperator  # the one line that changes

With `linearize=True` the network is linearised once for all products of a solve, where the library's operators
evaluate it twice in every product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from imaml_ext.integrations.outcome import Reaction, check_reactions, report
from imaml_ext.losses.curvature import CurvatureOperator, GaussNewtonOperator, HessianOperator
from imaml_ext.solvers.cg import cg
from imaml_ext.solvers.linear import Solution
from imaml_ext.solvers.operators import multi_rhs

if TYPE_CHECKING:
    from curvlinops._torch_base import CurvatureLinearOperator, PyTorchLinearOperator

    CGInverseLinearOperator: Any

__all__ = ["CGInverseLinearOperator"]
Product = Callable[[Tensor], Tensor]  # V [N, K] -> A V


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
            linearize: each product with the inverse first evaluates the network on all data, keeps the graphs until it
                is done, and multiplies by these. It takes less time and more memory. A must be made of sums and
                multiples, at least one `GGNLinearOperator` or `HessianLinearOperator` (of one block) among them.
            on_breakdown: "raise", "warn" or "ignore" where A is not positive definite to working precision for a
                column, or a number is not finite.
            on_unfinished: the same, where a column ends above a tolerance that was asked for.
            eps, max_tridiag_iter: taken as the library's class takes them, and without effect: the quotients of this
                solver are safe at every scale, and an inverse needs no tridiagonal matrix.

        Attributes:
            solution: the `Solution` of the last product; None before. Its x is [N, K], and its status, iterations and
                residual_norm are [K], one per column.

        Raises:
            ValueError: linearize, and A has nothing that could be.
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
            linearize: bool = False,
            on_breakdown: Reaction = "raise",
            on_unfinished: Reaction = "warn",
        ) -> None:
            super().__init__(A)
            check_reactions(on_breakdown=on_breakdown, on_unfinished=on_unfinished)
            if linearize:
                _check_can_be_linearized(A)
            self.solution: Solution | None = None
            self._linearize = linearize
            self._initial_guess, self._on_breakdown = initial_guess, on_breakdown
            self._on_unfinished: Reaction = "ignore" if tolerance is None else on_unfinished
            M = preconditioner
            self._options: dict[str, Any] = {
                "rtol": max(tolerance or 0.0, stop_updating_after),
                "max_iterations": max_iter,
                "preconditioner": _of_one_system(M) if callable(M) else M,
            }

        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            b = torch.cat([x.flatten(end_dim=-2) for x in X])  # [N, K]
            x0 = None if self._initial_guess is None else self._initial_guess.reshape(1, *b.shape)
            A = _of_one_system(_linearized(self._A) if self._linearize else self._A.__matmul__)
            found = cg(A, b.unsqueeze(0), x0=x0, check_every=1, **self._options)
            self.solution = Solution(**{name: getattr(found, name)[0] for name in _FIELDS})
            report(self.solution, on_breakdown=self._on_breakdown, on_unfinished=self._on_unfinished, what="columns")
            parts = self.solution.x.split(self._out_shape_flat)
            return [part.reshape(*shape, -1) for part, shape in zip(parts, self._out_shape, strict=True)]

    return CGInverseLinearOperator


_FIELDS = ("x", "status", "iterations", "residual_norm")


def _of_one_system(product: Product) -> Product:
    """V [1, N, K] -> A V."""
    return multi_rhs(lambda p: product(p.squeeze(0)).unsqueeze(0))


def _check_can_be_linearized(A: PyTorchLinearOperator) -> None:
    if not _can_be_linearized(A):
        raise ValueError(
            "linearize must be False where A has no GGNLinearOperator or HessianLinearOperator of one block among its "
            f"sums and multiples, got {type(A).__name__}"
        )


def _can_be_linearized(A: PyTorchLinearOperator) -> bool:
    from curvlinops import GGNLinearOperator, HessianLinearOperator
    from curvlinops._torch_base import _ScalePyTorchLinearOperator, _SumPyTorchLinearOperator

    if type(A) is _SumPyTorchLinearOperator:
        return _can_be_linearized(A._A) or _can_be_linearized(A._B)
    if type(A) is _ScalePyTorchLinearOperator:
        return _can_be_linearized(A._A)
    return type(A) in (GGNLinearOperator, HessianLinearOperator) and len(A._block_sizes) == 1


def _linearized(A: PyTorchLinearOperator) -> Product:
    """The product of A, whose curvature matrices are linearised at the parameters that they have now."""
    from curvlinops._torch_base import _ScalePyTorchLinearOperator, _SumPyTorchLinearOperator

    if not _can_be_linearized(A):
        return A.__matmul__
    if type(A) is _SumPyTorchLinearOperator:
        left, right = _linearized(A._A), _linearized(A._B)
        return lambda V: left(V) + right(V)
    if type(A) is _ScalePyTorchLinearOperator:
        scaled, scalar = _linearized(A._A), A._scalar
        return lambda V: scaled(V) * scalar
    batches = _linearized_batches(A)

    def product(V: Tensor) -> Tensor:
        rows, total = V.mT.unsqueeze(1), torch.zeros_like(V)  # [K, 1, N]
        for weight, B in batches:
            part = torch.vmap(B)(rows) if len(rows) > 1 else B(rows[0]).unsqueeze(0)
            total.add_(part.squeeze(1).mT, alpha=weight)
        return total

    return product


def _linearized_batches(A: CurvatureLinearOperator) -> list[tuple[float, CurvatureOperator]]:
    """Every batch of the data of A: its weight, and its matrix [1, N] -> [1, N]."""
    from curvlinops import GGNLinearOperator
    from curvlinops.utils import make_functional_model_and_loss

    model, loss = make_functional_model_and_loss(A._model_func, A._loss_func, tuple(A._params))
    phi = torch.cat([p.detach().flatten() for p in A._params]).unsqueeze(0)  # [1, N]

    def batch(X: Any, y: Tensor) -> CurvatureOperator:
        def outputs(phi: Tensor) -> Tensor:
            parts = phi.squeeze(0).split(A._in_shape_flat)
            return model(*(part.view(shape) for part, shape in zip(parts, A._in_shape, strict=True)), X).unsqueeze(0)

        def criterion(outputs: Tensor) -> Tensor:
            return loss(outputs.squeeze(0), y).reshape(1)

        if isinstance(A, GGNLinearOperator):
            return GaussNewtonOperator(outputs, criterion, phi)
        return HessianOperator(lambda phi, _: criterion(outputs(phi)), phi, None)

    return [(A._get_normalization_factor(X, y), batch(X, y)) for X, y in A._loop_over_data(desc="linearize")]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in __all__:
            return _operator_class()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
