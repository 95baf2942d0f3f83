"""Stationary iterations for the implicit system: the Neumann series and the fixed point of the inner update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RichardsonResult:
    """What `richardson` returns, on the device.

    Attributes:
        x: [B, N], the last iterate of a row, or the last good one of a row that diverged or turned non-finite.
        residual_norm: [B] float64, the last ‖b − A x‖ that was measured: of x where the row has stopped, else of the
            iterate one correction before x.
        iterations: [B] int32, corrections applied.
        diverged: [B] bool, the iteration was seen not to contract. non_finite: [B] bool, NaN or infinity.
    """

    x: Tensor
    residual_norm: Tensor
    iterations: Tensor
    diverged: Tensor
    non_finite: Tensor


def richardson(
    operator: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    shift: Tensor,
    step: Tensor,
    products: int,
    rtol: float,
) -> RichardsonResult:
    """x ← x + M (b − A x) from x = 0, for A = H + diag(shift), M = diag(step), row by row.

    M = 1 / shift is the Neumann series of (I + H / shift)⁻¹, which converges where ‖H‖ < shift. M = α is the fixed
    point of the derivative of a gradient step of size α, which converges where α ‖A‖ < 2. In both cases I − M^½ A M^½
    is symmetric, so that the residual shrinks at every step in the norm rᵀ M r if the iteration converges: one growth
    proves that it does not, and ends the row.

    Args:
        operator: p [B, N] -> H p [B, N]. b: [B, N]. shift, step: [1 or B, 1 or N], positive.
        products: how often the operator is called. rtol: a row stops at ‖b − A x‖ ≤ rtol ‖b‖.

    Source: Lorraine, Vicol, Duvenaud, Optimizing millions of hyperparameters by implicit differentiation (2020);
    Grazzi, Franceschi, Pontil, Salzo, On the iteration complexity of hypergradient computation (2020).
    """
    norm = torch.linalg.vector_norm(b, dim=1, dtype=torch.float64)  # [B]
    floor = 1000 * torch.finfo(b.dtype).eps  # growth within rounding of what r is the difference of proves nothing
    non_finite = ~b.isfinite().all(1)
    active, diverged = ~non_finite & (norm > 0), torch.zeros_like(non_finite)
    r, energy, residual = b, _energy(b, step), norm
    x = last = torch.zeros_like(b)
    iterations = torch.zeros(len(b), dtype=torch.int32, device=b.device)
    for k in range(products + 1):
        if k > 0:
            Hx, Sx = operator(x), shift * x
            r = b - Hx - Sx
            measured = torch.linalg.vector_norm(r, dim=1, dtype=torch.float64)
            new_energy = _energy(r, step)
            rounding = floor * (norm + sum(torch.linalg.vector_norm(v, dim=1, dtype=torch.float64) for v in (Hx, Sx)))
            broken = active & ~measured.isfinite()
            grown = active & (new_energy > energy) & (measured > rounding)
            x = torch.where((broken | grown).unsqueeze(1), last, x)
            iterations -= (broken | grown).to(torch.int32)
            non_finite, diverged, active = non_finite | broken, diverged | grown, active & ~broken & ~grown
            residual, energy = torch.where(active, measured, residual), torch.where(active, new_energy, energy)
            active = active & (measured > rtol * norm)
        last = x
        x = torch.where(active.unsqueeze(1), x + step * r, x)
        iterations += active.to(torch.int32)
    return RichardsonResult(x, residual, iterations, diverged, non_finite)


def _energy(r: Tensor, step: Tensor) -> Tensor:
    """rᵀ M r of every row, [B] float64."""
    return (step * r * r).sum(1, dtype=torch.float64)
