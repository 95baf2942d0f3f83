"""The loop of `imaml_ext.cg` for torch.compile: what csrc/cg/solver.cpp does, as a graph of the same fused ops."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROW_STATE_WIDTH = 12  # kRowStateWidth in csrc/cg/row.h
_ITERATING = 16  # and beyond: rows at work


def cg_loop(
    hvp: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    shift: Tensor,
    x0: Tensor | None,
    max_iterations: int,
    rtol: Tensor,
    atol: Tensor,
    inverse_diagonal: Tensor | None,
    preconditioner: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, status, iterations and residual norms of the checked arguments of the native `cg`; the bits are the same.

    A graph holds every one of the `max_iterations` products, as it can look at no value to stop early.
    """
    ops = torch.ops.imaml_ext
    b = b.detach().contiguous()
    x = torch.zeros_like(b) if x0 is None else x0.detach().contiguous().clone()
    r, p, best = torch.zeros_like(b), torch.zeros_like(b), torch.zeros_like(b)
    status = torch.zeros(b.shape[:1], dtype=torch.int32, device=b.device)
    iterations = torch.zeros_like(status)
    state = torch.zeros((b.shape[0], ROW_STATE_WIDTH), dtype=torch.float64, device=b.device)
    direct = preconditioner is None  # a step makes the next direction too

    def applied(function: Callable[[Tensor], Tensor], argument: Tensor) -> Tensor:
        # A copy: ops that write to p are reordered by the compiler, which must not reach what a function has kept.
        return function(argument.clone()).detach().contiguous()

    hx = None if x0 is None else applied(hvp, x)
    ops.cg_begin_(b, hx, shift, inverse_diagonal, rtol, atol, x, r, p, state, status, iterations, direct)
    if preconditioner is not None and max_iterations > 0:
        ops.cg_direction_(applied(preconditioner, r), None, x, r, p, state, status)
    for k in range(max_iterations):
        hp, last = applied(hvp, p), k + 1 == max_iterations
        ops.cg_step_(hp, b, shift, inverse_diagonal, x, r, p, best, state, status, iterations, direct, False, last)
        if preconditioner is not None and not last:
            ops.cg_direction_(applied(preconditioner, r), None, x, r, p, state, status)
    return x, torch.where(status >= _ITERATING, 1, status), iterations, state[:, 1].clone()
