"""The oracle of MINRES: what the native loop computes, in plain PyTorch, all rows at once under masks.

Row decisions follow csrc/minres/row.h; vectors are rounded to their type after every operation, which the kernels do
only where a vector is stored. The directions are w of the paper, which the kernels hold as q = γ w.
"""

from __future__ import annotations

import torch
from torch import Tensor

from imaml_ext.ops import Coefficient, as_coefficient
from imaml_ext.solvers.linear import Operator, Solution, SolveStatus, checked, row_norm

ITERATING, VERIFYING, SUSPECT = 16, 17, 18  # rows at work; the last two measure, SUSPECT before it is SINGULAR


def minres(
    operator: Operator,
    b: Tensor,
    *,
    shift: Coefficient = 0.0,
    x0: Tensor | None = None,
    max_iterations: int = 5,
    rtol: float = 1e-5,
    atol: float = 0.0,
) -> Solution:
    """`imaml_ext.solvers.minres` in plain PyTorch: the same statuses and, while rounding is small, iteration counts."""
    operator, b = checked(operator, b, "minres", shift=shift)
    rows = _Rows(operator, b, as_coefficient(shift, "shift", b).detach(), x0, rtol, atol)
    for _ in range(max_iterations):
        rows.advance(operator)
    return rows.solution()


