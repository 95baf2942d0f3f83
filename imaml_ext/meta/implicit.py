"""The linear system behind an implicit gradient: (H_b + Λ + δI) u_b = v_b for every task b."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_ext.inner.arguments import check_choice, check_int, check_number
from imaml_ext.meta.curvature import CurvatureOperator
from imaml_ext.ops import Coefficient, as_coefficient
from imaml_ext.solvers import CGError, CGResult, CGStatus, cg

REACTIONS = ("keep", "gradient", "skip", "raise")


@dataclass(frozen=True)
class ImplicitSolution:
    """Every task's u, on the device.

    Attributes:
        u: [B, N]; zero in a task that does not count.
        counts: [B] bool: the task takes part in a mean over tasks.
        cg: what the solver said of every task.
    """

    u: Tensor
    counts: Tensor
    cg: CGResult

    @property
    def negative_curvature(self) -> Tensor:
        """[B] bool: H + Λ + δI was found not to be positive definite."""
        return self.cg.status == CGStatus.NEGATIVE_CURVATURE

    @property
    def non_finite(self) -> Tensor:
        """[B] bool: NaN or infinity in v or in a product."""
        return self.cg.status == CGStatus.NON_FINITE


def implicit_solve(
    operator: CurvatureOperator,
    v: Tensor,
    *,
    lam: Coefficient,
    damping: float = 0.0,
    cg_steps: int = 5,
    cg_rtol: float = 1e-5,
    negative_curvature: str = "keep",
) -> ImplicitSolution:
    """Conjugate gradients on (H_b + Λ + δI) u_b = v_b; then ∂F/∂θ = mean Λu and ∂F/∂λ = −mean u ⊙ (φ − θ).

    Where the matrix has a direction of non-positive curvature, φ is not a minimiser of the proximal problem and the
    implicit function theorem says nothing; the task is then treated as `negative_curvature` says:

    - "keep": u is the iterate that CG had before it met the direction (Steihaug's rule), v / (λ + δ) on the first step;
    - "gradient": u = v / (λ + δ), which takes the curvature for zero: a first-order gradient, scaled by λ / (λ + δ);
    - "skip": the task does not count;
    - "raise": an error, at the price of waiting for the device.

    Tasks with NaN or infinite entries never count (with "raise", they raise). Both kinds are marked in the result.

    Args:
        operator: p [B, N] -> H p [B, N]. v: [B, N] query gradients.
        lam: λ > 0, a number, [B], [N] or [B, N]. damping: δ ≥ 0.
        cg_steps, cg_rtol: at most so many products; stop at this relative residual.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        CGError: with "raise" only.

    Source: Rajeswaran et al., arXiv 1909.04630, equations 6 and 7; Steihaug (1983).
    """
    check_choice("negative_curvature", negative_curvature, REACTIONS)
    check_number("damping", damping, at_least=0)
    check_int("cg_steps", cg_steps, minimum=1)
    if not isinstance(v, Tensor):
        raise TypeError(f"v must be a tensor, got {type(v).__name__}")
    if v.dim() != 2:
        raise ValueError(f"v must have shape [B, N] (one row a task), got {list(v.shape)}")
    shift = as_coefficient(lam, "lam", v).detach() + damping  # [1 or B, 1 or N]
    result = cg(operator, v, shift=shift, max_iterations=cg_steps, rtol=cg_rtol)
    if negative_curvature == "raise":
        _raise_if_broken(result)
    u, counts = result.x, result.status != CGStatus.NON_FINITE
    if negative_curvature != "keep":
        negative = result.status == CGStatus.NEGATIVE_CURVATURE
        if negative_curvature == "gradient":
            u = torch.where(negative.unsqueeze(1), v / shift, u)
        else:
            counts = counts & ~negative
    return ImplicitSolution(torch.where(counts.unsqueeze(1), u, 0.0), counts, result)


def _raise_if_broken(result: CGResult) -> None:
    """Raises CGError where a row has met negative curvature or a NaN; unspent residuals are no error."""
    broken = result.status >= CGStatus.NEGATIVE_CURVATURE
    if bool(broken.any()):
        rows = broken.nonzero().flatten().tolist()
        kinds = sorted({CGStatus(status) for status in result.status[broken].tolist()})
        said = "; ".join(f"{kind.name}: {kind.advice}" for kind in kinds)
        raise CGError(f"the implicit system of {len(rows)} of {len(broken)} tasks ({rows[:8]}) has no solution: {said}")
