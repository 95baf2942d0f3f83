"""Conjugate gradients for many shifts: (A_b + diag(shift) + σ_j) x_bj = b_b, with the products of one shift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from imaml_ext._native import native
from imaml_ext.ops import check_entries
from imaml_ext.ops.calls import callback, check_untransformed, eager
from imaml_ext.solvers.cg import _cg_rows, loop_arguments
from imaml_ext.solvers.linear import Solution
from imaml_ext.solvers.operators import Product, System, column_by_column, is_matrix


@eager
def multi_shift_cg(
    A: Any,
    b: Any,
    shifts: Tensor,
    *,
    shift: Any = 0.0,
    max_iterations: int = 5,
    rtol: float | Tensor = 1e-5,
    atol: float | Tensor = 0.0,
    check_every: int = 0,
) -> Solution:
    """Solves (A_b + diag(shift) + σ_bj) x_bj = b_b for every row b and every shift σ_bj of it.

    The system of the row's least shift is solved by conjugate gradients from x = 0. Those of the others have the same
    Krylov spaces and follow with its products, each until its residual by recurrence is within the tolerance. Then
    `cg` measures every residual, one product per system, and goes on from the x where the tolerance is not met. So a
    status says what it says in `cg`.

    Args:
        A, shift, rtol, atol: as in `cg`.
        b: as in `cg`, with one right-hand side per row: [N], [B, N] or a nested structure of tensors [B, …].
        shifts: [J] or [B, J], at least 0, in any order; added to `shift`.
        max_iterations: the largest number of products for a row, beside the J that measure.
        check_every: k > 0 asks the device every k iterations whether all systems are done, to stop early. 0 never
            does. A system that is not done when the last one stops then has no products left, and only is measured.

    Returns:
        A `Solution` with x [B, J, N] (in a structure [B, J, …]) and status, iterations and residual_norm [B, J]; for b
        [N] without B. Every residual_norm was measured, unless a row went on after that.

    Raises:
        TypeError, ValueError, NativeUnavailableError: as `cg`.

    Source: Frommer, BiCGStab(l) for families of shifted linear systems (2003); van den Eshof and Sleijpen, Accurate
    conjugate gradient methods for families of shifted systems (2004).
    """
    check_untransformed("multi_shift_cg", b=b, shifts=shifts)
    system = read_single(A, b, "multi_shift_cg: b")
    rows = system.b.detach()
    sigma = _offsets(shifts, rows)
    least = sigma.amin(1, keepdim=True)
    arguments = loop_arguments(
        "multi_shift_cg",
        system.operator,
        rows,
        **system.options(shift, None, rtol, atol),
        max_iterations=max_iterations,
        check_every=check_every,
    )
    coefficient = arguments.pop("shift")  # [1 or R, 1 or N]
    calls = 0
    operator = callback(system.operator, "multi_shift_cg", "A", rows)

    def counted(p: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return operator(p)

    *_, (x, steps) = native(rows.device).cg(
        counted,
        rows,
        shift=coefficient + least.to(coefficient.dtype),
        inverse_diagonal=None,
        preconditioner=None,
        lanczos=False,
        shifts=sigma - least,
        **arguments,
    )
    count = sigma.shape[1]
    total = coefficient.unsqueeze(1) + sigma.to(coefficient.dtype).unsqueeze(2)  # [R, J, 1 or N]
    measured = _cg_rows(
        on_columns(A, b, system, count),
        rows.repeat_interleave(count, 0),
        shift=total.flatten(0, 1),
        x0=x.flatten(0, 1),
        max_iterations=arguments["max_iterations"] - calls,
        rtol=arguments["rtol"].expand(len(rows)).repeat_interleave(count),
        atol=arguments["atol"].expand(len(rows)).repeat_interleave(count),
        preconditioner=None,
        check_every=check_every,
    )
    lead = (*_lead(system), count)
    solutions = measured.x.unflatten(0, sigma.shape).unbind(1)
    return Solution(
        _stacked([system.form.unpack(x) if system.form else x for x in solutions], len(lead) - 1),
        measured.status.reshape(lead),
        (steps.flatten() + measured.iterations).reshape(lead),
        measured.residual_norm.reshape(lead),
    )


def read_single(A: Any, b: Any, name: str) -> System:
    """The system of one right-hand side per row."""
    system = System.read(A, b)
    if system.form is not None and len(system.form.lead) == 2:
        raise ValueError(f"{name} must have one right-hand side per row, got {list(b.shape)}")
    return system


def on_columns(A: Any, b: Any, system: System, count: int) -> Product:
    """The operator of a system on `count` vectors for each row, [R count, N]: in one call where `cg` makes one."""
    if isinstance(b, Tensor) and (b.dim() == 2 or is_matrix(A)):
        return System.read(A, system.b.unsqueeze(2).expand(-1, -1, count)).operator
    return column_by_column(system.operator, len(system.b), count)


def _lead(system: System) -> tuple[int, ...]:
    return system.form.lead if system.form else (len(system.b),)


def _stacked(values: list[Any], dim: int) -> Any:
    return pytree.tree_map(lambda *leaves: torch.stack(leaves, dim), *values)


def _offsets(shifts: Tensor, b: Tensor) -> Tensor:
    """The shifts as float64 [R, J]."""
    if not isinstance(shifts, Tensor) or not shifts.is_floating_point():
        found = shifts.dtype if isinstance(shifts, Tensor) else type(shifts).__name__
        raise TypeError(f"shifts must be a floating-point tensor, got {found}")
    if shifts.device != b.device:
        raise ValueError(f"shifts must be on {b.device}, got {shifts.device}")
    if shifts.dim() not in (1, 2) or shifts.shape[:-1] not in ((), b.shape[:1]) or shifts.shape[-1] == 0:
        raise ValueError(f"shifts must have shape [J] or [{b.shape[0]}, J] with J ≥ 1, got {list(shifts.shape)}")
    check_entries(shifts, "shifts", at_least=0)
    return shifts.detach().double().expand(len(b), -1).contiguous()
