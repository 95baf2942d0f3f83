"""The linear system behind an implicit gradient: (H_b + Λ + δI) u_b = v_b for every task b."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from imaml_ext.checks import check_choice, check_int, check_number
from imaml_ext.inner.curvature import CurvatureOperator
from imaml_ext.meta.richardson import richardson
from imaml_ext.ops import Coefficient, as_coefficient
from imaml_ext.solvers import CGError, CGStatus, cg

REACTIONS = ("keep", "gradient", "skip", "raise")
SOLVERS = ("cg", "neumann", "fixed_point")


@dataclass(frozen=True)
class ImplicitSolution:
    """Every task's u, on the device.

    Attributes:
        u: [B, N]; zero in a task that does not count.
        counts: [B] bool: the task takes part in a mean over tasks.
        residual_norm: [B] float64, ‖v − (H + Λ + δI) u‖; of a series, see `imaml_ext.meta.richardson`.
        iterations: [B] int32, of the solver.
        broke_down: [B] bool: conjugate gradients found H + Λ + δI not to be positive definite, or a series diverged.
        non_finite: [B] bool: NaN or infinity in v or in a product.
    """

    u: Tensor
    counts: Tensor
    residual_norm: Tensor
    iterations: Tensor
    broke_down: Tensor
    non_finite: Tensor


def implicit_solve(
    operator: CurvatureOperator,
    v: Tensor,
    *,
    lam: Coefficient,
    damping: float = 0.0,
    cg_steps: int = 5,
    cg_rtol: float = 1e-5,
    negative_curvature: str = "keep",
    solver: str = "cg",
    solver_lr: Coefficient | None = None,
) -> ImplicitSolution:
    """(H_b + Λ + δI) u_b = v_b; then ∂F/∂θ = mean Λu and ∂F/∂λ = −mean u ⊙ (φ − θ).

    Where the matrix has a direction of non-positive curvature, φ is not a minimiser of the proximal problem and the
    implicit function theorem says nothing; the task is then treated as `negative_curvature` says, and so is one whose
    series diverges:

    - "keep": u is the last good iterate: the one that CG had before it met the direction (Steihaug's rule), v / (λ + δ)
      on its first step; the one before the residual of a series grew;
    - "gradient": u = v / (λ + δ), which takes the curvature for zero: a first-order gradient, scaled by λ / (λ + δ);
    - "skip": the task does not count;
    - "raise": an error, at the price of waiting for the device.

    Tasks with NaN or infinite entries never count (with "raise", they raise). Both kinds are marked in the result.

    Args:
        operator: p [B, N] -> H p [B, N]. v: [B, N] query gradients.
        lam: λ > 0, a number, [B], [N] or [B, N]. damping: δ ≥ 0.
        cg_steps, cg_rtol: at most so many products with H; stop at this relative residual. Of every solver.
        solver: "cg"; "neumann", the series of (I + H / (λ + δ))⁻¹, which converges where ‖H‖ < λ + δ; "fixed_point",
            u ← u − α ((H + Λ + δI) u − v), which converges where α ‖H + Λ + δI‖ < 2.
        solver_lr: α > 0 of "fixed_point", in the forms of lam.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        CGError: with "raise" only.

    Source: Rajeswaran et al., arXiv 1909.04630, equations 6 and 7; Steihaug (1983).
    """
    check_choice("negative_curvature", negative_curvature, REACTIONS)
    check_choice("solver", solver, SOLVERS)
    check_number("damping", damping, at_least=0)
    check_int("cg_steps", cg_steps, minimum=1)
    check_number("cg_rtol", cg_rtol, at_least=0)
    if (solver_lr is not None) != (solver == "fixed_point"):
        raise ValueError(f"solver_lr must be given for solver='fixed_point' and for no other, got {solver_lr!r}")
    if not isinstance(v, Tensor):
        raise TypeError(f"v must be a tensor, got {type(v).__name__}")
    if v.dim() != 2:
        raise ValueError(f"v must have shape [B, N] (one row a task), got {list(v.shape)}")
    shift = as_coefficient(lam, "lam", v).detach() + damping  # [1 or B, 1 or N]
    if solver == "cg":
        solved = cg(
            operator,
            v,
            shift=shift,
            max_iterations=cg_steps,
            rtol=cg_rtol,
            rows_per_block=getattr(operator, "rows_per_block", None),
        )
        broke_down = solved.status == CGStatus.NEGATIVE_CURVATURE
        non_finite = solved.status == CGStatus.NON_FINITE
        result = ImplicitSolution(
            solved.x, ~non_finite, solved.residual_norm, solved.iterations, broke_down, non_finite
        )
    else:
        step = 1 / shift if solver_lr is None else as_coefficient(solver_lr, "solver_lr", v).detach()
        series = richardson(operator, v, shift=shift, step=step, products=cg_steps, rtol=cg_rtol)
        result = ImplicitSolution(
            series.x, ~series.non_finite, series.residual_norm, series.iterations, series.diverged, series.non_finite
        )
    if negative_curvature == "raise":
        _raise_if_broken(result, solver)
    u, counts = result.u, result.counts
    if negative_curvature == "gradient":
        u = torch.where(result.broke_down.unsqueeze(1), v / shift, u)
    elif negative_curvature == "skip":
        counts = counts & ~result.broke_down
    return replace(result, u=torch.where(counts.unsqueeze(1), u, 0.0), counts=counts)


def _raise_if_broken(solution: ImplicitSolution, solver: str) -> None:
    """Raises CGError where a row has broken down or met a NaN; unspent residuals are no error."""
    broken = solution.broke_down | solution.non_finite
    if not bool(broken.any()):
        return
    rows = broken.nonzero().flatten().tolist()
    said = []
    if solver != "cg" and bool(solution.broke_down.any()):
        said.append("DIVERGED: the residual has grown: raise lam or damping, lower solver_lr, or use solver='cg'")
    statuses = [(CGStatus.NON_FINITE, solution.non_finite)]
    if solver == "cg":
        statuses.insert(0, (CGStatus.NEGATIVE_CURVATURE, solution.broke_down))
    said += [f"{status.name}: {status.advice}" for status, rows_of in statuses if bool(rows_of.any())]
    raise CGError(
        f"the implicit system of {len(rows)} of {len(broken)} tasks ({rows[:8]}) has no solution: {'; '.join(said)}"
    )
