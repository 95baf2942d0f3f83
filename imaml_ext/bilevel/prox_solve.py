"""The proximal problem of every task as a differentiable function of all that it depends on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imaml_ext import _renamed, ops
from imaml_ext.bilevel.implicit import ImplicitSolution, Reaction
from imaml_ext.bilevel.minimum import Differentiation, InnerProblem, Unfinished, check_call
from imaml_ext.inner import GradientDescent, InnerSolver
from imaml_ext.losses.loss import Loss, LossFunction, as_loss, task_rows
from imaml_ext.ops import Coefficient
from imaml_ext.ops.calls import eager
from imaml_ext.ops.recording import recordable, recording
from imaml_ext.solvers import CG, LinearSolver

InnerFunction = Callable[[Any, Tensor, Any, Tensor], Tensor]  # loss, theta, data, lam -> phi [B, N]


@_renamed.old_keywords(functools.partial(_renamed.solver_keywords, max_iterations=20, rtol=1e-6))
@eager
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
    on_unfinished: Unfinished = "warn",
    unfinished_residual: float = 1e-2,
    on_solve: Callable[[ImplicitSolution], None] | None = None,
    num_tasks: int | None = None,
) -> Tensor:
    """Returns φ_b ≈ argmin_φ L_b(φ) + ½ Σ_j λ_j (φ_j − θ_j)² for every task b, with an implicit derivative.

    It is `imaml_ext.argmin` of a loss that takes data, in rows, beginning at θ. The derivative in θ, λ and the tensors
    of `data` that require a gradient is that of the exact minimiser, evaluated at the φ that the solver has reached:
    for an outer gradient v, (H + Λ + δI) u = v by the linear solver, θ̄ = Λu, λ̄ = −u ⊙ (φ − θ), and for a tensor w of
    the data w̄ = −∂/∂w (uᵀ∇L), summed over what shares an entry. It does not depend on the path of the inner solver, nor
    does memory; how close it is depends on how near φ is to the minimiser and on how well the system is solved. It can
    be differentiated again, at the Hessian's curvature.

    Args:
        loss: losses [B] = loss(params [B, N], data), row b from row b alone.
        theta: [N] or [B, N], float32 or float64. lam: λ > 0, a number or a tensor [], [B], [N] or [B, N].
        data: handed to `loss`; a nested structure whose tensors may require a gradient.
        inner: an inner solver, `GradientDescent()` unless given; or a function of your own, differentiable or not:
            called with loss, theta as given, data, and lam as a tensor [1 or B, 1 or N]; returns phi [B, N].
        num_tasks: B, where `data` does not tell it.
        linear_solver: of the implicit system; `CG(max_iterations=20, rtol=1e-6)` unless given.
        damping, on_breakdown: as `imaml_ext.bilevel.implicit_solve`; by default a system that breaks down raises in the
            backward pass, which waits for the device for that.
        curvature: "hessian" or "gauss_newton".
        on_unfinished: what becomes of a backward pass whose linear solver has stopped short of its tolerance, and has
            left a task a relative residual ‖v − A u‖ / ‖v‖ above `unfinished_residual`: "warn" gives a `SolveWarning`,
            which Python shows once per line that calls `prox_solve`; "raise" an error; "ignore" nothing. The first two
            wait for the device.
        on_solve: called in every backward pass with its `ImplicitSolution`: statuses, iterations, residuals, all on
            the device.

    Returns:
        phi [B, N], with a graph where theta, lam or data requires a gradient.

    Raises:
        TypeError, ValueError: an argument, or what the loss returned, of the wrong type, dtype, shape or device; or a
            loss that reaches tensors which require a gradient and are not in `data`.
        SolveError: in the backward pass; see `on_breakdown` and `on_unfinished`.
        RuntimeError: under a transform of torch.func, is_grads_batched or torch.jit.trace.

    Source: Rajeswaran et al., arXiv 1909.04630, Lemma 1; Domke, Generic methods for optimization-based modeling (2012).
    """
    check_call("prox_solve")
    given, loss = loss, as_loss(loss)
    inner = GradientDescent() if inner is None else inner
    rows, tasks = task_rows(theta, data, num_tasks)  # [1 or B, N]
    like = rows.detach().expand(tasks, -1)  # [B, N]
    coefficient = ops.as_coefficient(lam, "lam", like, above=0)  # [1 or B, 1 or N], with its graph
    derivative = Differentiation.of_call(
        "prox_solve",
        inner,
        loss,
        like,
        CG(max_iterations=20, rtol=1e-6) if linear_solver is None else linear_solver,
        damping=damping,
        curvature=curvature,
        on_breakdown=on_breakdown,
        on_unfinished=on_unfinished,
        unfinished_residual=unfinished_residual,
        on_solve=on_solve,
    )
    problem = InnerProblem.of(loss, data, like, derivative)

    def find(lam_rows: Tensor) -> Tensor:
        plain, plain_data = problem.at()
        if callable(inner):
            with recording():
                at, lam_rows = recordable((theta, lam_rows))
                phi = inner(given if plain is loss else plain, at.detach(), recordable(plain_data), lam_rows.detach())
            return _checked(phi, tasks, theta)
        return inner.solve(plain, theta, plain_data, lam=lam_rows, num_tasks=tasks).phi

    return problem.minimiser(find, rows, coefficient)


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
