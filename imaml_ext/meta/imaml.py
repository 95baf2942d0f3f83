"""iMAML: meta-gradients from the implicit function theorem."""

from __future__ import annotations

import torch
from torch import Tensor

from imaml_ext.checks import check_choice, check_int, check_number
from imaml_ext.inner import GradientDescent, InnerSolver
from imaml_ext.inner.curvature import CURVATURES, curvature_operator
from imaml_ext.meta.algorithm import (
    Episodes,
    InnerProblem,
    MetaGradient,
    count_metrics,
    one_row,
    query_gradient,
    task_mean,
)
from imaml_ext.meta.implicit import REACTIONS, SOLVERS, implicit_solve
from imaml_ext.meta.regularisation import LearnableLam
from imaml_ext.models import LossFunction, TaskLoss
from imaml_ext.ops import Coefficient, prox_gradient_


class IMAML(InnerProblem):
    """An inner solver on the proximal problem of every task, then the implicit gradient by conjugate gradients.

    For every task, φ ≈ argmin L(φ) + ½ λ ‖φ − θ‖², v = ∇Q(φ), (H + Λ + δI) u = v, ∂F/∂θ = mean Λu, and for a λ that is
    learnt ∂F/∂λ = −mean u ⊙ (φ − θ). All tasks go through each stage together; nothing waits for the device (but
    `negative_curvature="raise"`, which must look).

    Args:
        loss: a `TaskLoss`, or losses [B] = loss(params [B, N], data).
        lam: λ > 0, a number, a tensor [B], [N] or [B, N], or a `LearnableLam`.
        inner: the solver of the proximal problem; `GradientDescent()` unless given.
        solver: of the linear system: "cg", "neumann" or "fixed_point"; see `imaml_ext.meta.implicit_solve`.
        cg_steps: products with H at most. cg_rtol: stop at this relative residual. Of every solver.
        solver_lr: α of "fixed_point"; unless given, the step size of the inner gradient descent, whose update the fixed
            point is then the derivative of.
        damping: δ ≥ 0, added to the system and not to the inner problem. It shortens u, most along directions of small
            curvature, and keeps early, indefinite Hessians from being inverted.
        curvature: "hessian", or "gauss_newton" (a `TaskLoss` only), which has no direction of negative curvature.
        negative_curvature: "keep", "gradient", "skip" or "raise"; see `imaml_ext.meta.implicit_solve`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range.

    Source: Rajeswaran, Finn, Kakade, Levine, Meta-Learning with Implicit Gradients, arXiv 1909.04630, Algorithm 2.
    """

    def __init__(
        self,
        loss: LossFunction,
        *,
        lam: Coefficient | LearnableLam = 2.0,
        inner: InnerSolver | None = None,
        solver: str = "cg",
        cg_steps: int = 5,
        cg_rtol: float = 1e-5,
        solver_lr: Coefficient | None = None,
        damping: float = 0.0,
        curvature: str = "hessian",
        negative_curvature: str = "keep",
    ) -> None:
        super().__init__(loss, lam=lam, inner=inner, positive=True)
        check_choice("curvature", curvature, CURVATURES)
        if curvature == "gauss_newton" and not isinstance(loss, TaskLoss):
            raise TypeError(f"loss must be a TaskLoss with curvature='gauss_newton', got {type(loss).__name__}")
        self.solver = check_choice("solver", solver, SOLVERS)
        if solver != "fixed_point" and solver_lr is not None:
            raise ValueError(f"solver_lr must be None with solver={solver!r}, got {solver_lr!r}")
        if solver == "fixed_point" and solver_lr is None:
            if not isinstance(self.inner, GradientDescent):
                raise ValueError("solver_lr must be given with solver='fixed_point' where the inner solver has no lr")
            solver_lr = self.inner.lr
        if solver_lr is not None and not isinstance(solver_lr, Tensor):
            check_number("solver_lr", solver_lr, above=0)
        self.solver_lr = solver_lr
        self.cg_steps = check_int("cg_steps", cg_steps, minimum=1)
        self.cg_rtol = check_number("cg_rtol", cg_rtol, at_least=0)
        self.damping = check_number("damping", damping, at_least=0)
        self.curvature = curvature
        self.negative_curvature = check_choice("negative_curvature", negative_curvature, REACTIONS)

    def meta_gradient(self, theta: Tensor, episodes: Episodes) -> MetaGradient:
        """∂F/∂θ [N], the mean over the tasks that count, at theta [N], and ∂F/∂λ where it is learnt.

        Metrics, means over tasks: query_loss and query_accuracy (classification) after adaptation; support_loss before
        and after (support_loss_before, support_loss), and what else the inner solver tells; inner_gradient_norm
        ‖∇L + λ(φ − θ)‖; solve_residual, relative to ‖v‖; solve_iterations; and the fractions of tasks with
        negative_curvature ("cg") or that diverged ("neumann", "fixed_point"), non_finite, and left out (skipped).

        Raises:
            TypeError, ValueError: theta or the episodes have a wrong dtype, shape or device.
            CGError: with `negative_curvature="raise"` only.
        """
        theta = one_row(theta)
        inner = self._solve(theta, episodes.support)
        phi = inner.phi  # [B, N]
        v, metrics = query_gradient(self.loss, phi, episodes.query)  # [B, N]
        lam = self._coefficient(phi)  # [1 or B, 1 or N]

        # (H + Λ + δI) u = v, H linearised once at φ; ∂F/∂θ = mean Λu, ∂F/∂λ = −mean u ⊙ (φ − θ).
        operator = curvature_operator(self.curvature, self.loss, phi, episodes.support)
        solution = implicit_solve(
            operator,
            v,
            lam=lam,
            damping=self.damping,
            cg_steps=self.cg_steps,
            cg_rtol=self.cg_rtol,
            negative_curvature=self.negative_curvature,
            solver=self.solver,
            solver_lr=self.solver_lr,
        )
        gradient = task_mean(lam * solution.u, solution.counts)
        lam_gradient = self._lam_gradient(-solution.u * (phi - theta), solution.counts)

        proximal = prox_gradient_(operator.gradient.clone(), phi, theta, lam)  # [B, N]
        metrics |= {
            **inner.metrics,
            "support_loss": operator.losses.mean(),
            "inner_gradient_norm": torch.linalg.vector_norm(proximal, dim=1).mean(),
            "solve_residual": _relative(solution.residual_norm, v).mean(),
            "solve_iterations": solution.iterations.to(v.dtype).mean(),
            "negative_curvature" if self.solver == "cg" else "diverged": solution.broke_down.to(v.dtype).mean(),
            **count_metrics(solution.counts, ~solution.non_finite, v.dtype),
        }
        return MetaGradient(gradient, solution.counts.sum(), metrics, lam_gradient)


def _relative(residual_norm: Tensor, v: Tensor) -> Tensor:
    """‖v − A u‖ / ‖v‖, 0 for v = 0: [B]."""
    norm = torch.linalg.vector_norm(v, dim=1)
    return torch.where(norm == 0, 0.0, residual_norm.to(v.dtype) / norm)
