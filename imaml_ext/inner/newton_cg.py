"""Hessian-free minimisation of the proximal problem of every task: Newton-CG with a line search a task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imaml_ext import ops
from imaml_ext.checks import check_choice, check_int, check_number
from imaml_ext.inner.arguments import task_losses
from imaml_ext.inner.curvature import CURVATURES, CurvatureOperator, GaussNewtonOperator, curvature_operator
from imaml_ext.inner.problem import measured, start
from imaml_ext.inner.solver import InnerResult
from imaml_ext.models import LossFunction, TaskLoss
from imaml_ext.ops import Coefficient
from imaml_ext.solvers import CGStatus, cg


@dataclass(frozen=True)
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
        """Those of `InnerResult`, the mean step size, the fractions of steps not taken and of negative curvature."""
        if not len(self.losses):
            return {}
        return {
            **super().metrics,
            "newton_step_size": self.step_sizes.mean(),
            "newton_stayed": (self.step_sizes == 0).to(self.phi.dtype).mean(),
            "newton_negative_curvature": self.negative_curvature.to(self.phi.dtype).mean(),
        }


@dataclass(frozen=True, eq=False)
class HessianFree:
    """Newton-CG on the proximal problem, as an `InnerSolver`; what it does, `newton_cg` says.

    Args:
        steps, cg_steps, cg_rtol, curvature, damping, armijo, backtracks, shrink, stop_early: of `newton_cg`.

    Raises:
        TypeError, ValueError: a setting of the wrong type or outside its range.
    """

    steps: int = 2
    cg_steps: int = 5
    cg_rtol: float = 0.0
    curvature: str = "hessian"
    damping: float = 0.0
    armijo: float = 1e-4
    backtracks: int = 10
    shrink: float = 0.5
    stop_early: bool | None = None

    def __post_init__(self) -> None:
        check_int("steps", self.steps, minimum=0)
        check_int("cg_steps", self.cg_steps, minimum=1)
        check_number("cg_rtol", self.cg_rtol, at_least=0)
        check_choice("curvature", self.curvature, CURVATURES)
        check_number("damping", self.damping, at_least=0)
        check_int("backtracks", self.backtracks, minimum=0)
        for name, value in (("armijo", self.armijo), ("shrink", self.shrink)):
            if not 0 < check_number(name, value) < 1:
                raise ValueError(f"{name} must be above 0 and below 1, got {value}")
        if self.stop_early is not None and not isinstance(self.stop_early, bool):
            raise TypeError(f"stop_early must be True, False or None, got {type(self.stop_early).__name__}")

    def solve(
        self,
        loss: LossFunction,
        theta: Tensor,
        data: Any,
        *,
        lam: Coefficient,
        num_tasks: int | None = None,
        measure: bool = False,
    ) -> NewtonResult:
        """`newton_cg` with these settings."""
        return newton_cg(loss, theta, data, lam=lam, num_tasks=num_tasks, measure=measure, **vars(self))


def newton_cg(
    loss: LossFunction,
    theta: Tensor,
    data: Any,
    *,
    lam: Coefficient,
    steps: int,
    cg_steps: int = 5,
    cg_rtol: float = 0.0,
    curvature: str = "hessian",
    damping: float = 0.0,
    armijo: float = 1e-4,
    backtracks: int = 10,
    shrink: float = 0.5,
    stop_early: bool | None = None,
    measure: bool = False,
    num_tasks: int | None = None,
) -> NewtonResult:
    """`steps` Newton steps on F_b(φ) = L_b(φ) + ½ Σ_j λ_j (φ_j − θ_j)² for every task b, from φ = θ.

    A step: (H_b + Λ + δI) d_b = −∇F_b(φ_b) by conjugate gradients, then φ_b ← φ_b + t_b d_b, t_b the first of 1, s, s²,
    … with F_b(φ_b + t d_b) ≤ F_b(φ_b) + c t ∇F_bᵀd_b. A task for which none is acceptable stays where it is, so that
    its objective never increases; one whose loss is not finite stays too, and leaves the others alone.

    Where conjugate gradients meet a direction of non-positive curvature, d is the iterate before it, and on the first
    iteration −∇F: of the Hessian, as Nocedal and Wright have it; the Gauss-Newton matrix, Martens' choice, has none.
    Either d is a direction of descent.

    One iteration of conjugate gradients needs no more of the Gauss-Newton matrix than ∇FᵀG∇F = (J∇F)ᵀC(J∇F), which is
    half a product: the cheapest step, and the one that goes furthest for its cost where F is far from quadratic, so
    that fresh derivatives are worth more than a better solve.

    Args:
        loss, theta, data, lam, measure, num_tasks: as of `gradient_descent`.
        cg_steps: iterations of the direction. cg_rtol: a task's solve stops at this relative residual.
        curvature: "hessian", or "gauss_newton" (a `TaskLoss` only).
        damping: δ ≥ 0, in the direction alone.
        armijo: c, the part of the decrease promised by the slope that a step must bring.
        backtracks: how often a step is shortened at most. shrink: s, by what.
        stop_early: look at the device after each trial, to stop when every task has its step; the result is the same to
            the bit. None: on the CPU, where looking costs nothing. Otherwise nothing waits for the device, and all
            1 + backtracks trials are evaluated.

    Raises:
        TypeError, ValueError: an argument, or what the loss returned, of the wrong type, dtype, shape or device.
        NativeUnavailableError: the compiled part is missing.

    Source: Rajeswaran et al., arXiv 1909.04630, section 4 (5 CG steps, a line search on the training loss); Nocedal and
    Wright, Numerical Optimization (2006), algorithm 7.1; Martens, Deep learning via Hessian-free optimization (2010).
    """
    HessianFree(steps, cg_steps, cg_rtol, curvature, damping, armijo, backtracks, shrink, stop_early)  # checks them
    if curvature == "gauss_newton" and not isinstance(loss, TaskLoss):
        raise TypeError(f"loss must be a TaskLoss with curvature='gauss_newton', got {type(loss).__name__}")
    phi, center, lam = start(theta, data, lam, num_tasks)
    tasks = len(phi)
    looks = phi.device.type == "cpu" if stop_early is None else stop_early

    def objective(phi: Tensor) -> tuple[Tensor, Tensor]:
        """L and F of every task, [B]."""
        with torch.no_grad():
            losses = task_losses(loss, phi, data)
            return losses, losses + ops.prox_penalty(phi, center, lam)

    losses, step_sizes = (phi.new_empty(steps, tasks) for _ in range(2))
    objectives = phi.new_empty(steps + 1, tasks)
    negative_curvature = torch.zeros(steps, tasks, dtype=torch.bool, device=phi.device)
    here = None  # L and F at φ, as the line search has measured them
    for step in range(steps):
        operator = curvature_operator(curvature, loss, phi, data)
        gradient = ops.prox_gradient_(operator.gradient.clone(), phi, center, lam)  # ∇F [B, N]
        if here is None:  # at φ = θ there is no penalty
            here = operator.losses, operator.losses
        losses[step], objectives[step] = here

        # (H + Λ + δI) d = −∇F
        if isinstance(operator, GaussNewtonOperator) and cg_steps == 1 and cg_rtol < 1:
            direction, negative_curvature[step] = _cauchy(operator, gradient, lam + damping)
        else:
            direction, negative_curvature[step] = _truncated(operator, gradient, lam + damping, cg_steps, cg_rtol)
        del operator  # and its graph, before the line search

        slope = (gradient * direction).sum(1, dtype=torch.float64)  # ∇Fᵀd [B]
        here, step_sizes[step] = _line_search(
            objective,
            phi,
            direction,
            (losses[step], objectives[step]),
            armijo * slope,
            backtracks=backtracks,
            shrink=shrink,
            looks=looks,
        )
        phi = _moved(phi, direction, step_sizes[step])
    objectives[steps] = objective(phi)[1] if here is None else here[1]

    taken = (step_sizes > 0).sum(0)
    ends = measured(loss, phi, data, center, lam, measure)
    return NewtonResult(phi, losses, taken, *ends, objectives, step_sizes, negative_curvature)


def _truncated(
    operator: CurvatureOperator, gradient: Tensor, shift: Tensor, cg_steps: int, cg_rtol: float
) -> tuple[Tensor, Tensor]:
    """d [B, N] with (H + shift) d ≈ −∇F by conjugate gradients, and where they met non-positive curvature, [B]."""
    solved = cg(
        operator,
        -gradient,
        shift=shift,
        max_iterations=cg_steps,
        rtol=cg_rtol,
        rows_per_block=operator.rows_per_block,
    )
    negative = solved.status == CGStatus.NEGATIVE_CURVATURE
    steepest = negative & (solved.iterations == 0)
    return torch.where(steepest.unsqueeze(1), -gradient, solved.x), negative


def _cauchy(operator: GaussNewtonOperator, gradient: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """`_truncated` after one iteration, d = −(‖∇F‖² / ∇Fᵀ(G + shift)∇F) ∇F, the Cauchy point of the quadratic model.

    It asks for the matrix along one vector only, so that no product is taken to its end.
    """
    norm = (gradient * gradient).sum(1, dtype=torch.float64)  # ‖∇F‖² [B]
    along = operator.curvature(gradient) + (shift * gradient * gradient).sum(1, dtype=torch.float64)
    length = torch.where(along > 0, norm / along, 1.0)
    return -length.to(gradient.dtype).unsqueeze(1) * gradient, (along <= 0) & (norm > 0)


def _line_search(
    objective: Callable[[Tensor], tuple[Tensor, Tensor]],
    phi: Tensor,
    direction: Tensor,
    here: tuple[Tensor, Tensor],
    decrease: Tensor,
    *,
    backtracks: int,
    shrink: float,
    looks: bool,
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The first t of 1, s, s², … with F(φ + t d) ≤ F(φ) + t · decrease, every row by itself.

    Args:
        here: L(φ), F(φ) [B]. decrease: c ∇Fᵀd [B] float64, negative where d descends.

    Returns:
        L and F where the rows end, and the step sizes t [B], 0 where none of them will do.
    """
    loss, start = here
    value = start
    taken = torch.zeros_like(start)
    searching = decrease < 0  # [B]; not so for a NaN, nor where the gradient is 0
    for trial in range(1 + backtracks):
        t = shrink**trial
        trial_loss, trial_value = objective(_moved(phi, direction, torch.where(searching, t, taken)))
        # In the precision of F: a decrease that it cannot resolve is none.
        accepted = searching & (trial_value.double() <= start.double() + t * decrease) & (trial_value <= start)
        loss, value = torch.where(accepted, trial_loss, loss), torch.where(accepted, trial_value, value)
        taken = torch.where(accepted, t, taken)
        searching = searching & ~accepted
        if looks and not bool(searching.any()):
            break
    return (loss, value), taken


def _moved(phi: Tensor, direction: Tensor, t: Tensor) -> Tensor:
    """φ + t d, and φ itself where t = 0, whatever d is."""
    t = t.to(phi.dtype).unsqueeze(1)
    return torch.where(t > 0, torch.addcmul(phi, direction, t), phi)
