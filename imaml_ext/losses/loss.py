"""What a loss answers for itself: values, gradients, and products with its curvature."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imaml_ext.batch import count_tasks, inputs_of
from imaml_ext.checks import check_choice, check_int
from imaml_ext.losses.curvature import CurvatureOperator, HessianOperator, task_gradient
from imaml_ext.models.layout import ParameterLayout
from imaml_ext.ops.recording import recordable, recording

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
        may_reach_others: whether it may compute with tensors beside params and data that require a gradient.
        shared: [N_s] the values that all tasks share, of a model that has such parameters.
    """

    layout: ParameterLayout | None = None
    may_reach_others: bool = True
    shared: Tensor | None = None
    curvatures: tuple[str, ...] = ("hessian",)

    @abstractmethod
    def __call__(self, params: Tensor, data: Any) -> Tensor:
        """Returns the losses [B], twice differentiable in params [B, N]."""

    def prepared(self, data: Any) -> Any:
        """Returns the data as they are best handed to this loss many times: as they are, unless a subclass knows."""
        return data

    def tasks_at_once(self, params: Tensor, data: Any) -> int | None:
        """Returns how many tasks of params [B, N] and data are best gone through together; None: all."""
        return None

    def by_autograd(self) -> Loss:
        """Returns the loss as differentiable operations, also in what the data hold."""
        return self

    def sharing(self, values: Tensor) -> Loss:
        """Returns the loss with these values [N_s] of the parameters that tasks share; a graph into them is kept.

        Raises:
            TypeError: the loss has no such parameters.
        """
        raise TypeError(f"loss must be a TaskLoss to have parameters that tasks share, got {type(self).__name__}")

    def gradient(self, params: Tensor, data: Any) -> LossGradient:
        """Returns losses and gradients of all tasks in one pass, without a graph."""
        with recording():
            leaf = recordable(params).detach().requires_grad_()
            losses = self(leaf, recordable(data))
            gradient = task_gradient(losses, leaf)
        return LossGradient(losses.detach(), None, gradient)

    def measure(self, params: Tensor, data: Any) -> tuple[Tensor, Tensor | None]:
        """Returns the losses [B] and, in classification, the accuracies [B], without a graph."""
        with recording():  # for a loss that takes derivatives itself
            return self(recordable(params).detach(), recordable(data)).detach(), None

    def accuracy(
        self, outputs: Tensor | None, targets: Any, mask: Tensor | None = None, ways: Tensor | None = None
    ) -> Tensor | None:
        """Returns the accuracies [B] of the outputs, None where there are none; mask and ways as in `TaskData`."""
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


def check_losses(losses: object, tasks: int, name: str, what: str = "loss") -> Tensor:
    """Returns what `name` returned; raises TypeError or ValueError unless that is one number per task."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"{name} must return a tensor, got {type(losses).__name__}")
    if losses.shape != (tasks,):
        raise ValueError(f"{name} must return one {what} per task, shape [{tasks}], got {list(losses.shape)}")
    return losses


def task_rows(theta: Tensor, data: Any, num_tasks: int | None) -> tuple[Tensor, int]:
    """Returns theta as [1, N] or [B, N], and B: `num_tasks`, else the rows of data.x, else those of theta, else the
    first dimension that all tensors of the data share.

    Raises:
        TypeError, ValueError: theta is not a floating-point [N] or [B, N], or B is unknown or contradictory.
    """
    if not isinstance(theta, Tensor):
        raise TypeError(f"theta must be a tensor, got {type(theta).__name__}")
    if theta.dim() not in (1, 2):
        raise ValueError(f"theta must have shape [N], or [B, N] with one row per task, got {list(theta.shape)}")
    if theta.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"theta must be float32 or float64, got {theta.dtype}")
    x = inputs_of(data)
    if num_tasks is None and (x is not None or theta.dim() == 1):
        num_tasks = count_tasks(data)
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
