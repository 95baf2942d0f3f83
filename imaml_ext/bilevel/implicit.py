"""The linear system behind an implicit gradient: (H_b + Λ + δI) u_b = v_b for every task b."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from imaml_ext import _renamed
from imaml_ext.checks import check_choice, check_number
from imaml_ext.losses.curvature import CurvatureOperator
from imaml_ext.ops import Coefficient, as_coefficient
from imaml_ext.solvers import CG, LinearSolver, Solution, cg

Reaction = Literal["keep", "gradient", "skip", "raise"]  # to a linear solve that breaks down


@dataclass(frozen=True, eq=False)
class ImplicitSolution:
    """Every task's u, on the device.

    Attributes:
        u: [B, N]; zero in a task that does not count.
        counted_tasks: [B] bool: the task takes part in a mean over tasks.
        solution: what the linear solver returned.
        relative_residual: [B] float64, ‖v − A x‖ / ‖v‖ of the solver's x; 0 for v = 0.
        inner_gradient_norm: [B] ‖∇L(φ) + λ (φ − θ)‖, 0 at the exact minimiser; None where φ is not known.
    """

    u: Tensor
    counted_tasks: Tensor
    solution: Solution
    relative_residual: Tensor
    inner_gradient_norm: Tensor | None = None


def relative_residual(solution: Solution, v: Tensor) -> Tensor:
    """Returns ‖v − A u‖ / ‖v‖ of every row of v [B, N], [B] float64; 0 for v = 0."""
    norm = torch.linalg.vector_norm(v, dim=1, dtype=torch.float64)
    return torch.where(norm == 0, 0.0, solution.residual_norm / norm)


@_renamed.old_keywords(_renamed.solver_keywords)
def implicit_solve(
    operator: CurvatureOperator,
    v: Tensor,
    *,
    lam: Coefficient,
    damping: float = 0.0,
    linear_solver: LinearSolver | None = None,
    on_breakdown: Reaction = "keep",
    lam_preconditioner: bool = True,
) -> ImplicitSolution:
    """Solves (H_b + Λ + δI) u_b = v_b; then ∂F/∂θ = mean Λu and ∂F/∂λ = −mean u ⊙ (φ − θ).

    Where the matrix has a direction of non-positive curvature, φ is not a minimiser of the proximal problem and the
    implicit function theorem says nothing. Such a task, and one whose solver breaks down for another reason, is treated
    as `on_breakdown` says:

    - "keep": u is the solver's last good iterate: of CG the one before it met the direction, and v / (λ + δ) on its
      first step; shortened, where it is longer, to ‖(Λ + δI) u‖ = ‖v‖, the length of that first-order step, which takes
      the place of the trust region in Steihaug's rule: close to the direction, an iterate can be of any length;
    - "gradient": u = v / (λ + δ), which takes the curvature for zero: a first-order gradient, scaled by λ / (λ + δ);
    - "skip": the task does not count;
    - "raise": an error, at the price of waiting for the device.

    Tasks with NaN or infinite entries never count (with "raise", they raise). Both kinds are marked in the result.

    Args:
        operator: p [B, N] -> H p [B, N]. v: [B, N] query gradients.
        lam: λ > 0, a number, [B], [N] or [B, N]. damping: δ ≥ 0.
        linear_solver: `CG()` unless given.
        lam_preconditioner: with λ per parameter, a `CG` that has no preconditioner divides by λ + δ, for no product.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        SolveError: with "raise" only.

    Source: Rajeswaran et al., arXiv 1909.04630, equations 6 and 7; Steihaug (1983).
    """
    check_choice("on_breakdown", on_breakdown, get_args(Reaction))
    check_number("damping", damping, at_least=0)
    solver = CG() if linear_solver is None else linear_solver
    if not isinstance(solver, LinearSolver):
        raise TypeError(f"linear_solver must be a LinearSolver such as CG(), got {type(solver).__name__}")
    if not isinstance(v, Tensor):
        raise TypeError(f"v must be a tensor, got {type(v).__name__}")
    if v.dim() != 2:
        raise ValueError(f"v must have shape [B, N] (one row per task), got {list(v.shape)}")
    shift = as_coefficient(lam, "lam", v).detach() + damping  # [1 or B, 1 or N]
    if lam_preconditioner and type(solver) is CG and solver.preconditioner is None and shift.shape[1] > 1:
        solution = _divided_by(shift, solver, operator, v)
    else:
        solution = solver.solve(operator, v, shift)
    if on_breakdown == "raise":
        solution.raise_if_failed(unfinished=False, what="tasks' implicit systems")
    u, counted = solution.x, ~solution.non_finite
    if on_breakdown == "keep":
        longest, length = (torch.linalg.vector_norm(step, dim=1) for step in (v, shift * u))
        too_long = solution.broke_down & (length > longest)
        u = u * torch.where(too_long, longest / length, 1.0).unsqueeze(1)
    elif on_breakdown == "gradient":
        u = torch.where(solution.broke_down.unsqueeze(1), v / shift, u)
    elif on_breakdown == "skip":
        counted = counted & ~solution.broke_down
    u = torch.where(counted.unsqueeze(1), u, 0.0)
    return ImplicitSolution(u, counted, solution, relative_residual(solution, v))


def _divided_by(shift: Tensor, solver: CG, operator: CurvatureOperator, v: Tensor) -> Solution:
    """x [B, N] with (H + shift) x = v. H is of low rank in small tasks, and 1 / shift then most of the inverse."""
    positive = (shift > 0).all(1, keepdim=True)  # in `argmin`, λ may be 0
    options = {**vars(solver), "preconditioner": torch.where(positive, 1 / shift, 1.0)}
    return cg(operator, v, shift=shift, rows_per_block=getattr(operator, "rows_per_block", None), **options)
