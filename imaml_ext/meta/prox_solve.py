"""The proximal problem as a differentiable function of θ and λ."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from imaml_ext import _renamed, ops
from imaml_ext.checks import check_choice, check_number
from imaml_ext.errors import SolveError, SolveWarning
from imaml_ext.inner import GradientDescent, InnerSolver
from imaml_ext.losses.loss import Loss, LossFunction, as_loss, task_rows
from imaml_ext.meta.implicit import ImplicitSolution, Reaction, implicit_solve
from imaml_ext.ops import Coefficient
from imaml_ext.ops.calls import eager, is_traced, is_transformed
from imaml_ext.solvers import CG, LinearSolver

InnerFunction = Callable[[Any, Tensor, Any, Tensor], Tensor]  # loss, theta, data, lam -> phi [B, N]
Unfinished = Literal["warn", "raise", "ignore"]


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
        on_unfinished: what becomes of a backward pass whose linear solver has stopped short of its tolerance, and has
            left a task a relative residual ‖v − A u‖ / ‖v‖ above `unfinished_residual`: "warn" gives a `SolveWarning`,
            which Python shows once per line that calls `prox_solve`; "raise" an error; "ignore" nothing. The first two
            wait for the device.
        on_solve: called in every backward pass with its `ImplicitSolution`: statuses, iterations, residuals, all on
            the device.

    Returns:
        phi [B, N], with a graph where theta or lam requires a gradient.

    Raises:
        TypeError, ValueError: an argument, or what the loss returned, of the wrong type, dtype, shape or device.
        SolveError: in the backward pass; see `on_breakdown` and `on_unfinished`.
        RuntimeError: under a transform of torch.func, is_grads_batched or torch.jit.trace.

    Source: Rajeswaran et al., arXiv 1909.04630, Lemma 1; Domke, Generic methods for optimization-based modeling (2012).
    """
    _check_call()
    given, loss = loss, as_loss(loss)
    if inner is not None and not callable(inner) and not hasattr(inner, "solve"):
        raise TypeError(f"inner must be an inner solver or a function, got {type(inner).__name__}")
    inner = inner or GradientDescent()
    rows, tasks = task_rows(theta, data, num_tasks)  # [1 or B, N]
    like = rows.detach().expand(tasks, -1)  # [B, N]
    coefficient = ops.as_coefficient(lam, "lam", like, above=0)  # [1 or B, 1 or N], with its graph
    solver = (linear_solver or CG(max_iterations=20, rtol=1e-6)).with_rate(
        None if callable(inner) else inner.rate(loss, like)
    )

    def solve(lam_rows: Tensor) -> Tensor:
        if callable(inner):
            with torch.enable_grad():
                return _checked(inner(given, theta.detach(), data, lam_rows.detach()), tasks, theta)
        return inner.solve(loss, theta, data, lam=lam_rows, num_tasks=tasks).phi

    system = {"linear_solver": solver, "damping": damping, "on_breakdown": on_breakdown}
    reaction = (on_unfinished, unfinished_residual, on_solve)
    return _ProxSolve.apply(
        rows, coefficient, solve, _Implicit(loss, data, curvature, system, *reaction, _Site.of_caller())
    )


def _check_call() -> None:
    """Raises RuntimeError where prox_solve could not tell its derivative to whoever asks."""
    if is_transformed():
        raise RuntimeError(
            "prox_solve must be called outside the transforms of torch.func (grad, vmap, jvp, …) and forward-mode "
            "differentiation: its derivative is that of torch.autograd, and its tasks are a batch already"
        )
    if torch.jit.is_tracing():
        raise RuntimeError(
            "prox_solve must be called outside torch.jit.trace, which cannot follow its gradients: use torch.export"
        )


