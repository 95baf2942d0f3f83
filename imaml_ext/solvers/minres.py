"""Batched MINRES: symmetric systems that may be indefinite, such as the Hessians early in a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import Tensor

from imaml_ext._native import native
from imaml_ext.ops import Coefficient
from imaml_ext.ops.calls import callback, eager
from imaml_ext.settings import COUNT, NOT_NEGATIVE
from imaml_ext.solvers import operators
from imaml_ext.solvers.cg import all_rows, check_blocks, loop_arguments
from imaml_ext.solvers.linear import Lanczos, LinearSolver, Operator, Solution, SolveStatus
from imaml_ext.solvers.operators import System


@dataclass(frozen=True)
class MINRES(LinearSolver):
    """The minimal residual method, for symmetric matrices of any definiteness; what it does, `minres` says."""

    breakdown: ClassVar[SolveStatus] = SolveStatus.SINGULAR

    # Largest number of products with the matrix, those that measure a residual included.
    max_iterations: Annotated[int, COUNT] = 5
    rtol: Annotated[float, NOT_NEGATIVE] = 1e-5  # Relative residual at which a task's solve stops.
    atol: Annotated[float, NOT_NEGATIVE] = 0.0  # Absolute residual at which a task's solve stops.
    # Iterations between two looks at whether all tasks are done; 0: never look, and never wait for the device.
    check_every: Annotated[int, NOT_NEGATIVE] = 0

    def solve_rows(self, operator: Operator, b: Tensor, *, shift: Coefficient, x0: Tensor | None) -> Solution:
        rows_per_block = getattr(operator, "rows_per_block", None)
        return minres(operator, b, shift=shift, x0=x0, rows_per_block=rows_per_block, **vars(self))


@eager
def minres(
    A: Any,
    b: Any,
    *,
    shift: Any = 0.0,
    x0: Any = None,
    max_iterations: int = 5,
    rtol: float | Tensor = 1e-5,
    atol: float | Tensor = 0.0,
    check_every: int = 0,
    rows_per_block: int | None = None,
    check_symmetry: bool = False,
    lanczos: bool = False,
) -> Solution:
    """Solves (A_b + diag(shift)) x_b = b_b for every row b by the minimal residual method, for any symmetric A.

    Each iterate has the least residual of its Krylov space: the residual never grows, and negative curvature is no
    breakdown. Rows are independent, as in `imaml_ext.cg`, and the loop is the same.

    A row is CONVERGED only when b − A x itself was measured to be within the tolerance, by one product. If rounding has
    driven it away from the recurrence, the row begins again from x; once two measurements were not a tenth smaller than
    one before it is STAGNATED, with the x of the least. A row is SINGULAR where the residual has become a null vector
    of A, ‖A r‖ ≤ ε^¾ ‖A‖ ‖r‖, and a measurement confirms it: x then solves the least-squares problem. Before a step to
    an x so long that rounding A x alone exceeds the residual by far, the row measures instead.

    Args:
        A, b, shift, x0, rtol, atol, check_every, rows_per_block, check_symmetry: as for `imaml_ext.cg`. The first
            vector that A is given is b / ‖b‖, or x0.
        max_iterations: the largest number of products, those that measure included, beside that of x0.
        lanczos: keep the coefficients of the Lanczos process until the row's first measurement, in `Solution.lanczos`
            with m = max_iterations. They are those of A for any A that is symmetric.

    Returns:
        A `Solution`. No autograd graph is recorded; `imaml_ext.solve` is the differentiable solve.

    Raises:
        TypeError, ValueError, NativeUnavailableError: as for `imaml_ext.cg`.

    Source: Paige and Saunders, Solution of sparse indefinite systems of linear equations (1975). Why a residual must be
    measured: Sleijpen, van der Vorst, Modersitzki, Differences in the effects of rounding errors in Krylov solvers
    for symmetric indefinite linear systems (2000).
    """
    system = System.read(A, b)
    check_blocks(rows_per_block, system)
    if check_symmetry:
        operators.check_symmetry(all_rows(A, b, rows_per_block), b)
    arguments = loop_arguments(
        "minres",
        system.operator,
        system.b,
        **system.options(shift, x0, rtol, atol),
        max_iterations=max_iterations,
        check_every=check_every,
        rows_per_block=rows_per_block,
    )
    hvp = callback(system.operator, "minres", "A", system.b)
    loop = native(system.b.device).minres
    x, status, iterations, norm, *kept = loop(hvp, system.b, lanczos=lanczos, **arguments)
    return system.solution(Solution(x, status, iterations, norm, Lanczos(*kept) if lanczos else None))
