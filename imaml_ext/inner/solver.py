"""What every solver of the inner problem, argmin_φ L(φ) + ½ Σ_j λ_j (φ_j − θ_j)², offers, begins and ends with."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from imaml_ext import ops
from imaml_ext.losses.loss import Loss, LossFunction, as_loss, task_rows
from imaml_ext.ops import Coefficient
from imaml_ext.settings import Choice


@dataclass(frozen=True, eq=False)
class Moments:
    """What a rule of descent keeps from step to step beside φ.

    Attributes:
        vectors: [N] or [B, N] each: of momentum the velocity, of Adam the first and the second moment.
        steps: how many steps they come from, for Adam's correction of the bias.
    """

    vectors: tuple[Tensor, ...]
    steps: int


@dataclass(frozen=True, eq=False)
class InnerResult:
    """Where the inner solver ended; every field stays on the device.

    Attributes:
        phi: [B, N] task parameters, without a graph.
        losses: [steps, B] support loss before each step.
        steps: [B] int64, steps taken by each task (fewer than asked for only where it stopped by itself).
        final_loss: [B] support loss at phi; None unless measured.
        final_gradient_norm: [B] ‖∇L(φ) + λ (φ − θ)‖, zero at the exact solution; None unless measured.
        moments: of the rule at the end, [B, N] each; None unless it began with given ones.
    """

    phi: Tensor
    losses: Tensor
    steps: Tensor
    final_loss: Tensor | None = None
    final_gradient_norm: Tensor | None = None
    moments: Moments | None = None

    @property
    def metrics(self) -> dict[str, Tensor]:
        """{name: [B]}, numbers that describe every task's solve, for the log."""
        return {"support_loss_before": self.losses[0]} if len(self.losses) else {}


class InnerSolver(Choice):
    """Settings of an inner solver, and the solver. A new one is a file, and an entry of `kinds`.

    Attributes:
        steps: how many it takes at most; 0 leaves φ at θ.
    """

    kinds: ClassVar[dict[str, str]] = {
        "gradient_descent": "imaml_ext.inner.gradient_descent.GradientDescent",
        "newton_cg": "imaml_ext.inner.newton_cg.NewtonCG",
    }
    steps: int

    def solve(
        self,
        loss: Loss | LossFunction,
        theta: Tensor,
        data: Any,
        *,
        lam: Coefficient,
        num_tasks: int | None = None,
        start: Tensor | None = None,
        moments: Moments | None = None,
        measure: bool = False,
    ) -> InnerResult:
        """Returns phi [B, N] near the minimum of every task's proximal objective, from φ = θ; nothing waits.

        Args:
            loss: losses [B] = loss(params [B, N], data), row b from row b alone (a `TaskLoss`, or any such function).
            theta: [N] shared, or [B, N]; float32 or float64. Not changed.
            data: handed to `loss`; `data.x` [B, …], or what all its tensors share, tells the number of tasks.
            lam: λ ≥ 0, a number, one per task [B], one per parameter [N], or [B, N] ([B, 1] and [1, N] where B == N).
            num_tasks: B, where `data` has no `x`.
            start: φ [B, N] to begin from in place of θ.
            moments: what the rule of the steps begins with in place of zeros.
            measure: evaluate loss and proximal gradient once more, at the end.

        Raises:
            TypeError, ValueError: an argument, or what the loss returned, of the wrong type, dtype, shape or device.
            NativeUnavailableError: the compiled part is missing.
        """
        loss = as_loss(loss)
        data = loss.prepared(data)
        rows, tasks = task_rows(theta, data, num_tasks)
        center = rows.detach().contiguous()  # [1 or B, N]
        phi = (center if start is None else _checked_start(start, center, tasks)).expand(tasks, -1)
        phi = phi.clone(memory_format=torch.contiguous_format)
        coefficient = ops.as_coefficient(lam, "lam", phi, at_least=0).detach()  # [1 or B, 1 or N]
        given: dict[str, Any] = {} if moments is None else {"moments": _checked_moments(moments, self.moments, phi)}
        result = self._minimise(loss, phi, center, data, coefficient, **given)
        if not measure:
            return result
        losses, _, grad = loss.gradient(result.phi, data)
        return replace(
            result, final_loss=losses, final_gradient_norm=proximal_norm(grad, result.phi, center, coefficient)
        )

    @abstractmethod
    def _minimise(self, loss: Loss, phi: Tensor, center: Tensor, data: Any, lam: Tensor) -> InnerResult:
        """From phi [B, N], which may be changed in place; center: θ [1 or B, N], lam: [1 or B, 1 or N].

        A solver whose steps keep vectors beside φ also takes the keyword `moments`.
        """

    @property
    def moments(self) -> int:
        """How many vectors beside φ the rule of the steps keeps."""
        return 0

    def rate(self, loss: Loss, like: Tensor) -> Coefficient | None:
        """Returns the step size for parameters `like` [B, N] of this loss; None where the solver has none."""
        return None


def _checked_start(start: Tensor, center: Tensor, tasks: int) -> Tensor:
    expected = (tasks, center.shape[1])
    if not isinstance(start, Tensor):
        raise TypeError(f"start must be a tensor, got {type(start).__name__}")
    if start.shape != expected or start.dtype != center.dtype or start.device != center.device:
        raise ValueError(
            f"start must be {list(expected)}, {center.dtype} on {center.device} as theta is, got {list(start.shape)}, "
            f"{start.dtype} on {start.device}"
        )
    return start.detach()


def _checked_moments(moments: Moments, number: int, phi: Tensor) -> Moments:
    if not number:
        raise ValueError("moments must be None for a solver whose steps keep none")
    if len(moments.vectors) != number:
        raise ValueError(f"moments must hold {number} vectors, as the rule keeps, got {len(moments.vectors)}")
    for vector in moments.vectors:
        if vector.shape not in (phi.shape, phi.shape[1:]) or vector.dtype != phi.dtype or vector.device != phi.device:
            raise ValueError(
                f"moments must be [{phi.shape[1]}] or {list(phi.shape)}, {phi.dtype} on {phi.device} as theta is, "
                f"got {list(vector.shape)}, {vector.dtype} on {vector.device}"
            )
    return moments


def proximal_norm(grad: Tensor, phi: Tensor, theta: Tensor, lam: Tensor) -> Tensor:
    """Returns ‖∇L(φ) + λ (φ − θ)‖ of every task, [B]."""
    return torch.linalg.vector_norm(ops.prox_gradient_(grad.clone(), phi, theta, lam), dim=1)