class _Rows:
    """All rows of a solve under masks; scalars of a row are float64 columns [B, 1]. Nothing waits for the device."""

    def __init__(
        self, operator: Operator, b: Tensor, shift: Tensor, x0: Tensor | None, rtol: float, atol: float
    ) -> None:
        self.b, self.shift = b, shift
        b_norm = _norm(b)
        self.x = torch.zeros_like(b) if x0 is None else x0.clone()
        r = b if x0 is None else b - (operator(x0) + self.shift.to(b.dtype) * x0)
        norm = _norm(r)
        self.threshold = (rtol * b_norm).clamp(min=atol)
        self.status = torch.full(b.shape[:1], ITERATING, dtype=torch.int32, device=b.device)
        self.iterations = torch.zeros_like(self.status)
        self.operator_norm = torch.zeros_like(norm)
        self.zero, self.one = torch.zeros_like(norm), torch.ones_like(norm)
        self.residual = norm
        self._end(~(b_norm.isfinite() & norm.isfinite()), SolveStatus.NON_FINITE)
        nothing = self._at_work() & (b_norm == 0)
        self.x, self.residual = torch.where(nothing, 0.0, self.x), torch.where(nothing, 0.0, self.residual)
        self._end(nothing | (norm <= self.threshold), SolveStatus.CONVERGED)
        self.best, self.measured, self.stalls = self.x, norm, self.zero  # x of the least residual that was measured
        self.v = self.v_before = self.w = self.w_before = torch.zeros_like(b)
        self.beta = self.c = self.s = self.delta_next = self.epsilon_next = self.zero
        self._begin(torch.ones_like(norm, dtype=torch.bool), r, norm)

    def advance(self, operator: Operator) -> None:
        """One product: a Lanczos step for rows at work, the residual of x for rows that verify."""
        iterating, verifying = self._rows(ITERATING), self._rows(VERIFYING) | self._rows(SUSPECT)
        p = torch.where(verifying, self.x, self.v)
        Ap = operator(p) + self.shift.to(p.dtype) * p
        finite = _norm(Ap).isfinite()
        self._end((iterating | verifying) & ~finite, SolveStatus.NON_FINITE)
        self._lanczos(iterating & finite, Ap)
        self._verify(verifying & finite, Ap)

    def _lanczos(self, rows: Tensor, Ap: Tensor) -> None:
        # α = vᵀA v;  β₊ v₊ = A v − α v − β v₋
        norm = _norm(Ap)
        self.operator_norm = torch.where(rows, torch.maximum(self.operator_norm, norm), self.operator_norm)
        alpha = _dot(self.v, Ap)
        u = Ap - alpha.to(Ap.dtype) * self.v - self.beta.to(Ap.dtype) * self.v_before
        beta = _norm(u)
        negligible = torch.finfo(Ap.dtype).eps ** 0.75 * self.operator_norm
        beta = torch.where(beta <= negligible, 0.0, beta)

        # The rotations before turn the new column (β, α, β₊) into (ε, δ, γ̄, β₊); the next one makes γ of γ̄ and β₊.
        epsilon, delta = self.epsilon_next, self.c * self.delta_next + self.s * alpha
        gamma_bar = self.s * self.delta_next - self.c * alpha
        epsilon_next, delta_next = self.s * beta, -self.c * beta
        # ‖A r‖ = ‖r‖ ‖(γ̄, δ₊)‖: where that is nothing, r is a null vector, and no step makes it smaller.
        singular = rows & (torch.hypot(gamma_bar, delta_next) <= negligible) & (self.iterations.unsqueeze(1) > 0)
        gamma = torch.hypot(gamma_bar, beta)
        singular = singular | (rows & (gamma <= negligible))
        self._end(singular, SUSPECT)
        rows = rows & ~singular
        gamma = torch.where(rows, gamma, self.one)
        c, s = gamma_bar / gamma, beta / gamma

        # w₊ = (v − δ w − ε w₋) / γ;  x ← x + φ w₊
        dtype = Ap.dtype
        w = (self.v - delta.to(dtype) * self.w - epsilon.to(dtype) * self.w_before) / gamma.to(dtype)
        x = self.x + (c * self.residual).to(dtype) * w
        x_norm = _norm(x)
        overflow = rows & ~x_norm.isfinite()
        self._end(overflow, SolveStatus.NON_FINITE)
        too_long = rows & (torch.finfo(dtype).eps * self.operator_norm * x_norm > 64 * self.residual.abs())
        self._end(too_long, VERIFYING)
        rows = rows & ~overflow & ~too_long
        v = u / torch.where(beta > 0, beta, self.one).to(dtype)
        for name, value in {
            "x": x, "w_before": self.w, "w": w, "v_before": self.v, "v": v, "beta": beta, "c": c, "s": s,
            "delta_next": delta_next, "epsilon_next": epsilon_next, "residual": self.residual * s,
        }.items():  # fmt: skip
            setattr(self, name, torch.where(rows, value, getattr(self, name)))
        self.iterations += rows[:, 0].to(torch.int32)
        # A residual within the tolerance is measured next, and so is the one of a space that is exhausted.
        self._end(rows & ((self.residual <= self.threshold) | (beta == 0)), VERIFYING)

    def _verify(self, rows: Tensor, Ax: Tensor) -> None:
        r = self.b - Ax
        norm = _norm(r)
        self._end(rows & (norm <= self.threshold), SolveStatus.CONVERGED)
        self._end(rows & self._rows(SUSPECT) & (norm <= 2 * self.residual.abs()), SolveStatus.SINGULAR)
        self.residual = torch.where(rows, norm, self.residual)
        rows = rows & self._at_work()
        self.stalls = self.stalls + (rows & (norm > 0.9 * self.measured)).double()
        least = rows & (norm < self.measured)
        self.best, self.measured = torch.where(least, self.x, self.best), torch.where(least, norm, self.measured)
        stagnated = rows & (self.stalls >= 2)
        self._end(stagnated, SolveStatus.STAGNATED)
        self.x = torch.where(stagnated, self.best, self.x)
        self.residual = torch.where(stagnated, self.measured, self.residual)
        self._begin(rows & ~stagnated, r, norm)

    def _begin(self, rows: Tensor, r: Tensor, norm: Tensor) -> None:
        """The Krylov space of r, from x on."""
        v = r / torch.where(rows & (norm > 0) & norm.isfinite(), norm, self.one).to(r.dtype)
        nothing = torch.zeros_like(r)
        for name, value in {
            "v": v, "v_before": nothing, "w": nothing, "w_before": nothing, "beta": self.zero, "c": -self.one,
            "s": self.zero, "delta_next": self.zero, "epsilon_next": self.zero,
        }.items():  # fmt: skip
            setattr(self, name, torch.where(rows, value, getattr(self, name)))
        self._end(rows, ITERATING)

    def _rows(self, status: int) -> Tensor:
        return (self.status == status).unsqueeze(1)

    def _end(self, rows: Tensor, status: int) -> None:
        """Gives rows at work [B, 1] a status."""
        self.status = self.status.masked_fill((rows & self._at_work())[:, 0], int(status))

    def _at_work(self) -> Tensor:
        return (self.status >= ITERATING).unsqueeze(1)

    def solution(self) -> Solution:
        self._end(self._at_work(), SolveStatus.MAX_ITERATIONS)
        return Solution(self.x, self.status, self.iterations, self.residual[:, 0].abs())


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b of every row, [B, 1] float64."""
    return (a.double() * b.double()).sum(1, keepdim=True)


def _norm(a: Tensor) -> Tensor:
    """‖a‖ of every row, [B, 1] float64."""
    return row_norm(a).unsqueeze(1)
