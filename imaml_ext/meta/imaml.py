"""iMAML: meta-gradients from the implicit function theorem."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from imaml_ext import _renamed
from imaml_ext.batch import Episodes
from imaml_ext.bilevel.implicit import Reaction, implicit_solve
from imaml_ext.losses.shared import SharedLinearisation
from imaml_ext.meta.algorithm import (
    MetaAlgorithm,
    MetaParameters,
    lam_rows,
    left_out,
    query_gradient,
)
from imaml_ext.meta.sums import Sums, counted_sum
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
    `imaml_ext.bilevel.implicit_solve`.

    Parameters s that tasks share have the derivative mean ∂Q(φ, s)/∂s − ∂(uᵀ∇L(φ, s))/∂s.

    Metrics of a task: query_loss and query_accuracy (classification) after adaptation; support_loss before and after
    (support_loss_before, support_loss), and what else the inner solver tells; inner_gradient_norm ‖∇L + λ(φ − θ)‖;
    solve_residual, relative to ‖v‖; solve_iterations; with a preconditioner solve_set_up, the products per task that it
    was made of; and whether its solve broke down (negative_curvature, diverged or singular), it is non_finite, does not
    count (skipped).

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
    # With lambda per tensor or parameter, CG is preconditioned by 1 / (lambda + damping) where it has nothing else.
    lam_preconditioner: bool = True
    # A task whose solve breaks down gives its last good iterate, its first-order gradient, nothing, or an error.
    on_breakdown: Reaction = "keep"

    @classmethod
    def upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        per_entry = dict(values.get("learn") or {}).get("lam", "global") != "global"
        return {"lam_preconditioner": not per_entry, **super().upgraded(values)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.lam, Tensor):
            check_entries(self.lam, "lam", above=0)
        if self.loss is not None:
            self.loss.check_curvature(self.curvature)
        if not hasattr(self.inner, "lr"):
            self.linear_solver.with_rate(None)

    def _sums(self, params: MetaParameters, episodes: Episodes) -> Sums:
        problem, theta = self._problem(params), params["theta"]
        loss, inner = problem["loss"], self._solve(problem, theta, episodes.support)
        phi = inner.phi  # [B, N]
        v, by, metrics = query_gradient(loss, phi, episodes.query, self.query_sets)  # [B, N]
        lam = lam_rows(problem, phi)  # [1 or B, 1 or N]

        # (H + Λ + δI) u = v, H linearised once at φ; ∂F/∂θ = mean Λu, ∂F/∂λ = −mean u ⊙ (φ − θ).
        operator = loss.linearize(phi, episodes.support, self.curvature)
        solver = self.linear_solver.with_rate(problem["inner"].rate(loss, phi))
        solved = implicit_solve(
            operator,
            v,
            lam=lam,
            damping=self.damping,
            linear_solver=solver,
            on_breakdown=self.on_breakdown,
            lam_preconditioner=self.lam_preconditioner,
        )
        counted = solved.counted_tasks
        by["theta"] = counted_sum(lam * solved.u, counted)
        if self.learn:
            by["lam"] = counted_sum(-solved.u * (phi - theta), counted)
        if "shared" in by:  # ∂F/∂s = mean ∂Q/∂s − ∂(uᵀ∇L)/∂s
            by["shared"] = by["shared"] - SharedLinearisation(loss, phi, episodes.support)(solved.u)[1]

        proximal = prox_gradient_(operator.gradient.clone(), phi, theta, lam)  # [B, N]
        solution, set_up = solved.solution, solved.solution.set_up
        metrics |= {
            **inner.metrics,
            "support_loss": operator.losses,
            "inner_gradient_norm": torch.linalg.vector_norm(proximal, dim=1),
            "solve_residual": solved.relative_residual,
            "solve_iterations": solution.iterations,
            SolveStatus(solver.breakdown).name.lower(): solution.broke_down,
            **left_out(counted, ~solution.non_finite),
            **({} if set_up is None else {"solve_set_up": v.new_full((len(v),), set_up.products)}),
        }
        return Sums(by, counted, metrics)
