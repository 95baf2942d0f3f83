"""What a loss answers for itself: values, gradients, and products with its curvature."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imaml_ext.checks import check_choice, check_int
from imaml_ext.losses.curvature import CurvatureOperator, HessianOperator, task_gradient
from imaml_ext.models.layout import ParameterLayout

LossFunction = Callable[[Tensor, Any], Tensor]  # params [B, N], data -> losses [B], row b from row b alone


class LossGradient(NamedTuple):
    """Losses [B], outputs [B, S, *] where the loss has them, and every task's gradient [B, N]; without a graph."""

    losses: Tensor
    outputs: Tensor | None
    gradient: Tensor


class Loss(ABC):
    """losses [B] = loss(params [B, N], data), row b from row b alone, and its derivatives.

    Algorithms ask nothing else of a loss. A subclass gives the losses; what follows from them by automatic
    differentiation is here, and is overridden where there is a better way, as in `TaskLoss`.

    Attributes:
        layout: where the named parameters lie in a row; None where the loss does not know.
        curvatures: the kinds of `linearize`, out of "hessian" and "gauss_newton".
    """

    layout: ParameterLayout | None = None
    curvatures: tuple[str, ...] = ("hessian",)

    @abstractmethod
    def __call__(self, params: Tensor, data: Any) -> Tensor:
        """Returns the losses [B], twice differentiable in params [B, N]."""

    def gradient(self, params: Tensor, data: Any) -> LossGradient:
        """Returns losses and gradients of all tasks in one pass, without a graph."""
        leaf = params.detach().requires_grad_()
        with torch.enable_grad():
            losses = self(leaf, data)
            gradient = task_gradient(losses, leaf)
        return LossGradient(losses.detach(), None, gradient)

    def measure(self, params: Tensor, data: Any) -> tuple[Tensor, Tensor | None]:
        """Returns the losses [B] and, in classification, the accuracies [B], without a graph."""
        with torch.no_grad():
            return self(params, data), None

    def accuracy(self, outputs: Tensor | None, targets: Tensor) -> Tensor | None:
        """Returns the accuracies [B] of the outputs, None where there are none."""
        return None

    def linearize(self, params: Tensor, data: Any, kind: str = "hessian") -> CurvatureOperator:
        """Returns products with the curvature `kind` around params [B, N]: linearised once, multiplied often.

        Raises:
            TypeError, ValueError: params or data of a wrong dtype, shape or device, or a kind that the loss lacks.
        """
        self.check_curvature(kind)
        task_rows(params, data, None)
        return HessianOperator(self, params, data)

    def descend_(self, phi: Tensor, theta: Tensor, data: Any, *, lam: Tensor, lr: Tensor, steps: int) -> Tensor | None:
        """Takes `steps` proximal gradient steps in place at once; None, with nothing done, where it has no such way."""
        return None

    def check_curvature(self, kind: str) -> None:
        """Raises TypeError or ValueError unless the loss has this kind of curvature."""
        check_choice("curvature", kind, ("hessian", "gauss_newton"))
        if kind not in self.curvatures:
            raise TypeError(
                f"loss must be a TaskLoss with curvature={kind!r}, which needs outputs and criterion apart, got a "
                "function"
            )


class FunctionLoss(Loss):
    """A `Loss` from a function."""

    def __init__(self, function: LossFunction) -> None:
        self.function = function

    def __call__(self, params: Tensor, data: Any) -> Tensor:
        return check_losses(self.function(params, data), params.shape[0], "loss")


def as_loss(loss: Any) -> Loss:
    """Returns a loss as it is, and a function as a `Loss`; raises TypeError for anything else."""
    if isinstance(loss, Loss):
        return loss
    if not callable(loss):
        raise TypeError(f"loss must be a TaskLoss or a function, got {type(loss).__name__}")
    return FunctionLoss(loss)


def check_losses(losses: object, tasks: int, name: str) -> Tensor:
    """Returns what `name` returned; raises TypeError or ValueError unless that is one number per task."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"{name} must return a tensor, got {type(losses).__name__}")
    if losses.shape != (tasks,):
        raise ValueError(f"{name} must return one loss per task, shape [{tasks}], got {list(losses.shape)}")
    return losses


def task_rows(theta: Tensor, data: Any, num_tasks: int | None) -> tuple[Tensor, int]:
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
    if num_tasks is None and isinstance(x, Tensor) and x.dim() > 0:
        num_tasks = x.shape[0]
    if num_tasks is None and theta.dim() == 2:
        num_tasks = theta.shape[0]
    if num_tasks is None:
        raise ValueError("num_tasks must be given where neither data.x nor theta has one row per task")
    check_int("num_tasks", num_tasks, minimum=1)
    if theta.dim() == 2 and theta.shape[0] != num_tasks:
        raise ValueError(f"theta must have shape [N] or [{num_tasks}, N] (one row per task), got {list(theta.shape)}")
    if isinstance(x, Tensor) and x.device != theta.device:
        raise ValueError(f"data.x must be on the device of theta, {theta.device}, got {x.device}")
    return (theta.unsqueeze(0) if theta.dim() == 1 else theta), num_tasks
