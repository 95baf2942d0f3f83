"""The oracle: what the native ops compute, in plain PyTorch, step for step with the same iteration counts.

Used by the tests on every device; slow, and clear. Row decisions follow csrc/cg/row.h, all rows at once under masks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from imaml_ext.ops import Coefficient, as_coefficient, compute_dtype
from imaml_ext.solvers.cg import _tolerance, check_arguments
from imaml_ext.solvers.linear import Operator as RowOperator
from imaml_ext.solvers.linear import Solution as CGResult
from imaml_ext.solvers.linear import SolveStatus as CGStatus

__all__ = ["cg", "prox_adam_step", "prox_gradient", "prox_momentum_step", "prox_penalty", "prox_sgd_step"]

ITERATING, VERIFYING = 16, 17  # RowStatus beyond CGStatus: rows still at work
INFINITY = float("inf")


def _dot(a: Tensor, b: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """(scale a)ᵀ(scale b) of every row, [B] float64."""
    factor = scale.unsqueeze(1) if isinstance(scale, Tensor) else scale
    return ((factor * a.double()) * (factor * b.double())).sum(1)


def _norm(a: Tensor) -> Tensor:
    """‖a‖ of every row, [B] float64, without squares that leave the range of numbers."""
    a = a.double()
    largest = a.abs().amax(1) if a.shape[1] else a.new_zeros(len(a))
    scale = _scale(largest)
    return _dot(a, a, scale).sqrt() / scale


def _scale(norm: Tensor) -> Tensor:
    """The power of two next to 1 / norm; 1 for 0 and what is not finite."""
    exponent = (torch.frexp(norm).exponent - 1).clamp(-1000, 1000)
    return torch.where(norm.isfinite() & (norm > 0), torch.ldexp(torch.ones_like(norm), -exponent), 1.0)


def _column(value: Tensor, like: Tensor) -> Tensor:
    return value.to(compute_dtype(like.dtype)).unsqueeze(1)


class _Rows:
    """The state of all rows: csrc/cg/row.h, with a method for each of its functions, under masks [B]."""

    def __init__(self, b: Tensor, x: Tensor, r: Tensor, rtol: Tensor, atol: Tensor) -> None:
        self.x, self.r, self.p, self.best = x, r, torch.zeros_like(b), torch.zeros_like(b)
        b_norm, r_norm = _norm(b), _norm(r)
        self.u, self.largest = torch.finfo(b.dtype).eps / 2, torch.finfo(b.dtype).max
        self.threshold = torch.maximum(rtol * b_norm, atol)
        self.status = torch.full(b.shape[:1], ITERATING, dtype=torch.int32, device=b.device)
        self.iterations = torch.zeros_like(self.status)
        self.residual, self.solution_bound = r_norm, _norm(x)
        self.scale = _scale(r_norm) if b.dtype == torch.float64 else torch.ones_like(r_norm)
        self.least = r_norm
        self.kept, self.measured = torch.full_like(r_norm, INFINITY), torch.full_like(r_norm, INFINITY)
        self.operator_norm, self.rz, self.stalls = (torch.zeros_like(r_norm) for _ in range(3))

        self.end(r_norm <= self.threshold, CGStatus.CONVERGED)
        zero = b_norm == 0
        self.end(zero, CGStatus.CONVERGED)
        self.status[~(b_norm.isfinite() & r_norm.isfinite())] = int(CGStatus.NON_FINITE)
        no_iterate = ~self.solution_bound.isfinite()
        self.residual = torch.where(no_iterate, b_norm, torch.where(zero & r_norm.isfinite(), 0.0, r_norm))
        clear = no_iterate | (zero & r_norm.isfinite())
        self.x[clear] = 0
        self.solution_bound[clear] = 0

    def active(self) -> Tensor:
        return self.status >= ITERATING

    def end(self, rows: Tensor, status: CGStatus, *, slack: float = 0.0) -> None:
        """Gives rows at work a status; they end with the iterate kept if its residual is below `slack` times theirs."""
        rows = rows & self.active()
        self.status[rows] = int(status)
        better = rows & (self.kept < slack * self.residual)
        self.x[better] = self.best[better]
        self.residual = torch.where(better, self.kept, self.residual)

    def keep(self, rows: Tensor, residual: Tensor) -> None:
        self.best[rows] = self.x[rows]
        self.kept = torch.where(rows, residual, self.kept)

    def turn(self, z: Tensor) -> None:
        """β = rᵀz / (rᵀz)_old, p ← z + β p; p ← x for a row that verifies."""
        rz = _dot(self.r, z, self.scale)
        iterating = self.status == ITERATING
        self.end(iterating & ~rz.isfinite(), CGStatus.NON_FINITE)
        self.end(iterating & (rz <= 0), CGStatus.NEGATIVE_CURVATURE)
        iterating = self.status == ITERATING
        beta = torch.where(self.rz > 0, rz / self.rz, 0.0)
        self.rz = torch.where(iterating, rz, self.rz)
        self.end(iterating & ~(beta <= self.largest), CGStatus.NON_FINITE)
        iterating = self.status == ITERATING
        column = _column(beta, self.p)
        direction = torch.where(column == 0, z, z + column * self.p.to(z.dtype)).to(self.p.dtype)
        self.p[iterating] = direction[iterating]
        self.p[self.status == VERIFYING] = self.x[self.status == VERIFYING]

    def step_length(self, Ap: Tensor, b: Tensor, s: Tensor, plain: bool) -> tuple[Tensor, Tensor]:
        """α, and ‖p‖; ends rows without positive curvature. `plain`: without a preconditioner."""
        u, iterating, verifying = self.u, self.status == ITERATING, self.status == VERIFYING
        pAp, ApAp, pp = (_dot(v, w, self.scale) for v, w in ((self.p, Ap), (Ap, Ap), (self.p, self.p)))
        self.solution_bound = torch.where(verifying, pp.sqrt() / self.scale, self.solution_bound)
        self.end(iterating & ~(pAp.isfinite() & pp.isfinite()), CGStatus.NON_FINITE)
        iterating = self.status == ITERATING
        p = pp.sqrt()
        in_range = (ApAp > 1e-200) & ApAp.isfinite()
        grown = torch.maximum(self.operator_norm, (ApAp / pp).sqrt())
        self.operator_norm = torch.where(iterating & in_range & (p > 0), grown, self.operator_norm)
        stands_out = (pAp > 8 * u * p * ApAp.sqrt()) & (pAp > 4 * u * self.operator_norm * pp)
        positive = (pAp > 0) & (~in_range | stands_out)
        bad, first = iterating & ~positive, iterating & ~positive & (self.solution_bound == 0)
        negative = pAp < -8 * u * self.operator_norm * pp
        self.end(bad & negative, CGStatus.NEGATIVE_CURVATURE)
        self.end(first, CGStatus.SINGULAR)
        self.end(bad, CGStatus.SINGULAR, slack=4.0)
        if first.any():
            quotient = torch.where(s > 0, b.to(Ap.dtype) / s, 0.0).to(b.dtype).expand_as(b)
            self.x[first] = torch.where(quotient.isfinite(), quotient, 0.0)[first]
            known = _norm(Ap - s * self.p.to(Ap.dtype)) / s[:, 0].double()
            if s.shape[1] > 1 or not plain:
                known = torch.full_like(known, torch.nan)
            moved = first & (s[:, 0] > 0) if s.shape[1] == 1 else first
            self.residual = torch.where(moved, known, self.residual)
        alpha = torch.where(iterating & positive, self.rz / pAp, 0.0)
        self.end(iterating & ~(alpha <= self.largest), CGStatus.NON_FINITE)
        return torch.where(self.status == ITERATING, alpha, 0.0), p / self.scale

    def measure(self, rows: Tensor, norm: Tensor) -> None:
        """b − A x has been measured, for the x that the rows have."""
        self.residual = torch.where(rows, norm, self.residual)
        self.rz = torch.where(rows, 0.0, self.rz)
        self.end(rows & (norm <= self.threshold), CGStatus.CONVERGED)
        rows = rows & self.active()
        self.stalls += (rows & (norm > 0.9 * self.measured)).double()
        stagnated, unmeasured = rows & (self.stalls >= 4), self.kept < torch.minimum(norm, self.measured)
        self.end(stagnated, CGStatus.STAGNATED, slack=1.0)
        again = stagnated & unmeasured
        self.status[again] = VERIFYING
        self.kept = torch.where(again, INFINITY, self.kept)
        rows = rows & self.active() & ~again
        self.status[rows] = ITERATING
        self.least = torch.where(rows, norm, self.least)
        self.measured = torch.where(rows, torch.minimum(norm, self.measured), self.measured)
        self.keep(rows & (norm < self.kept), norm)

    def moved(self, rows: Tensor, norm: Tensor, step: Tensor) -> Tensor:
        """The new residual is known: the rows that take the step, of that length [B]."""
        self.end(rows & (norm * self.u**0.5 > self.least), CGStatus.SINGULAR, slack=4.0)
        rows = rows & self.active()
        grown = 4 * self.least
        grows = (norm > grown) & (self.residual <= grown)
        runs_off = (step > 32 * self.solution_bound) & (self.solution_bound > 0)
        kept = rows & (grows | runs_off) & (self.residual < self.kept)
        self.keep(kept & (self.measured == INFINITY), self.residual)
        self.iterations += rows.to(torch.int32)
        self.residual = torch.where(rows, norm, self.residual)
        self.least = torch.where(rows, torch.minimum(self.least, norm), self.least)
        self.solution_bound = torch.where(rows, self.solution_bound + step, self.solution_bound)
        self.status[rows & (norm <= self.threshold)] = VERIFYING
        return rows


def cg(
    hvp: RowOperator,
    b: Tensor,
    *,
    shift: Coefficient = 0.0,
    x0: Tensor | None = None,
    max_iterations: int = 5,
    rtol: float | Tensor = 1e-5,
    atol: float | Tensor = 0.0,
    preconditioner: Tensor | RowOperator | None = None,
    check_every: int = 0,
) -> CGResult:
    """`imaml_ext.cg` in plain PyTorch, all rows together: the same statuses and iteration counts."""
    check_arguments(hvp, b, x0, preconditioner)
    dtype, wide = b.dtype, compute_dtype(b.dtype)
    s = as_coefficient(shift, "shift", b)
    diagonal = as_coefficient(preconditioner, "preconditioner", b) if isinstance(preconditioner, Tensor) else None

    def precondition(r: Tensor) -> Tensor:  # z = M r, in the compute type
        if diagonal is not None:
            return diagonal * r.to(wide)
        return r.to(wide) if preconditioner is None else preconditioner(r).to(wide)  # type: ignore[operator]

    # r = b − A x0
    x = torch.zeros_like(b) if x0 is None else x0.clone()
    r = b.clone() if x0 is None else (b.to(wide) - (hvp(x).to(wide) + s * x.to(wide))).to(dtype)
    rows = _Rows(b, x, r, _tolerance(rtol, "rtol", b), _tolerance(atol, "atol", b))
    if max_iterations > 0:
        rows.turn(precondition(r))
    for k in range(max_iterations):
        if check_every and k % check_every == 0 and not rows.active().any():
            break
        # α = rᵀz / pᵀAp
        Ap = hvp(rows.p).to(wide) + s * rows.p.to(wide)
        alpha, p_norm = rows.step_length(Ap, b, s, preconditioner is None)
        column = _column(alpha, b)
        moved = (x.to(wide) + column * rows.p.to(wide)).to(dtype)
        rows.end((rows.status == ITERATING) & ~moved.isfinite().all(1), CGStatus.NON_FINITE)

        # r ← r − α A p, or b − A x for a row that verifies
        verifying = (rows.status == VERIFYING).unsqueeze(1)
        new = torch.where(verifying, b.to(wide) - Ap, r.to(wide) - column * Ap).to(dtype)
        r[rows.active()] = new[rows.active()]
        norm = _dot(r, r, rows.scale).sqrt() / rows.scale
        rows.end(~norm.isfinite(), CGStatus.NON_FINITE)
        iterating, verifying = rows.status == ITERATING, rows.status == VERIFYING
        rows.measure(verifying, norm)
        step = rows.moved(iterating, norm, alpha * p_norm)

        # x ← x + α p,  z = M r,  p ← z + β p
        x[step] = moved[step]
        if k + 1 < max_iterations:
            rows.turn(precondition(r))

    rows.end(rows.active(), CGStatus.MAX_ITERATIONS)
    return CGResult(x, rows.status, rows.iterations, rows.residual)


def _proximal_gradient(phi: Tensor, grad: Tensor, theta: Tensor, lam: Coefficient) -> Tensor:
    wide = compute_dtype(phi.dtype)
    return grad.to(wide) + as_coefficient(lam, "lam", phi) * (phi.to(wide) - theta.to(wide))


def _move(phi: Tensor, direction: Tensor, lr: Coefficient) -> Tensor:
    return (phi.to(direction.dtype) - as_coefficient(lr, "lr", phi) * direction).to(phi.dtype)


def prox_gradient(grad: Tensor, phi: Tensor, theta: Tensor, lam: Coefficient) -> Tensor:
    """∇L + λ (φ − θ)."""
    return _proximal_gradient(phi, grad, theta, lam).to(grad.dtype)


def prox_penalty(phi: Tensor, theta: Tensor, lam: Coefficient) -> Tensor:
    """½ Σ λ (φ − θ)², [B]."""
    coefficient = as_coefficient(lam, "lam", phi)
    squares = coefficient.double() * (phi.double() - theta.double()).square()
    return (0.5 * squares.sum(1)).to(compute_dtype(phi.dtype))


def prox_sgd_step(phi: Tensor, grad: Tensor, theta: Tensor, lam: Coefficient, lr: Coefficient) -> Tensor:
    """φ − η (∇L + λ (φ − θ))."""
    return _move(phi, _proximal_gradient(phi, grad, theta, lam), lr)


def prox_momentum_step(
    phi: Tensor,
    velocity: Tensor,
    grad: Tensor,
    theta: Tensor,
    lam: Coefficient,
    lr: Coefficient,
    momentum: float,
    nesterov: bool = False,
) -> tuple[Tensor, Tensor]:
    """The new φ and velocity."""
    g = _proximal_gradient(phi, grad, theta, lam)
    v = momentum * velocity.to(g.dtype) + g
    return _move(phi, g + momentum * v if nesterov else v, lr), v.to(velocity.dtype)


def prox_adam_step(
    phi: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    theta: Tensor,
    lam: Coefficient,
    lr: Coefficient,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The new φ, first and second moment."""
    g = _proximal_gradient(phi, grad, theta, lam)
    m = beta1 * exp_avg.to(g.dtype) + (1 - beta1) * g
    v = beta2 * exp_avg_sq.to(g.dtype) + (1 - beta2) * g.square()
    direction = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
    return _move(phi, direction, lr), m.to(exp_avg.dtype), v.to(exp_avg_sq.dtype)
