"""What every solver of the inner problem, argmin_φ L(φ) + ½ Σ_j λ_j (φ_j − θ_j)², offers the meta-gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from imaml_ext.models import LossFunction
from imaml_ext.ops import Coefficient


@dataclass(frozen=True)
class InnerResult:
    """Where the inner solver ended; every field stays on the device.

    Attributes:
        phi: [B, N] task parameters, without a graph.
        losses: [steps, B] support loss before each step.
        steps: [B] int64, steps taken by each task (fewer than asked for only where it stopped by itself).
        final_loss: [B] support loss at phi; None unless measured.
        final_gradient_norm: [B] ‖∇L(φ) + λ (φ − θ)‖, zero at the exact solution; None unless measured.
    """

    phi: Tensor
    losses: Tensor
    steps: Tensor
    final_loss: Tensor | None = None
    final_gradient_norm: Tensor | None = None

    @property
    def metrics(self) -> dict[str, Tensor]:
        """0-d means over the tasks that describe the solve, for the log."""
        return {"support_loss_before": self.losses[0].mean()} if len(self.losses) else {}


class InnerSolver(Protocol):
    """Settings of a solver, and the solver."""

    def solve(
        self,
        loss: LossFunction,
        theta: Tensor,
        data: Any,
        *,
        lam: Coefficient,
        num_tasks: int | None = None,
        measure: bool = False,
    ) -> InnerResult:
        """phi [B, N] near the minimum of every task's proximal objective, from φ = θ; no host synchronisation.

        Args:
            loss: losses [B] = loss(params [B, N], data), row b from row b alone.
            theta: [N] shared, or [B, N]; float32 or float64. Not changed.
            data: handed to `loss`; `data.x` [B, …] tells the number of tasks.
            lam: λ ≥ 0, a number, one a task [B], one a parameter [N], or [B, N].
            num_tasks: B, where `data` has no `x`.
            measure: evaluate loss and proximal gradient once more, at the end.
        """
        ...
