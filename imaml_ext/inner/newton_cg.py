"""Newton's method on the proximal problem of every task, with conjugate gradients and a line search per task."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from imaml_ext import _renamed, ops
from imaml_ext.inner.solver import InnerResult, InnerSolver
from imaml_ext.losses.curvature import CurvatureOperator
from imaml_ext.losses.loss import Loss
from imaml_ext.ops.recording import recordable, recording
from imaml_ext.settings import NOT_NEGATIVE, Bounds
from imaml_ext.solvers import CG, LinearSolver

# A change of F by so many times the resolution of its dtype is lost in the rounding of the sums that F is made of.
_ROUNDINGS = 50


@dataclass(frozen=True, eq=False)
class NewtonResult(InnerResult):
    """An `InnerResult` that also says how the steps went.

    Attributes:
        objectives: [steps + 1, B] L(φ) + ½ Σ λ (φ − θ)² before each step and at the end; no column ever increases.
        step_sizes: [steps, B], 0 where no step was acceptable and the task stayed.
        negative_curvature: [steps, B] bool, conjugate gradients met a direction of non-positive curvature.
    """

    objectives: Tensor = None  # type: ignore[assignment]  # never left out; the fields before it have defaults
    step_sizes: Tensor = None  # type: ignore[assignment]
    negative_curvature: Tensor = None  # type: ignore[assignment]

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Those of `InnerResult`, the mean step size, the parts of steps not taken and of negative curvature."""
        if not len(self.losses):
            return {}
        return {
            **super().metrics,
            "newton_step_size": self.step_sizes.mean(0),
            "newton_stayed": (self.step_sizes == 0).to(self.phi.dtype).mean(0),
            "newton_negative_curvature": self.negative_curvature.to(self.phi.dtype).mean(0),
        }


