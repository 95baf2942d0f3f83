"""What a loss answers for itself: values, gradients, and products with its curvature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from imaml_ext.batch import Data
from imaml_ext.checks import check_int
from imaml_ext.losses.curvature import CurvatureOperator, HessianOperator
from imaml_ext.losses.gradients import check_losses, task_gradient
from imaml_ext.models.layout import ParameterLayout

LossFunction = Callable[[Tensor, Any], Tensor]  # params [B, N], data -> losses [B], row b from row b alone


class LossGradient(NamedTuple):
    """Losses [B], outputs [B, S, *] where the loss has them, and every task's gradient [B, N]; without a graph."""

    losses: Tensor
    outputs: Tensor | None
    gradient: Tensor


class Loss(Protocol):
    """losses [B] = loss(params [B, N], data), row b from row b alone, with its derivatives.

    `TaskLoss` is one; `as_loss` makes one of any function of the same form. Algorithms ask nothing else of a loss.

    Attributes:
        layout: where the named parameters lie in a row; None where the loss does not know.
        curvatures: the kinds of `linearize`, out of "hessian" and "gauss_newton".
    """

    curvatures: tuple[str, ...]

    @property
    def layout(self) -> ParameterLayout | None: ...

    def __call__(self, params: Tensor, data: Any) -> Tensor:
        """Returns the losses [B], twice differentiable in params [B, N]."""
        ...

    def gradient(self, params: Tensor, data: Any) -> LossGradient:
        """Returns losses and gradients of all tasks in one pass, without a graph."""
        ...

    def measure(self, params: Tensor, data: Any) -> tuple[Tensor, Tensor | None]:
        """Returns the losses [B] and, in classification, the accuracies [B], without a graph."""
        ...

    def accuracy(self, outputs: Tensor | None, targets: Tensor) -> Tensor | None:
        """Returns the accuracies [B] of the outputs, None where there are none."""
        ...

    def linearize(self, params: Tensor, data: Any, kind: str = "hessian") -> CurvatureOperator:
        """Returns products with the curvature `kind` around params [B, N]: linearised once, multiplied often."""
        ...

    def descend_(self, phi: Tensor, theta: Tensor, data: Any, *, lam: Tensor, lr: Tensor, steps: int) -> Tensor | None:
        """Takes `steps` proximal gradient steps in place at once; None, with nothing done, where it has no such way."""
        ...


class FunctionLoss:
    """A `Loss` from a function, by automatic differentiation."""

    curvatures = ("hessian",)
    layout = None

    def __init__(self, function: LossFunction) -> None:
        self.function = function

    def __call__(self, params: Tensor, data: Any) -> Tensor:
        losses = self.function(params, data)
        check_losses(losses, params.shape[0], "loss")
        return losses

    def gradient(self, params: Tensor, data: Any) -> LossGradient:
        leaf = params.detach().requires_grad_()
        with torch.enable_grad():
            losses = self(leaf, data)
            gradient = task_gradient(losses, leaf)
        return LossGradient(losses.detach(), None, gradient)

    def measure(self, params: Tensor, data: Any) -> tuple[Tensor, None]:
        with torch.no_grad():
            return self(params, data), None

    def accuracy(self, outputs: Tensor | None, targets: Tensor) -> None:
        return None

    def linearize(self, params: Tensor, data: Any, kind: str = "hessian") -> CurvatureOperator:
        check_curvature(self, kind)
        task_rows(params, data, None)
        return HessianOperator(self, params, data)

    def descend_(self, phi: Tensor, theta: Tensor, data: Any, *, lam: Tensor, lr: Tensor, steps: int) -> None:
        return None


def as_loss(loss: Any) -> Loss:
    """Returns a loss as it is, and a function as a `Loss`.

    Raises:
        TypeError: it is neither.
    """
    if hasattr(loss, "linearize"):
        return loss
    if not callable(loss):
        raise TypeError(f"loss must be a TaskLoss or a function, got {type(loss).__name__}")
    return FunctionLoss(loss)


def check_curvature(loss: Loss, kind: str) -> None:
    """Raises TypeError or ValueError unless the loss has this kind of curvature."""
    if kind not in ("hessian", "gauss_newton"):
        raise ValueError(f"curvature must be one of 'hessian', 'gauss_newton', got {kind!r}")
    if kind not in loss.curvatures:
        raise TypeError(
            f"loss must be a TaskLoss with curvature={kind!r}, which needs outputs and criterion apart, got a function"
        )


def task_rows(theta: Tensor, data: Data | Any, num_tasks: int | None) -> tuple[Tensor, int]:
    """Returns theta as [1, N] or [B, N], and B: `num_tasks`, else the rows of data.x, else those of theta.

    Raises:
        TypeError, ValueError: theta is not a floating-point [N] or [B, N], or B is unknown or contradictory.
    """
    if not isinstance(theta, Tensor):
        raise TypeError(f"theta must be a tensor, got {type(theta).__name__}")
    if theta.dim() not in (1, 2):
        raise ValueError(f"theta must have shape [N], or [B, N] with one row per task, got {list(theta.shape)}")
    if theta.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"theta must be float32 or float64, got {theta.dtype}")
    x = getattr(data, "x", None)
    tasks = num_tasks
    if tasks is None and isinstance(x, Tensor) and x.dim() > 0:
        tasks = x.shape[0]
    if tasks is None and theta.dim() == 2:
        tasks = theta.shape[0]
    if tasks is None:
        raise ValueError("num_tasks must be given where neither data.x nor theta has one row per task")
    check_int("num_tasks", tasks, minimum=1)
    if theta.dim() == 2 and theta.shape[0] != tasks:
        raise ValueError(f"theta must have shape [N] or [{tasks}, N] (one row per task), got {list(theta.shape)}")
    if isinstance(x, Tensor) and x.device != theta.device:
        raise ValueError(f"data.x must be on the device of theta, {theta.device}, got {x.device}")
    return (theta.unsqueeze(0) if theta.dim() == 1 else theta), tasks
