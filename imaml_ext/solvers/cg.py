"""Batched conjugate gradients: (H_b + diag(shift)) x_b = b_b for every row b, H only through H p."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Annotated

import torch
from torch import Tensor

from imaml_ext._native import native
from imaml_ext.checks import check_int
from imaml_ext.ops import Coefficient, as_coefficient
from imaml_ext.ops.calls import callback, check_untransformed, eager, is_traced
from imaml_ext.settings import COUNT, NOT_NEGATIVE
from imaml_ext.solvers.linear import Lanczos, LinearSolver, Operator, Solution, check_system

BlockOperator = Callable[[Tensor, slice], Tensor]  # [k, N] and which rows of the batch they are -> [k, N], row by row


@dataclass(frozen=True)
class CG(LinearSolver):
    """Conjugate gradients, for symmetric positive definite matrices; what it does, `imaml_ext.cg` says."""

    max_iterations: Annotated[int, COUNT] = 5  # Largest number of products with the matrix.
    rtol: Annotated[float, NOT_NEGATIVE] = 1e-5  # Relative residual at which a task's solve stops.
    atol: Annotated[float, NOT_NEGATIVE] = 0.0  # Absolute residual at which a task's solve stops.
    # Iterations between two looks at whether all tasks are done; 0: never look, and never wait for the device.
    check_every: Annotated[int, NOT_NEGATIVE] = 0

    def solve(self, operator: Operator, b: Tensor, shift: Coefficient = 0.0) -> Solution:
        return cg(operator, b, shift=shift, rows_per_block=getattr(operator, "rows_per_block", None), **vars(self))


def _tolerance(value: float | Tensor, name: str, b: Tensor) -> Tensor:
    """A tolerance as a float64 tensor [1 or B]."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a number or a floating-point tensor, got {value.dtype}")
        if value.device != b.device:
            raise ValueError(f"{name} must be on {b.device}, got {value.device}")
        if value.dim() != 0 and value.shape != b.shape[:1]:
            raise ValueError(f"{name} must be a number or have shape [{b.shape[0]}], got {list(value.shape)}")
        return value.detach().to(torch.float64).reshape(-1).contiguous()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return torch.full((1,), float(value), dtype=torch.float64, device=b.device)


def check_arguments(
    hvp: Operator | BlockOperator,
    b: Tensor,
    x0: Tensor | None,
    preconditioner: Tensor | Operator | BlockOperator | None,
) -> None:
    """What `cg` and its oracle demand of their arguments beyond what the ops check."""
    check_system(hvp, b)
    if x0 is not None and not isinstance(x0, Tensor):
        raise TypeError(f"x0 must be a tensor, got {type(x0).__name__}")
    if preconditioner is not None and not isinstance(preconditioner, Tensor) and not callable(preconditioner):
        raise TypeError(f"preconditioner must be a tensor or callable, got {type(preconditioner).__name__}")


def _look_every(check_every: int) -> int:
    """The argument of that name, checked."""
    check_every = check_int("check_every", check_every, minimum=0)
    if check_every > 0 and is_traced():
        raise ValueError(
            f"check_every must be 0 where cg is traced, as a trace can look at no value, got {check_every}"
        )
    return check_every


