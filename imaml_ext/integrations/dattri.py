"""dattri 0.3.0: inverse-Hessian-vector products by conjugate gradients, all test points in one solve.

`ihvp_cg` and `ihvp_at_x_cg` have the arguments of dattri's own. Its attributors look theirs up by name, so

    with installed():  # the one line that changes
        score = attributor.attribute(train_loader, test_loader)

lets `IFAttributorCG` and everything else that calls `dattri.func.hessian.ihvp_cg` use these.
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
from imaml_ext.solvers.linear import Solution

OnSolve = Callable[[Solution], object]


def ihvp_cg(
    func: Callable[..., Tensor],
    argnums: int = 0,
    max_iter: int = 10,
    tol: float = 1e-7,
    mode: str = "rev-rev",
    regularization: float = 0.0,
    *,
    on_solve: OnSolve | None = None,
    on_breakdown: Reaction = "raise",
) -> Callable[[tuple[Tensor, ...], Tensor], Tensor]:
    """A function (x, v) -> (H + regularization I)⁻¹ v with the Hessian H of `func` at x; see `ihvp_at_x_cg`."""

    of_system: dict[str, Any] = {"argnums": argnums, "mode": mode, "regularization": regularization}
    of_solve: dict[str, Any] = {"max_iter": max_iter, "tol": tol, "on_solve": on_solve, "on_breakdown": on_breakdown}
    return lambda x, v: ihvp_at_x_cg(func, *x, **of_system, **of_solve)(v)


def ihvp_at_x_cg(
    func: Callable[..., Tensor],
    *x: Tensor,
    argnums: int = 0,
    max_iter: int = 10,
    tol: float = 1e-7,
    mode: str = "rev-rev",
    regularization: float = 0.0,
    on_solve: OnSolve | None = None,
    on_breakdown: Reaction = "raise",
) -> Callable[[Tensor], Tensor]:
    """A function v -> (H + regularization I)⁻¹ v, v [N] or [K, N] -> [K, N], with the Hessian H of `func` at x.

    The solve begins at v, as dattri's does, and takes its steps; but each of the K rows ends on its own, once a product
    has measured ‖v − A x‖ ≤ tol. dattri's own solver takes all of `max_iter` steps, and a row that has converged before
    them turns into NaN.

    Args:
        func: of the tensors x, a scalar. argnums: of which argument the Hessian is taken, a tensor [N].
        max_iter: the largest number of products after the first, which measures the residual of v.
        tol: the residual norm at which a row ends, absolute. A row that ends above it is no failure.
        mode: of the product, "rev-rev" or "rev-fwd", as in dattri. regularization: what is added to the diagonal of H.
        on_solve: called with the `Solution` of every solve, whose status, iterations and residual_norm are [K].
        on_breakdown: "raise", "warn" or "ignore" where H + regularization I is not positive definite to working
            precision for a row, or a number is not finite; the row is then the last iterate.

    Raises:
        SolveError: when called, as `on_breakdown` says.
    """
    from dattri.func.hessian import hvp_at_x

    check_reactions(on_breakdown=on_breakdown)
    hvp = torch.func.vmap(hvp_at_x(func, x=x, argnums=argnums, mode=mode))

    def ihvp(v: Tensor) -> Tensor:
        b = torch.atleast_2d(v)  # [K, N]
        solution = cg(hvp, b, x0=b, shift=regularization, max_iterations=max_iter, rtol=0, atol=tol, check_every=1)
        report(solution, on_breakdown=on_breakdown, on_unfinished="ignore", what="rows of v")
        if on_solve is not None:
            on_solve(solution)
        return solution.x

    return ihvp


@contextmanager
def installed(on_solve: OnSolve | None = None, on_breakdown: Reaction = "raise") -> Iterator[None]:
    """Within it, dattri's `ihvp_cg` and `ihvp_at_x_cg` are these, for all that look them up, in all threads.

    Args:
        on_solve, on_breakdown: of every solve, as in `ihvp_at_x_cg`.
    """
    from dattri.func import hessian

    options: dict[str, Any] = {"on_solve": on_solve, "on_breakdown": on_breakdown}
    ours = (partial(function, **options) for function in (ihvp_cg, ihvp_at_x_cg))
    with replaced(dict(zip((hessian.ihvp_cg, hessian.ihvp_at_x_cg), ours, strict=True))):
        yield
