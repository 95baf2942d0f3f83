"""The proximal problem as a differentiable function of θ and λ."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

from imaml_ext import _renamed, ops
from imaml_ext.checks import check_choice, check_number
from imaml_ext.inner import GradientDescent, InnerSolver
from imaml_ext.losses.loss import Loss, LossFunction, as_loss, task_rows
from imaml_ext.meta.implicit import Reaction, implicit_solve
from imaml_ext.ops import Coefficient
from imaml_ext.solvers import CG, LinearSolver

InnerFunction = Callable[[Any, Tensor, Any, Tensor], Tensor]  # loss, theta, data, lam -> phi [B, N]


@_renamed.old_keywords(functools.partial(_renamed.solver_keywords, max_iterations=20, rtol=1e-6))
def prox_solve(
    loss: Loss | LossFunction,
    theta: Tensor,
    lam: Coefficient,
    data: Any,
    *,
    inner: InnerSolver | InnerFunction | None = None,
    linear_solver: LinearSolver | None = None,
    damping: float = 0.0,
    curvature: str = "hessian",
    on_breakdown: Reaction = "raise",
    num_tasks: int | None = None,
) -> Tensor:
    """Returns φ_b(θ, λ) ≈ argmin_φ L_b(φ) + ½ Σ_j λ_j (φ_j − θ_j)² for every task b, with an implicit derivative.

    The gradient with respect to θ and λ is that of the exact minimiser, evaluated at the φ that the solver has reached:
    for an outer gradient v, (H + Λ + δI) u = v by the linear solver, θ̄ = Λu, λ̄ = −u ⊙ (φ − θ), summed over what
    shares an entry. It does not depend on the path of the inner solver, nor does memory; how close it is depends on how
    near φ is to the minimiser and on how well the system is solved. No gradient flows into `data` or into what `loss`
    closes over. Once differentiable.

    Args:
        loss: losses [B] = loss(params [B, N], data), row b from row b alone.
        theta: [N] or [B, N], float32 or float64. lam: λ > 0, a number or a tensor [], [B], [N] or [B, N].
        data: handed to `loss`.
        inner: an inner solver, `GradientDescent()` unless given; or a function of your own, differentiable or not:
            called with loss, theta as given, data, and lam as a tensor [1 or B, 1 or N]; returns phi [B, N].
        num_tasks: B, where `data` has no `x`.
        linear_solver: of the implicit system; `CG(max_iterations=20, rtol=1e-6)` unless given.
        damping, on_breakdown: as `imaml_ext.meta.implicit_solve`; by default a system that breaks down raises in the
            backward pass, which waits for the device for that.
        curvature: "hessian" or "gauss_newton".

    Returns:
        phi [B, N], with a graph where theta or lam requires a gradient.

    Raises:
        TypeError, ValueError: an argument, or what the loss returned, of the wrong type, dtype, shape or device.
        SolveError: in the backward pass; see `on_breakdown`.

    Source: Rajeswaran et al., arXiv 1909.04630, Lemma 1; Domke, Generic methods for optimization-based modeling (2012).
    """
    given, loss = loss, as_loss(loss)
    loss.check_curvature(curvature)
    check_choice("on_breakdown", on_breakdown, get_args(Reaction))
    check_number("damping", damping, at_least=0)
    if inner is not None and not callable(inner) and not hasattr(inner, "solve"):
        raise TypeError(f"inner must be an inner solver or a function, got {type(inner).__name__}")
    solver = linear_solver or CG(max_iterations=20, rtol=1e-6)
    rows, tasks = task_rows(theta, data, num_tasks)  # [1 or B, N]
    coefficient = ops.as_coefficient(lam, "lam", rows.detach().expand(tasks, -1), above=0)  # [1 or B, 1 or N], with its graph

    def solve(lam_rows: Tensor) -> Tensor:
        if callable(inner):
            return _checked(inner(given, theta.detach(), data, lam_rows.detach()), tasks, theta)
        return (inner or GradientDescent()).solve(loss, theta, data, lam=lam_rows, num_tasks=tasks).phi

    def differentiate(phi: Tensor, lam_rows: Tensor, v: Tensor) -> Tensor:
        rate = None if callable(inner) else (inner or GradientDescent()).rate(loss, phi)
        return implicit_solve(
            loss.linearize(phi, data, curvature),
            v,
            lam=lam_rows,
            damping=damping,
            linear_solver=solver.with_rate(rate),
            on_breakdown=on_breakdown,
        ).u

    return _ProxSolve.apply(rows, coefficient, solve, differentiate)


def _checked(phi: Any, tasks: int, theta: Tensor) -> Tensor:
    """What a user's solver returned, as a tensor of its own."""
    if not isinstance(phi, Tensor):
        raise TypeError(f"inner must return a tensor, got {type(phi).__name__}")
    shape = (tasks, theta.shape[-1])
    if phi.shape != shape or phi.dtype != theta.dtype or phi.device != theta.device:
        raise ValueError(
            f"inner must return phi {list(shape)}, {theta.dtype} on {theta.device}, "
            f"got {list(phi.shape)}, {phi.dtype} on {phi.device}"
        )
    return phi.detach().clone(memory_format=torch.contiguous_format)


class _ProxSolve(torch.autograd.Function):
    """theta [1 or B, N], lam [1 or B, 1 or N] -> phi [B, N]."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, lam: Tensor, solve: Any, differentiate: Any) -> Tensor:
        phi = solve(lam)
        ctx.save_for_backward(theta, lam, phi)
        ctx.differentiate = differentiate
        return phi

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        theta, lam, phi = ctx.saved_tensors
        needs_theta, needs_lam, *_ = ctx.needs_input_grad
        with torch.no_grad():
            u = ctx.differentiate(phi, lam, grad.contiguous())  # (H + Λ + δI) u = v
            by_theta = (lam * u).sum_to_size(theta.shape) if needs_theta else None
            by_lam = (-u * (phi - theta)).sum_to_size(lam.shape) if needs_lam else None
        if torch.is_grad_enabled():  # create_graph=True: differentiating the result again must fail, not give zero
            by_theta, by_lam = (
                None if value is None else _OnceDifferentiable.apply(value, grad, theta, lam)
                for value in (by_theta, by_lam)
            )
        return by_theta, by_lam, None, None


class _OnceDifferentiable(torch.autograd.Function):
    """The identity in its first argument, with a derivative that raises."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *depends_on: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "prox_solve is differentiable once: its backward pass is an iterative solve without a graph; for second "
            "derivatives in theta or lam, differentiate through an unrolled inner solver"
        )