@_renamed.old_keywords(functools.partial(_renamed.solver_keywords, rtol=0.0))
@dataclass(frozen=True)
class NewtonCG(InnerSolver):
    """Takes `steps` Newton steps on F_b(φ) = L_b(φ) + ½ Σ_j λ_j (φ_j − θ_j)² for every task b.

    A step: (H_b + Λ + δI) d_b = −∇F_b(φ_b) by the linear solver, then φ_b ← φ_b + t_b d_b, t_b the first of 1, s, s²,
    … with F_b(φ_b + t d_b) ≤ F_b(φ_b) + c t ∇F_bᵀd_b. A task for which none is acceptable stays where it is, so that
    its objective never increases; one whose loss is not finite stays too, and leaves the others alone. Where the change
    of F by the whole step is lost in its rounding, ½ (∇F(φ) + ∇F(φ + d))ᵀd stands for it, and F counts as unchanged.

    Where conjugate gradients meet a direction of non-positive curvature, d is the iterate before it, and on the first
    iteration −∇F: of the Hessian, as Nocedal and Wright have it; the Gauss-Newton matrix, Martens' choice, has none.
    Either d is a direction of descent.

    One iteration of conjugate gradients needs no more of the Gauss-Newton matrix than ∇FᵀG∇F = (J∇F)ᵀC(J∇F), which is
    half a product. It is the cheapest step, and the one that goes furthest for its cost where F is far from quadratic.

    Source: Rajeswaran et al., arXiv 1909.04630, section 4 (5 CG steps, a line search on the training loss); Nocedal and
    Wright, Numerical Optimization (2006), algorithm 7.1; Martens, Deep learning via Hessian-free optimization (2010).
    Slopes in place of F: Hager and Zhang, A new conjugate gradient method with guaranteed descent and an efficient line
    search (2005), the approximate Wolfe conditions.
    """

    steps: Annotated[int, NOT_NEGATIVE] = 2  # Newton steps per task.
    # Solver of the direction.
    linear_solver: LinearSolver = field(default_factory=lambda: CG(max_iterations=5, rtol=0.0))
    curvature: Literal["hessian", "gauss_newton"] = "hessian"  # Matrix of the direction.
    damping: Annotated[float, NOT_NEGATIVE] = 0.0  # delta >= 0, added to lambda in the direction alone.
    # Part c of the decrease promised by the slope that a step must bring.
    armijo: Annotated[float, Bounds(above=0, below=1)] = 1e-4
    # How often a step is shortened at most, before the task stays where it is.
    backtracks: Annotated[int, NOT_NEGATIVE] = 10
    shrink: Annotated[float, Bounds(above=0, below=1)] = 0.5  # Factor s by which a step is shortened.
    # Look at the device after each trial, to stop when every task has its step; unset: on the CPU. Same result.
    stop_early: bool | None = None
    # Part of its first gradient norm at which a task stays; when all do, the steps end early as above.
    relative_tolerance: Annotated[float, NOT_NEGATIVE] = 0.0

    @classmethod
    def upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {"relative_tolerance": 0.0, **super().upgraded(values)}

    def _minimise(self, loss: Loss, phi: Tensor, center: Tensor, data: Any, lam: Tensor) -> NewtonResult:
        loss.check_curvature(self.curvature)

        def objective(phi: Tensor) -> tuple[Tensor, Tensor]:
            """L and F of every task, [B]."""
            with recording():  # for a loss that takes derivatives itself
                losses = loss(recordable(phi), recordable(data)).detach()
            return losses, losses + ops.prox_penalty(phi, center, lam)

        def slope_at(phi: Tensor, direction: Tensor) -> Tensor:
            """∇F(φ)ᵀd of every task, [B] float64."""
            gradient = ops.prox_gradient_(loss.gradient(phi, data).gradient.clone(), phi, center, lam)
            return (gradient * direction).sum(1, dtype=torch.float64)

        losses, step_sizes = (phi.new_empty(self.steps, len(phi)) for _ in range(2))
        objectives = phi.new_empty(self.steps + 1, len(phi))
        negative_curvature = torch.zeros(self.steps, len(phi), dtype=torch.bool, device=phi.device)
        here = None  # L and F at φ, as the line search has measured them
        enough: Tensor | float = 0.0  # gradient norms [B] at which tasks stay
        for step in range(self.steps):
            operator = loss.linearize(phi, data, self.curvature)
            gradient = ops.prox_gradient_(operator.gradient.clone(), phi, center, lam)  # ∇F [B, N]
            if here is None:
                here = operator.losses, operator.losses + ops.prox_penalty(phi, center, lam)
            losses[step], objectives[step] = here
            norm = torch.linalg.vector_norm(gradient, dim=1)
            enough = self.relative_tolerance * norm if step == 0 else enough
            arrived = norm <= enough  # [B]; not so for a NaN
            if self.relative_tolerance > 0 and self._looks(phi) and bool(arrived.all()):
                losses[step:], objectives[step:], step_sizes[step:] = *here, 0.0
                break

            direction, negative_curvature[step] = self._direction(operator, gradient, lam + self.damping)
            del operator  # and its graph, before the line search

            slope = (gradient * direction).sum(1, dtype=torch.float64)  # ∇Fᵀd [B]
            slope = torch.where(arrived, 0.0, slope)
            here, step_sizes[step] = self._line_search(
                objective, slope_at, phi, direction, (losses[step], objectives[step]), slope
            )
            phi = _moved(phi, direction, step_sizes[step])
        objectives[self.steps] = objective(phi)[1] if here is None else here[1]

        found: dict[str, Any] = {
            "objectives": objectives,
            "step_sizes": step_sizes,
            "negative_curvature": negative_curvature,
        }
        return NewtonResult(phi, losses, (step_sizes > 0).sum(0), **found)

    def _looks(self, phi: Tensor) -> bool:
        return phi.device.type == "cpu" if self.stop_early is None else self.stop_early

    def _direction(self, operator: CurvatureOperator, gradient: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """d [B, N] with (H + shift) d ≈ −∇F, and where the solver met non-positive curvature, [B]."""
        solver = self.linear_solver
        if (
            isinstance(solver, CG)
            and solver.preconditioner is None
            and solver.max_iterations == 1
            and solver.rtol < 1
            and operator.kind == "gauss_newton"
        ):
            return _cauchy(operator, gradient, shift)
        solved = solver.solve(operator, -gradient, shift)
        negative = solved.broke_down
        steepest = negative & (solved.iterations == 0)
        return torch.where(steepest.unsqueeze(1), -gradient, solved.x), negative

    def _line_search(
        self,
        objective: Callable[[Tensor], tuple[Tensor, Tensor]],
        slope_at: Callable[[Tensor, Tensor], Tensor],
        phi: Tensor,
        direction: Tensor,
        here: tuple[Tensor, Tensor],
        slope: Tensor,
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The first t of 1, s, s², … with F(φ + t d) ≤ F(φ) + c t ∇Fᵀd, every row by itself.

        Where that decrease is lost in the rounding of F, the slopes at both ends of the whole step tell it.

        Args:
            here: L(φ), F(φ) [B]. slope: ∇Fᵀd [B] float64, negative where d descends.

        Returns:
            L and F where the rows end, and the step sizes t [B], 0 where none of them will do.
        """
        looks = self._looks(phi)
        loss, start = here
        value = start
        taken = torch.zeros_like(start)
        decrease = self.armijo * slope
        searching = slope < 0  # [B]; not so for a NaN, nor where the gradient is 0
        for trial in range(1 + self.backtracks):
            t = self.shrink**trial
            moved = _moved(phi, direction, torch.where(searching, t, taken))
            trial_loss, trial_value = objective(moved)
            # In the precision of F: a decrease that it cannot resolve is none.
            accepted = searching & (trial_value.double() <= start.double() + t * decrease) & (trial_value <= start)
            if trial == 0:
                rounding = _ROUNDINGS * torch.finfo(start.dtype).eps * start.abs()
                lost = searching & ~accepted & (-slope <= rounding) & ((trial_value - start).abs() <= rounding)
                if not looks or bool(lost.any()):
                    # F(φ + d) − F(φ) ≈ ½ (∇F(φ) + ∇F(φ + d))ᵀd
                    descends = lost & (0.5 * (slope + slope_at(moved, direction)) <= decrease)
                    accepted, trial_value = accepted | descends, torch.where(descends, start, trial_value)
            loss, value = torch.where(accepted, trial_loss, loss), torch.where(accepted, trial_value, value)
            taken = torch.where(accepted, t, taken)
            searching = searching & ~accepted
            if looks and not bool(searching.any()):
                break
        return (loss, value), taken


def _cauchy(operator: CurvatureOperator, gradient: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """One iteration of conjugate gradients, d = −(‖∇F‖² / ∇Fᵀ(G + shift)∇F) ∇F, the Cauchy point.

    It asks for the matrix along one vector only, so that no product is taken to its end.
    """
    norm = (gradient * gradient).sum(1, dtype=torch.float64)  # ‖∇F‖² [B]
    along = operator.curvature(gradient) + (shift * gradient * gradient).sum(1, dtype=torch.float64)
    length = torch.where(along > 0, norm / along, 1.0)
    return -length.to(gradient.dtype).unsqueeze(1) * gradient, (along <= 0) & (norm > 0)


def _moved(phi: Tensor, direction: Tensor, t: Tensor) -> Tensor:
    """φ + t d, and φ itself where t = 0, whatever d is."""
    t = t.to(phi.dtype).unsqueeze(1)
    return torch.where(t > 0, torch.addcmul(phi, direction, t), phi)
