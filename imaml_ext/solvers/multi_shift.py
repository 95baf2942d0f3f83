"""Conjugate gradients for many shifts: (H_b + diag(shift) + σ_j) x_bj = b_b, with the products of one shift."""

from __future__ import annotations

import torch
from torch import Tensor

from imaml_ext._native import native
from imaml_ext.checks import check_int
from imaml_ext.ops import Coefficient, as_coefficient, check_entries
from imaml_ext.ops.calls import callback, check_untransformed, eager
from imaml_ext.solvers.cg import _look_every, _tolerance, cg
from imaml_ext.solvers.linear import Operator, Solution, check_system


@eager
def multi_shift_cg(
    hvp: Operator,
    b: Tensor,
    shifts: Tensor,
    *,
    shift: Coefficient = 0.0,
    max_iterations: int = 5,
    rtol: float | Tensor = 1e-5,
    atol: float | Tensor = 0.0,
    check_every: int = 0,
) -> Solution:
    """Solves (H_b + diag(shift) + σ_bj) x_bj = b_b for every row b and every shift σ_bj of it.

    The system of the row's least shift is solved by conjugate gradients from x = 0. Those of the others have the same
    Krylov spaces and follow with its products, each until its residual by recurrence is within the tolerance. Then one
    call of `cg` measures every residual, one product per system, and goes on from the x where the tolerance is not
    met. So a status says what it says in `cg`.

    Args:
        hvp, b, shift, rtol, atol: as in `cg`.
        shifts: [J] or [B, J], at least 0, in any order; added to `shift`.
        max_iterations: the largest number of calls of `hvp` for a row, beside the J that measure.
        check_every: k > 0 asks the device every k iterations whether all systems are done, to stop early. 0 never
            does. A system that is not done when the last one stops then has no products left, and only is measured.

    Returns:
        A `Solution` with x [B, J, N] and status, iterations and residual_norm [B, J]. No residual_norm comes from a
        recurrence, where no products were left.

    Raises:
        TypeError, ValueError, NativeUnavailableError: as `cg`.

    Source: Frommer, BiCGStab(l) for families of shifted linear systems (2003); van den Eshof and Sleijpen, Accurate
    conjugate gradient methods for families of shifted systems (2004).
    """
    check_untransformed("multi_shift_cg", b=b, shifts=shifts, shift=shift)
    check_system(hvp, b)
    sigma = _offsets(shifts, b)
    least = sigma.amin(1, keepdim=True)
    coefficient = as_coefficient(shift.detach() if isinstance(shift, Tensor) else shift, "shift", b)
    products = check_int("max_iterations", max_iterations, minimum=0)
    calls = 0
    hvp = callback(hvp, "multi_shift_cg", "hvp", b)

    def counted(p: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return hvp(p)

    *_, (x, steps) = native(b.device).cg(
        counted,
        b,
        shift=coefficient + least.to(coefficient.dtype),
        x0=None,
        max_iterations=products,
        rtol=_tolerance(rtol, "rtol", b),
        atol=_tolerance(atol, "atol", b),
        inverse_diagonal=None,
        preconditioner=None,
        check_every=_look_every(check_every),
        rows_per_block=0,
        lanczos=False,
        shifts=sigma - least,
    )
    count = sigma.shape[1]

    def repeated(value: float | Tensor) -> float | Tensor:
        return value.repeat_interleave(count) if isinstance(value, Tensor) and value.dim() == 1 else value

    total = coefficient.unsqueeze(1) + sigma.to(coefficient.dtype).unsqueeze(2)  # [B, J, 1 or N]
    measured = cg(
        for_each_of(hvp, *sigma.shape),
        b.repeat_interleave(count, 0),
        shift=total.flatten(0, 1),
        x0=x.flatten(0, 1),
        max_iterations=products - calls,
        rtol=repeated(rtol),
        atol=repeated(atol),
        check_every=check_every,
    )
    return Solution(
        measured.x.unflatten(0, sigma.shape),
        measured.status.unflatten(0, sigma.shape),
        steps + measured.iterations.unflatten(0, sigma.shape),
        measured.residual_norm.unflatten(0, sigma.shape),
    )


def for_each_of(operator: Operator, rows: int, count: int) -> Operator:
    """The operator of `rows` rows on `count` vectors for each of them: [rows count, N] -> [rows count, N]."""

    def product(p: Tensor) -> Tensor:
        return torch.stack([operator(q) for q in p.unflatten(0, (rows, count)).unbind(1)], 1).flatten(0, 1)

    return product


def _offsets(shifts: Tensor, b: Tensor) -> Tensor:
    """The shifts as float64 [B, J]."""
    if not isinstance(shifts, Tensor) or not shifts.is_floating_point():
        found = shifts.dtype if isinstance(shifts, Tensor) else type(shifts).__name__
        raise TypeError(f"shifts must be a floating-point tensor, got {found}")
    if shifts.device != b.device:
        raise ValueError(f"shifts must be on {b.device}, got {shifts.device}")
    if shifts.dim() not in (1, 2) or shifts.shape[:-1] not in ((), b.shape[:1]) or shifts.shape[-1] == 0:
        raise ValueError(f"shifts must have shape [J] or [{b.shape[0]}, J] with J ≥ 1, got {list(shifts.shape)}")
    check_entries(shifts, "shifts", at_least=0)
    return shifts.detach().double().expand(len(b), -1).contiguous()
