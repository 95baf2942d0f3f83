"""iMAML: meta-gradients from the implicit function theorem."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from imaml_ext import _renamed
from imaml_ext.batch import Episodes
from imaml_ext.meta.algorithm import (
    MetaAlgorithm,
    MetaGradient,
    MetaParameters,
    count_metrics,
    lam_rows,
    query_gradient,
)
from imaml_ext.meta.implicit import Reaction, implicit_solve
from imaml_ext.ops import Coefficient, check_entries, prox_gradient_
from imaml_ext.settings import NOT_NEGATIVE, POSITIVE
from imaml_ext.solvers import CG, LinearSolver
from imaml_ext.solvers.linear import SolveStatus


@_renamed.old_keywords(_renamed.solver_keywords)
@dataclass(frozen=True, kw_only=True)
class IMAML(MetaAlgorithm):
    """Solves the proximal problem of every task, then takes the implicit gradient by a linear solver.

    For every task, φ ≈ argmin L(φ) + ½ λ ‖φ − θ‖², v = ∇Q(φ), (H + Λ + δI) u = v, ∂F/∂θ = mean Λu, and for a λ that is
    learnt ∂F/∂λ = −mean u ⊙ (φ − θ). All tasks go through each stage together; nothing waits for the device (but
    `on_breakdown="raise"`, which must look). Each setting has its meaning beside it; `on_breakdown` is that of
    `imaml_ext.meta.implicit_solve`.

    Damping is added to the system and not to the inner problem. It shortens u, most along directions of small
    curvature, and keeps early, indefinite Hessians from being inverted.

    Source: Rajeswaran, Finn, Kakade, Levine, Meta-Learning with Implicit Gradients, arXiv 1909.04630, Algorithm 2.
    """

    no_derivative: ClassVar[dict[str, str]] = {
        "lr": "the implicit gradient does not depend on how the inner problem was solved; MAML and FOMAML learn rates"
    }

    # Regularisation lambda > 0: how strongly a task's parameters are held at theta.
    lam: Annotated[Coefficient, POSITIVE] = 2.0
    linear_solver: LinearSolver = field(default_factory=CG)  # Solver of the implicit system.
    damping: Annotated[float, NOT_NEGATIVE] = 0.0  # delta >= 0, added to lambda in the implicit system.
    # Matrix of the implicit system: the Hessian, the paper's letter, or Gauss-Newton, which trains stably.
    curvature: Literal["hessian", "gauss_newton"] = "hessian"
    # A task whose solve breaks down gives its last good iterate, its first-order gradient, nothing, or an error.
    on_breakdown: Reaction = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.lam, Tensor):
            check_entries(self.lam, "lam", above=0)
        if self.loss is not None:
            self.loss.check_curvature(self.curvature)
        if not hasattr(self.inner, "lr"):
            self.linear_solver.with_rate(None)

    def meta_gradient(self, params: Tensor | MetaParameters, episodes: Episodes) -> MetaGradient:
        """Returns ∂F/∂θ [N], the mean over the tasks that count, and ∂F/∂ log λ where λ is learnt.

        Metrics, means over tasks: query_loss and query_accuracy (classification) after adaptation; support_loss before
        and after (support_loss_before, support_loss), and what else the inner solver tells; inner_gradient_norm
        ‖∇L + λ(φ − θ)‖; solve_residual, relative to ‖v‖; solve_iterations; with a preconditioner solve_set_up, the
        products per task that it was made of; and the fractions of tasks whose solve broke down (negative_curvature,
        diverged or singular), that are non_finite, and left out (skipped).
        """
        params = self._checked(params)
        problem, theta = self._problem(params), params["theta"]
        inner = self._solve(problem, theta, episodes.support)
        phi = inner.phi  # [B, N]
        v, metrics = query_gradient(self._loss, phi, episodes.query)  # [B, N]
        lam = lam_rows(problem, phi)  # [1 or B, 1 or N]

        # (H + Λ + δI) u = v, H linearised once at φ; ∂F/∂θ = mean Λu, ∂F/∂λ = −mean u ⊙ (φ − θ).
        operator = self._loss.linearize(phi, episodes.support, self.curvature)
        solver = self.linear_solver.with_rate(self.inner.rate(self._loss, phi))
        solved = implicit_solve(
            operator, v, lam=lam, damping=self.damping, linear_solver=solver, on_breakdown=self.on_breakdown
        )
        proximal = prox_gradient_(operator.gradient.clone(), phi, theta, lam)  # [B, N]
        solution, set_up = solved.solution, solved.solution.set_up
        metrics |= {
            **inner.metrics,
            "support_loss": operator.losses.mean(),
            "inner_gradient_norm": torch.linalg.vector_norm(proximal, dim=1).mean(),
            "solve_residual": solved.relative_residual.to(v.dtype).mean(),
            "solve_iterations": solution.iterations.to(v.dtype).mean(),
            SolveStatus(solver.breakdown).name.lower(): solution.broke_down.to(v.dtype).mean(),
            **count_metrics(solved.counted_tasks, ~solution.non_finite, v.dtype),
            **({} if set_up is None else {"solve_set_up": v.new_tensor(set_up.products)}),
        }
        by_lam = {"lam": -solved.u * (phi - theta)} if self.learn else {}
        return self._result(params, lam * solved.u, by_lam, solved.counted_tasks, metrics)
