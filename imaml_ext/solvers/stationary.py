"""Stationary iterations for the implicit system: the Neumann series and the fixed point of the inner update."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from imaml_ext.errors import ConfigError
from imaml_ext.ops import Coefficient, as_coefficient
from imaml_ext.settings import COUNT, NOT_NEGATIVE, POSITIVE
from imaml_ext.solvers.linear import LinearSolver, Operator, Solution, SolveStatus, checked, row_norm


@dataclass(frozen=True)
class Neumann(LinearSolver):
    """The Neumann series of (I + H / shift)⁻¹, which converges where ‖H‖ < shift.

    Source: Lorraine, Vicol, Duvenaud, Optimizing millions of hyperparameters by implicit differentiation (2020).
    """

    breakdown: ClassVar[SolveStatus] = SolveStatus.DIVERGED

    max_iterations: Annotated[int, COUNT] = 5  # Number of products with the matrix.
    rtol: Annotated[float, NOT_NEGATIVE] = 1e-5  # Relative residual at which a task's solve stops.

    def solve_rows(self, operator: Operator, b: Tensor, *, shift: Coefficient, x0: Tensor | None) -> Solution:
        operator, b = checked(operator, b, "Neumann", shift=shift)
        shift = as_coefficient(shift, "shift", b).detach()
        return _richardson(operator, b, shift, 1 / shift, x0=x0, products=self.max_iterations, rtol=self.rtol)


@dataclass(frozen=True)
class FixedPoint(LinearSolver):
    """x ← x − α ((H + shift) x − b), which converges where α ‖H + shift‖ < 2.

    With the α of an inner gradient descent it is the fixed point of the derivative of that descent's update.

    Source: Grazzi, Franceschi, Pontil, Salzo, On the iteration complexity of hypergradient computation (2020).
    """

    breakdown: ClassVar[SolveStatus] = SolveStatus.DIVERGED

    # Step size alpha; unset: the learning rate of the inner gradient descent.
    lr: Annotated[Coefficient | None, POSITIVE] = None
    max_iterations: Annotated[int, COUNT] = 5  # Number of products with the matrix.
    rtol: Annotated[float, NOT_NEGATIVE] = 1e-5  # Relative residual at which a task's solve stops.

    def with_rate(self, lr: Coefficient | None) -> FixedPoint:
        if self.lr is not None:
            return self
        if lr is None:
            raise ConfigError("FixedPoint.lr must be given where the inner solver has no learning rate")
        return replace(self, lr=lr)

    def solve_rows(self, operator: Operator, b: Tensor, *, shift: Coefficient, x0: Tensor | None) -> Solution:
        if self.lr is None:
            raise ConfigError("FixedPoint.lr must be given where no inner solver tells it, got None")
        operator, b = checked(operator, b, "FixedPoint", shift=shift)
        step = as_coefficient(self.lr, "lr", b).detach()
        shift = as_coefficient(shift, "shift", b).detach()
        return _richardson(operator, b, shift, step, x0=x0, products=self.max_iterations, rtol=self.rtol)


def _richardson(
    operator: Operator, b: Tensor, shift: Tensor, step: Tensor, *, x0: Tensor | None, products: int, rtol: float
) -> Solution:
    """x ← x + M (b − A x) from x = 0 or x0, for A = H + diag(shift), M = diag(step), row by row.

    I − M^½ A M^½ is symmetric, so that the residual shrinks at every step in the norm rᵀ M r if the iteration
    converges: one growth proves that it does not, and ends the row.
    """
    norm = row_norm(b)  # [B]
    floor = 1000 * torch.finfo(b.dtype).eps  # growth within rounding of what r is the difference of proves nothing
    non_finite = ~b.isfinite().all(1)
    active, diverged = ~non_finite & (norm > 0), torch.zeros_like(non_finite)
    r, energy, residual = b, _energy(b, step), norm
    x = last = torch.zeros_like(b)
    if x0 is not None:  # whose residual is the first that is measured
        x, energy = torch.where(active.unsqueeze(1), x0.detach(), x), torch.full_like(norm, torch.inf)
    iterations = torch.zeros(len(b), dtype=torch.int32, device=b.device)
    for k in range(products + 1):
        if k > 0 or x0 is not None:
            Hx, Sx = operator(x), shift * x
            r = b - Hx - Sx
            measured = row_norm(r)
            new_energy = _energy(r, step)
            rounding = floor * (norm + sum(row_norm(v) for v in (Hx, Sx)))
            broken = active & ~measured.isfinite()
            grown = active & (new_energy > energy) & (measured > rounding)
            x = torch.where((broken | grown).unsqueeze(1), last, x)
            iterations -= (broken | grown).to(torch.int32) if k > 0 else 0
            non_finite, diverged, active = non_finite | broken, diverged | grown, active & ~broken & ~grown
            residual, energy = torch.where(active, measured, residual), torch.where(active, new_energy, energy)
            active = active & (measured > rtol * norm)
        last = x
        x = torch.where(active.unsqueeze(1), x + step * r, x)
        iterations += active.to(torch.int32)
    status = torch.zeros_like(iterations)  # CONVERGED
    for rows, how in ((active, "MAX_ITERATIONS"), (diverged, "DIVERGED"), (non_finite, "NON_FINITE")):
        status = status.masked_fill(rows, int(SolveStatus[how]))
    return Solution(x, status, iterations, residual)


def _energy(r: Tensor, step: Tensor) -> Tensor:
    """rᵀ M r of every row, [B] float64."""
    return (step * r * r).sum(1, dtype=torch.float64)