@dataclass(frozen=True)
class _Site:
    """The line that calls the library, with the register of the warnings that were shown there."""

    file: str
    line: int
    module: str
    shown: dict[Any, Any]

    @classmethod
    def of_caller(cls) -> _Site:
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("imaml_ext.", "torch.")):
            frame = frame.f_back
        module = frame.f_globals.get("__name__", "__main__")
        return cls(
            frame.f_code.co_filename, frame.f_lineno, module, frame.f_globals.setdefault("__warningregistry__", {})
        )


@dataclass(frozen=True)
class _Implicit:
    """phi [B, N], lam [1 or B, 1 or N], v [B, N] -> u [B, N], with all that a call of `prox_solve` wants of it."""

    loss: Loss
    data: Any
    curvature: str
    system: dict[str, Any]  # the keywords of `implicit_solve`
    on_unfinished: Unfinished
    unfinished_residual: float
    on_solve: Callable[[ImplicitSolution], None] | None
    site: _Site

    def __post_init__(self) -> None:
        self.loss.check_curvature(self.curvature)
        check_choice("on_breakdown", self.system["on_breakdown"], get_args(Reaction))
        check_number("damping", self.system["damping"], at_least=0)
        check_choice("on_unfinished", self.on_unfinished, get_args(Unfinished))
        check_number("unfinished_residual", self.unfinished_residual, at_least=0)
        if self.on_solve is not None and not callable(self.on_solve):
            raise TypeError(f"on_solve must be a function, got {type(self.on_solve).__name__}")

    def __call__(self, phi: Tensor, lam: Tensor, v: Tensor) -> Tensor:
        on_breakdown = self.system["on_breakdown"]
        if is_traced() and (on_breakdown == "raise" or self.on_unfinished != "ignore"):
            raise RuntimeError(
                "prox_solve must have on_breakdown other than 'raise' and on_unfinished='ignore' where its backward "
                f"pass is traced, as a trace can look at no value, got {on_breakdown!r} and {self.on_unfinished!r}"
            )
        solved = implicit_solve(self.loss.linearize(phi, self.data, self.curvature), v, lam=lam, **self.system)
        if self.on_solve is not None:
            self.on_solve(solved)
        if self.on_unfinished != "ignore":
            self._report(solved)
        return solved.u

    def _report(self, solved: ImplicitSolution) -> None:
        """Warns or raises if an unfinished system has a residual above the limit."""
        unfinished = solved.solution.unfinished & (solved.relative_residual > self.unfinished_residual)  # [B]
        if not bool(unfinished.any()):
            return
        said = (
            f"linear systems of prox_solve end unfinished, with a relative residual above {self.unfinished_residual:g},"
            " so that its gradient is inexact: raise linear_solver's max_iterations, lam or damping; on_solve tells "
            "the residuals"
        )
        if self.on_unfinished == "warn":
            site = self.site
            warnings.warn_explicit(said, SolveWarning, site.file, site.line, site.module, site.shown)
            return
        rows = unfinished.nonzero().flatten().tolist()
        worst = float(solved.relative_residual[unfinished].max())
        shown = ", ".join(map(str, rows[:8])) + (", …" if len(rows) > 8 else "")
        raise SolveError(f"{said} (tasks {shown}: up to {worst:.2g})")


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
    def forward(ctx: Any, theta: Tensor, lam: Tensor, solve: Any, implicit: _Implicit) -> Tensor:
        phi = solve(lam)
        ctx.save_for_backward(theta, lam, phi)
        ctx.implicit = implicit
        return phi

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if is_transformed() or torch._C._functorch.is_legacy_batchedtensor(grad):
            raise RuntimeError(
                "the gradient of prox_solve is taken for one outer gradient at a time: call torch.autograd.grad for "
                "each, in place of is_grads_batched=True, vectorize=True or torch.func.vmap"
            )
        theta, lam, phi = ctx.saved_tensors
        needs_theta, needs_lam, *_ = ctx.needs_input_grad
        with torch.no_grad():
            u = ctx.implicit(phi, lam, grad.contiguous())  # (H + Λ + δI) u = v
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