@eager
def cg(
    hvp: Operator | BlockOperator,
    b: Tensor,
    *,
    shift: Coefficient = 0.0,
    x0: Tensor | None = None,
    max_iterations: int = 5,
    rtol: float | Tensor = 1e-5,
    atol: float | Tensor = 0.0,
    preconditioner: Tensor | Operator | BlockOperator | None = None,
    check_every: int = 0,
    rows_per_block: int | None = None,
    lanczos: bool = False,
) -> Solution:
    """Solves (H_b + diag(shift)) x_b = b_b for every row b by preconditioned conjugate gradients.

    Rows are independent: each has its own step lengths, tolerance, iteration count and status, and one that converges,
    breaks down or turns non-finite leaves the others' bits alone. The loop is C++; between two calls of `hvp` there is
    one fused op and no host synchronisation.

    A row is CONVERGED when b − A x has been measured, by one product, to be at most max(rtol ‖b‖, atol). It measures
    when the residual carried by recurrence is: the next p of that row is x itself. Where rounding has driven the two
    apart, the row goes on from the measured one. It is STAGNATED once four measurements were not a tenth smaller.

    A row is SINGULAR or has NEGATIVE_CURVATURE when pᵀAp > 0 does not stand out of rounding. On the first step from
    x = 0 it returns b / shift where the shift is positive (else 0). Later, a row of NEGATIVE_CURVATURE returns the
    iterate it had, and a SINGULAR one an iterate from before it ran off. A zero b gives x = 0 after no iterations.

    Args:
        hvp: called with p [B, N] (contiguous, not to be kept or written to: without x0 and preconditioner the first p
            is b itself), returns H p [B, N], row b of it from row b of p alone. What it raises comes out unchanged.
        b: [B, N], float32, float64, bfloat16 or float16.
        shift: λ + δ, a number, one per task [B], one per parameter [N], or [B, N].
        x0: [B, N], a warm start, at the price of one more call of `hvp`.
        max_iterations: the largest number of calls of `hvp` otherwise, that which measures included: a row that meets
            its tolerance with the last of them is MAX_ITERATIONS. To measure any x: `cg(…, x0=x, max_iterations=0)`.
        rtol, atol: numbers, or one per row [B].
        preconditioner: M ≈ A⁻¹, symmetric positive definite: its diagonal ([N] or [B, N]), or a callable r -> M r.
        check_every: k > 0 asks the device every k iterations whether all rows are done, to stop early; 0 never does,
            and calls `hvp` exactly max_iterations times (capturable in a CUDA graph).
        rows_per_block: k ≥ 1 solves k rows at a time, each block to its end before the next begins, so that their
            vectors stay in the cache where those of B rows would not; every row has the same bits. hvp and a callable
            preconditioner are then called with two arguments, p [k, N] (fewer rows in the last block) and the `slice`
            of the batch that these rows are; counts of calls are a block's. None: all rows together.
        lanczos: keep the coefficients of every row's Lanczos tridiagonal, `Lanczos` with m = max_iterations. Without
            rtol and atol no measurement cuts it short.

    Returns:
        A `Solution`. No autograd graph is recorded; for a differentiable solve see `imaml_ext.prox_solve`.

    Raises:
        TypeError, ValueError: an argument, or what a callback returned, of the wrong type, dtype, shape or device.
        NativeUnavailableError: the compiled part does not load, or has no code for the device of b.

    Source: Hestenes and Stiefel (1952); used so in Algorithm 2 of Rajeswaran et al., arXiv 1909.04630. Restarts from a
    measured residual: van der Vorst and Ye (2000).
    """
    check_untransformed("cg", b=b, shift=shift, x0=x0, preconditioner=preconditioner)
    check_arguments(hvp, b, x0, preconditioner)
    diagonal = None
    if isinstance(preconditioner, Tensor):
        diagonal, preconditioner = as_coefficient(preconditioner.detach(), "preconditioner", b), None
    elif preconditioner is not None:
        preconditioner = callback(preconditioner, "cg", "preconditioner", b)
    x, status, iterations, residual_norm, tables, _ = native(b.device).cg(
        callback(hvp, "cg", "hvp", b),
        b,
        shift=as_coefficient(shift.detach() if isinstance(shift, Tensor) else shift, "shift", b),
        x0=x0,
        max_iterations=check_int("max_iterations", max_iterations, minimum=0),
        rtol=_tolerance(rtol, "rtol", b),
        atol=_tolerance(atol, "atol", b),
        inverse_diagonal=diagonal,
        preconditioner=preconditioner,
        check_every=_look_every(check_every),
        rows_per_block=0 if rows_per_block is None else check_int("rows_per_block", rows_per_block, minimum=1),
        lanczos=bool(lanczos),
        shifts=None,
    )
    return Solution(x, status, iterations, residual_norm, Lanczos(*tables) if lanczos else None)
