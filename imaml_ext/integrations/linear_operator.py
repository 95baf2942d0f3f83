"""linear_operator 0.6.1 and GPyTorch: `linear_cg`, with a tolerance for each column and the tridiagonal matrices.

with installed():  # the one line that changes: around training and prediction
    loss = -mll(model(train_x), train_y)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from imaml_ext.integrations.outcome import Reaction, check_reactions, report
from imaml_ext.integrations.replacing import replaced
from imaml_ext.solvers.cg import cg
from imaml_ext.solvers.linear import Lanczos, Solution
from imaml_ext.solvers.operators import multi_rhs

Product = Callable[[Tensor], Tensor]
_TOLERANCE = 0.01  # of gpytorch.settings.eval_cg_tolerance


def linear_cg(
    matmul_closure: Tensor | Product,
    rhs: Tensor,
    n_tridiag: int = 0,
    tolerance: float | None = None,
    eps: float = 1e-10,
    stop_updating_after: float = 1e-10,
    max_iter: int | None = None,
    max_tridiag_iter: int | None = None,
    initial_guess: Tensor | None = None,
    preconditioner: Product | None = None,
    *,
    on_solve: Callable[[Solution], object] | None = None,
    on_breakdown: Reaction = "raise",
) -> Tensor | tuple[Tensor, Tensor]:
    """Solves A X = rhs for a batch of symmetric positive definite A, with the arguments and results of linear_operator.

    A column ends on its own residual. The library's own function stops all columns by the mean of their residuals,
    after at least eleven steps.

    Args:
        matmul_closure: A [*batch, N, N], or a function V [*batch, N, K] -> A V.
        rhs: [N], [N, K] or [*batch, N, K]; broadcast to the batch of A.
        n_tridiag: of how many leading columns to return the tridiagonal matrices.
        tolerance: of ‖b − A x‖ / ‖b‖ for each column b. None: linear_operator.settings.cg_tolerance, or 0.01 where that
            is 1 or more, as it is by default: x = 0 would meet it.
        stop_updating_after: relative residual at which a column ends, whatever `tolerance` is.
        max_iter: largest number of products of a column, that which measures its residual included. None:
            settings.max_cg_iterations; at most N with settings.terminate_cg_by_size.
        max_tridiag_iter: largest order of the tridiagonal matrices; None: settings.max_lanczos_quadrature_iterations.
        initial_guess: X₀. preconditioner: a function R [*batch, N, K] -> M R with M ≈ A⁻¹.
        eps: without effect: the quotients of this solver are safe at every scale.
        on_solve: called with the `Solution` of the solve, whose status, iterations and residual_norm are [B, K] for the
            B matrices of the batch.
        on_breakdown: "raise", "warn" or "ignore" where A is not positive definite to working precision for a column, or
            a number is not finite.

    Returns:
        X in the shape of rhs, broadcast. With n_tridiag > 0 also T [n_tridiag, *batch, m, m], Lanczos' matrices of A
        (with a preconditioner, of M^½ A M^½), where m is the largest number of steps of these columns. The matrix of a
        column that took fewer ends with rows of the identity, apart from the rest.

    Raises:
        SolveError: as `on_breakdown` says. A column above its tolerance gives linear_operator's NumericalWarning.
        RuntimeError: max_tridiag_iter is above max_iter.

    Source: Golub and Meurant, Matrices, moments and quadrature with applications (2010), section 4.1, for T.
    """
    from linear_operator import settings

    check_reactions(on_breakdown=on_breakdown)
    if tolerance is None:
        tolerance = settings.cg_tolerance.value()
        tolerance = tolerance if tolerance < 1 else _TOLERANCE
    if max_iter is None:
        max_iter = settings.max_cg_iterations.value()
    if max_tridiag_iter is None:
        max_tridiag_iter = settings.max_lanczos_quadrature_iterations.value()
    if n_tridiag and max_tridiag_iter > max_iter:
        raise RuntimeError(f"max_tridiag_iter must be at most max_iter, {max_iter}, got {max_tridiag_iter}")
    size = rhs.shape[-2] if rhs.dim() > 1 else len(rhs)
    x, lanczos = _solve(
        matmul_closure.matmul if isinstance(matmul_closure, Tensor) else matmul_closure,
        rhs if rhs.dim() > 1 else rhs.unsqueeze(-1),
        initial_guess.unsqueeze(-1) if initial_guess is not None and initial_guess.dim() == 1 else initial_guess,
        preconditioner,
        on_solve,
        on_breakdown,
        rtol=max(tolerance, stop_updating_after),
        max_iterations=min(max_iter, size) if settings.terminate_cg_by_size.on() else max_iter,
        check_every=1,
        lanczos=n_tridiag > 0,
    )
    found = x if rhs.dim() > 1 else x.squeeze(-1)
    if lanczos is None:
        return found
    T = _tridiagonal(lanczos, n_tridiag, min(max_tridiag_iter, size)).to(x.dtype)  # [B, n_tridiag, m, m]
    return found, T.transpose(0, 1).reshape(n_tridiag, *x.shape[:-2], *T.shape[-2:])


def _solve(
    matmul: Product,
    rhs: Tensor,
    guess: Tensor | None,
    preconditioner: Product | None,
    on_solve: Callable[[Solution], object] | None,
    on_breakdown: Reaction,
    **options: Any,
) -> tuple[Tensor, Lanczos | None]:
    """X [*batch, N, K] and the coefficients of its columns [B, K, …], for rhs and a guess [(*batch,) N, K]."""
    from linear_operator.utils.warnings import NumericalWarning

    if guess is not None:
        rhs, guess = torch.broadcast_tensors(rhs, guess)
    known = [matmul(rhs if guess is None else guess)]  # says what the batch is, and is the first product of the solve
    shape = known[0].shape
    if guess is None and preconditioner is not None:
        known.clear()
    flat = (-1, *shape[-2:])  # [B, N, K]

    @multi_rhs
    def product(p: Tensor) -> Tensor:
        return (known.pop() if known else matmul(p.reshape(shape))).reshape(p.shape)

    solution = cg(
        product,
        rhs.expand(shape).reshape(flat),
        x0=None if guess is None else guess.expand(shape).reshape(flat),
        preconditioner=preconditioner and multi_rhs(lambda r: preconditioner(r.reshape(shape)).reshape(r.shape)),
        **options,
    )
    if on_solve is not None:
        on_solve(solution)
    report(solution, on_breakdown=on_breakdown, on_unfinished="warn", what="columns", unfinished_as=NumericalWarning)
    return solution.x.reshape(shape), solution.lanczos


def _tridiagonal(lanczos: Lanczos, columns: int, largest: int) -> Tensor:
    """The matrices of the leading columns, of order at most `largest`: [B, columns, m, m]."""
    steps = lanczos.steps[:, :columns]
    order = min(max(int(steps.max()), 1), largest)
    known = torch.arange(order, device=steps.device) < steps.unsqueeze(-1)
    diagonal = lanczos.diagonal[:, :columns, :order].where(known, 1.0)
    beside = lanczos.off_diagonal[:, :columns, : order - 1]
    T = torch.diag_embed(diagonal)
    for side in (1, -1):
        T.diagonal(side, -2, -1).copy_(beside)
    return T


@contextmanager
def installed(
    tolerance: float | None = None,
    on_solve: Callable[[Solution], object] | None = None,
    on_breakdown: Reaction = "raise",
) -> Iterator[None]:
    """Within it, linear_operator's `linear_cg` is this one, for all that have imported it, in all threads.

    linear_operator and GPyTorch call it for matrices of more than `settings.max_cholesky_size` (800) rows.

    Args:
        tolerance: of every solve whose caller gives none; None: as in `linear_cg`.
        on_solve, on_breakdown: of every solve, as in `linear_cg`.
    """
    import linear_operator.utils as library

    options: dict[str, Any] = {"tolerance": tolerance, "on_solve": on_solve, "on_breakdown": on_breakdown}
    with replaced({library.linear_cg: partial(linear_cg, **options)}):
        yield
