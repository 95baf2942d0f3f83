"""The solution of an inner problem as a node of autograd, with a derivative in all that the problem depends on."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from imaml_ext.bilevel.arguments import Arguments, pulled_back
from imaml_ext.bilevel.implicit import ImplicitSolution, Reaction, implicit_solve, relative_residual
from imaml_ext.checks import check_choice, check_number
from imaml_ext.errors import SolveError, SolveWarning
from imaml_ext.inner.solver import proximal_norm
from imaml_ext.losses.curvature import task_gradient
from imaml_ext.losses.loss import Loss
from imaml_ext.ops.calls import is_traced, is_transformed
from imaml_ext.ops.recording import recordable
from imaml_ext.solvers import LinearSolver, Solution, solve
from imaml_ext.solvers.differentiable import reaches_others

Unfinished = Literal["warn", "raise", "ignore"]


def check_call(name: str) -> None:
    """Raises RuntimeError where `name` could not tell its derivative to whoever asks."""
    if is_transformed():
        raise RuntimeError(
            f"{name} must be called outside the transforms of torch.func (grad, vmap, jvp, …) and forward-mode "
            "differentiation: its derivative is that of torch.autograd, and its tasks are a batch already"
        )
    if torch.jit.is_tracing():
        raise RuntimeError(
            f"{name} must be called outside torch.jit.trace, which cannot follow its gradients: use torch.export"
        )


def check_one_gradient(grad: Tensor, name: str) -> None:
    """Raises RuntimeError where the backward pass of `name` is given many gradients at once."""
    if is_transformed() or torch._C._functorch.is_legacy_batchedtensor(grad):
        raise RuntimeError(
            f"the gradient of {name} is taken for one outer gradient at a time: call torch.autograd.grad for each, in "
            "place of is_grads_batched=True, vectorize=True or torch.func.vmap"
        )


def check_reach(value: Tensor, leaves: Sequence[Tensor], name: str, function: str = "loss") -> None:
    """Raises ValueError where a value, computed without a graph into η, has one to anything but the leaves of φ."""
    if reaches_others(value, but=leaves):
        raise ValueError(
            f"{function} must not reach tensors that require a gradient and are not among the arguments of {name}, "
            "which could not differentiate in them: hand them over there, or detach them"
        )


@dataclass(frozen=True)
class Site:
    """The line that calls the library, with the register of the warnings that were shown there."""

    file: str
    line: int
    module: str
    shown: dict[Any, Any]

    @classmethod
    def of_caller(cls) -> Site:
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("imaml_ext.", "torch.")):
            frame = frame.f_back
        module = frame.f_globals.get("__name__", "__main__")
        return cls(
            frame.f_code.co_filename, frame.f_lineno, module, frame.f_globals.setdefault("__warningregistry__", {})
        )


def _versions(arguments: Arguments) -> list[int]:
    """How often each tensor has been changed in place."""
    tensors = [leaf for leaf in arguments.leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]
    return [] if is_traced() else [tensor._version for tensor in tensors]


@dataclass(frozen=True, eq=False, kw_only=True)
class Differentiation:
    """How the linear systems of a derivative are solved, and what is said of them.

    Attributes:
        name: of the public function, for messages. site: the line that called it.
    """

    name: str
    linear_solver: LinearSolver
    damping: float
    curvature: str
    on_breakdown: Reaction
    on_unfinished: Unfinished
    unfinished_residual: float
    on_solve: Callable[[ImplicitSolution], None] | None
    site: Site

    def __post_init__(self) -> None:
        check_choice("on_breakdown", self.on_breakdown, get_args(Reaction))
        check_number("damping", self.damping, at_least=0)
        check_choice("on_unfinished", self.on_unfinished, get_args(Unfinished))
        check_number("unfinished_residual", self.unfinished_residual, at_least=0)
        if self.on_solve is not None and not callable(self.on_solve):
            raise TypeError(f"on_solve must be a function, got {type(self.on_solve).__name__}")

    @classmethod
    def of_call(
        cls, name: str, inner: Any, loss: Loss, like: Tensor, linear_solver: LinearSolver, **settings: Any
    ) -> Differentiation:
        """What a call of `name` has said, whose inner solver is `inner` for parameters like [B, N].

        Raises:
            TypeError, ValueError: inner is neither a solver nor a function, or a setting is none that there is.
        """
        if not callable(inner) and not hasattr(inner, "solve"):
            raise TypeError(f"inner must be an inner solver or a function, got {type(inner).__name__}")
        linear_solver = linear_solver.with_rate(None if callable(inner) else inner.rate(loss, like))
        return cls(name=name, linear_solver=linear_solver, site=Site.of_caller(), **settings)

    def adjoint(self, loss: Loss, data: Any, phi: Tensor, center: Tensor, lam: Tensor, v: Tensor) -> Tensor:
        """u [B, N] with (H + Λ + δI) u = v, without a graph."""
        if is_traced() and (self.on_breakdown == "raise" or self.on_unfinished != "ignore"):
            raise RuntimeError(
                f"{self.name} must have on_breakdown other than 'raise' and on_unfinished='ignore' where its backward "
                f"pass is traced, as a trace can look at no value, got {self.on_breakdown!r} and "
                f"{self.on_unfinished!r}"
            )
        operator = loss.linearize(phi, data, self.curvature)
        solved = implicit_solve(
            operator,
            v,
            lam=lam,
            damping=self.damping,
            linear_solver=self.linear_solver,
            on_breakdown=self.on_breakdown,
        )
        if self.on_solve is not None:
            self.on_solve(replace(solved, inner_gradient_norm=proximal_norm(operator.gradient, phi, center, lam)))
        self.report(solved.solution, solved.relative_residual)
        return solved.u

    def report(self, solution: Solution, residual: Tensor) -> None:
        """Warns or raises if an unfinished system has a relative residual [B] above the limit."""
        if self.on_unfinished == "ignore":
            return
        unfinished = solution.unfinished & (residual > self.unfinished_residual)  # [B]
        if not bool(unfinished.any()):
            return
        said = (
            f"linear systems of {self.name} end unfinished, with a relative residual above "
            f"{self.unfinished_residual:g}, so that its gradient is inexact: raise linear_solver's max_iterations, lam "
            "or damping; on_solve tells the residuals"
        )
        if self.on_unfinished == "warn":
            self._warn(said)
            return
        rows = unfinished.nonzero().flatten().tolist()
        worst = float(residual[unfinished].max())
        shown = ", ".join(map(str, rows[:8])) + (", …" if len(rows) > 8 else "")
        raise SolveError(f"{said} (tasks {shown}: up to {worst:.2g})")

    def report_unsolved(self, norm: Tensor | None, first: Tensor) -> None:
        """Warns or raises if gradient norms [B] of what the library itself has solved are not far below the first."""
        if self.on_unfinished == "ignore" or norm is None or not bool((norm > 1e-3 * first).any()):
            return
        said = (
            f"{self.name} has not found a minimum: after its own solver's last step a gradient is "
            f"{float((norm / first).max()):.2g} of the first one: give it an inner solver, or a better init"
        )
        if self.on_unfinished == "raise":
            raise SolveError(said)
        self._warn(said)

    def _warn(self, said: str) -> None:
        site = self.site
        warnings.warn_explicit(said, SolveWarning, site.file, site.line, site.module, site.shown)


@dataclass(frozen=True, eq=False)
class InnerProblem:
    """argmin_φ L(φ, η) + ½ Σ_j λ_j (φ_j − c_j)² for rows φ [B, N], η being what `given` has of tensors.

    Attributes:
        loss: losses [B] = loss(rows [B, N], data). given: the data, and the values that tasks share, if there are any.
    """

    loss: Loss
    given: Arguments
    derivative: Differentiation
    versions: list[int]  # of the tensors of `given`, when the problem was made

    @classmethod
    def of(cls, loss: Loss, data: Any, rows: Tensor, derivative: Differentiation) -> InnerProblem:
        """The problem of a loss, which is called at `rows` [B, N] where it may reach what is not given.

        Raises:
            TypeError, ValueError: the loss lacks the curvature, or reaches what `check_reach` refuses.
        """
        loss.check_curvature(derivative.curvature)
        given = Arguments.of((data, loss.shared))
        problem = cls(loss, given, derivative, _versions(given))
        if loss.may_reach_others and torch.is_grad_enabled() and not is_traced():
            plain, plain_data = problem.at()
            leaf = rows.clone().requires_grad_()
            check_reach(plain(leaf, plain_data), [leaf], derivative.name)
        return problem

    def at(self, tensors: tuple[Tensor, ...] | None = None) -> tuple[Loss, Any]:
        """The loss and its data with these tensors in place of those that require a gradient; None: without a graph."""
        data, shared = self.given.detached() if tensors is None else self.given.filled(tensors)
        return (self.loss if shared is self.loss.shared else self.loss.sharing(shared)), data

    def minimiser(self, find: Callable[[Tensor], Tensor], center: Tensor, lam: Tensor) -> Tensor:
        """φ [B, N] by find(lam), as a differentiable function of c [1 or B, N], λ [1 or B, 1 or N] and η."""
        phi = _Minimum.apply(self, find, center, lam, *self.given.tensors)
        if self.versions != _versions(self.given):
            raise ValueError(
                f"loss must not write into its arguments, which {self.derivative.name} gives it as they are"
            )
        return phi

    def gradient(self, phi: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        """∇_φ L [B, N] with a graph into φ and η."""
        loss, data = self.at(tensors)
        return task_gradient(loss.by_autograd()(phi, recordable(data)), phi, create_graph=True)

    def adjoint(self, phi: Tensor, center: Tensor, lam: Tensor, v: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        """u [B, N] with (H + Λ + δI) u = v; with a graph where autograd records."""
        how = self.derivative
        if self.versions != _versions(self.given):
            raise RuntimeError(
                f"tensors that {how.name} was given have been changed in place since then, so that its derivative "
                "cannot be computed: give it copies of them"
            )
        with torch.no_grad():
            u = how.adjoint(*self.at(), phi, center, lam, v)
        if not torch.is_grad_enabled():
            return u
        if how.curvature != "hessian":
            raise RuntimeError(
                f"{how.name} must have curvature='hessian' to be differentiated twice, got {how.curvature!r}, whose "
                "gradient is no derivative"
            )

        def product(p: Tensor, phi: Tensor, *tensors: Tensor) -> Tensor:
            phi = phi.view_as(phi) if phi.requires_grad else phi.detach().requires_grad_()
            return torch.autograd.grad(self.gradient(phi, tensors), phi, p, create_graph=True)[0]

        def told(solution: Solution) -> None:
            how.report(solution, relative_residual(solution, v))

        return solve(
            product,
            v,
            parameters=(phi, *tensors),
            shift=lam + how.damping,
            x0=u,
            linear_solver=how.linear_solver,
            on_failure="ignore",
            on_solve=told,
        ).x


class _Minimum(torch.autograd.Function):
    """problem, find, center [1 or B, N], lam [1 or B, 1 or N], *tensors of η -> phi [B, N]."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: InnerProblem,
        find: Callable[[Tensor], Tensor],
        center: Tensor,
        lam: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        phi = find(lam)
        ctx.save_for_backward(center, lam, phi, *tensors)
        ctx.problem = problem
        return phi

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        problem: InnerProblem = ctx.problem
        check_one_gradient(grad, problem.derivative.name)
        center, lam, phi, *tensors = ctx.saved_tensors
        _, _, needs_center, needs_lam, *needs = ctx.needs_input_grad
        u = problem.adjoint(phi, center, lam, grad.contiguous(), tuple(tensors))  # (H + Λ + δI) u = v
        by_center = (lam * u).sum_to_size(center.shape) if needs_center else None
        by_lam = (-u * (phi - center)).sum_to_size(lam.shape) if needs_lam else None
        by_tensors: tuple[Tensor | None, ...] = (None,) * len(tensors)
        if any(needs):  # −∂/∂η (uᵀ ∇_φ L(φ, η))
            again = torch.is_grad_enabled()
            with torch.enable_grad():
                phi = phi.view_as(phi) if again else phi.detach().requires_grad_()
                # Of other names, so that what the loss itself makes of η counts, and not the way through φ.
                tensors = [w.view_as(w) if again else w.detach().requires_grad_() for w in tensors]
                gradient = problem.gradient(phi, tuple(tensors))
            by_tensors = pulled_back(gradient, tensors, -u, needs)
        return None, None, by_center, by_lam, *by_tensors
