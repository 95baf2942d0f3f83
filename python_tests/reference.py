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

ITERATING, VERIFYING = 4, 5  # RowStatus beyond CGStatus: rows still at work


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """aᵀb of every row, [B] float64."""
    return (a.double() * b.double()).sum(1)


def _column(value: Tensor, like: Tensor) -> Tensor:
    return value.to(compute_dtype(like.dtype)).unsqueeze(1)


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
    unit_roundoff, largest = torch.finfo(dtype).eps / 2, torch.finfo(dtype).max
    s = as_coefficient(shift, "shift", b)
    diagonal = as_coefficient(preconditioner, "preconditioner", b) if isinstance(preconditioner, Tensor) else None

    def precondition(r: Tensor) -> Tensor:  # z = M r, in the compute type
        if diagonal is not None:
            return diagonal * r.to(wide)
        return r.to(wide) if preconditioner is None else preconditioner(r).to(wide)  # type: ignore[operator]

    # r = b − A x0
    x = torch.zeros_like(b) if x0 is None else x0.clone()
    r = b.clone() if x0 is None else (b.to(wide) - (hvp(x).to(wide) + s * x.to(wide))).to(dtype)
    bb, rr, xx = _dot(b, b), _dot(r, r), _dot(x, x)
    threshold = torch.maximum(_tolerance(rtol, "rtol", b) * bb.sqrt(), _tolerance(atol, "atol", b))
    solution_bound = xx.sqrt()
    warm = xx > 0
    operator_norm = torch.where(warm, (bb.sqrt() + rr.sqrt()) / solution_bound, 0.0)
    drift = torch.where(warm, unit_roundoff * (bb.sqrt() + rr.sqrt()), 0.0)
    converged = rr.sqrt() + drift <= threshold
    status = torch.where(converged, int(CGStatus.CONVERGED), ITERATING).to(torch.int32)
    zero = bb == 0
    status[zero] = int(CGStatus.CONVERGED)
    status[~(bb.isfinite() & rr.isfinite()) | ~xx.isfinite()] = int(CGStatus.NON_FINITE)
    rr = torch.where(~xx.isfinite(), bb, torch.where(zero & xx.isfinite(), 0.0, rr))
    clear = ~xx.isfinite() | (zero & bb.isfinite())
    x[clear] = 0
    solution_bound[clear] = 0
    iterations = torch.zeros_like(status)
    rz = torch.zeros_like(rr)
    p = torch.zeros_like(b)

    def turn(z: Tensor) -> None:  # β = rᵀz / (rᵀz)_old, p ← z + β p; p ← x for a row that verifies
        nonlocal rz
        new = _dot(r, z)
        at_work = status == ITERATING
        status[at_work & ~new.isfinite()] = int(CGStatus.NON_FINITE)
        status[at_work & new.isfinite() & (new <= 0)] = int(CGStatus.NEGATIVE_CURVATURE)
        at_work = status == ITERATING
        beta = torch.where(rz > 0, new / rz, 0.0)
        rz = torch.where(at_work, new, rz)
        overflow = at_work & ~(beta <= largest)
        status[overflow] = int(CGStatus.NON_FINITE)
        at_work = at_work & ~overflow
        beta_column = _column(beta, b)
        direction = torch.where(beta_column == 0, z, z + beta_column * p.to(wide)).to(dtype)
        p[at_work] = direction[at_work]
        p[status == VERIFYING] = x[status == VERIFYING]

    if max_iterations > 0:
        turn(precondition(r))
    for k in range(max_iterations):
        if check_every and k % check_every == 0 and not (status >= ITERATING).any():
            break
        Ap = hvp(p).to(wide) + s * p.to(wide)
        pAp, ApAp, pp = _dot(p, Ap), _dot(Ap, Ap), _dot(p, p)
        active, verifying = status >= ITERATING, status == VERIFYING
        finite = pAp.isfinite() & ApAp.isfinite() & pp.isfinite()
        status[active & ~finite] = int(CGStatus.NON_FINITE)
        active = active & finite
        operator_norm = torch.where(active & (pp > 0), torch.maximum(operator_norm, (ApAp / pp).sqrt()), operator_norm)
        solution_bound = torch.where(active & verifying, pp.sqrt(), solution_bound)

        # α = rᵀz / pᵀAp
        bad = active & ~verifying & ~(pAp > 8 * unit_roundoff * pp.sqrt() * ApAp.sqrt())
        status[bad] = int(CGStatus.NEGATIVE_CURVATURE)
        first = bad & (solution_bound == 0)
        if first.any():
            quotient = torch.where(s > 0, b.to(wide) / s, 0.0).to(dtype).expand_as(b)
            x[first] = torch.where(quotient.isfinite(), quotient, 0.0)[first]
            Hp_squared = (Ap.double() - s.double() * p.double()).square().sum(1)
            if s.shape[1] == 1:  # where it is not positive x stays 0, and ‖b‖ its residual
                known = Hp_squared / s[:, 0].double() ** 2 if preconditioner is None else torch.full_like(rr, torch.nan)
                rr = torch.where(first & (s[:, 0] > 0), known, rr)
            else:
                rr = torch.where(first, torch.nan, rr)
        alpha = torch.where(active & ~verifying & ~bad, rz / pAp, 0.0)
        status[active & ~bad & ~(alpha <= largest)] = int(CGStatus.NON_FINITE)
        alpha_column = _column(alpha, b)
        moved = (x.to(wide) + alpha_column * p.to(wide)).to(dtype)
        status[(status == ITERATING) & ~moved.isfinite().all(1)] = int(CGStatus.NON_FINITE)

        # r ← r − α A p, or b − A x for a row that verifies
        active = status >= ITERATING
        measured_r = b.to(wide) - Ap
        new_r = torch.where(verifying.unsqueeze(1), measured_r, r.to(wide) - alpha_column * Ap).to(dtype)
        r[active] = new_r[active]
        new_rr = _dot(r, r)
        status[active & ~new_rr.isfinite()] = int(CGStatus.NON_FINITE)
        active = active & new_rr.isfinite()
        rr = torch.where(active, new_rr, rr)
        step = active & ~verifying
        iterations += step.to(torch.int32)
        solution_bound = torch.where(step, solution_bound + alpha * pp.sqrt(), solution_bound)
        bound = unit_roundoff * operator_norm * solution_bound
        drift = torch.where(step, drift + bound, torch.where(active & verifying, bound, drift))
        rz = torch.where(active & verifying, 0.0, rz)
        norm = rr.sqrt()
        sure = (norm + drift <= threshold) | (verifying & (rr == 0))
        status[active & verifying] = ITERATING
        status[step & (norm <= threshold)] = VERIFYING
        status[active & sure] = int(CGStatus.CONVERGED)

        # x ← x + α p,  z = M r,  p ← z + β p
        x[step] = moved[step]
        if k + 1 < max_iterations:
            turn(precondition(r))

    status[status >= ITERATING] = int(CGStatus.MAX_ITERATIONS)
    return CGResult(x, status, iterations, rr.sqrt())


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
