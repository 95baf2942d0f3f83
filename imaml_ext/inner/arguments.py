"""Checks that the inner solvers and the meta-gradients share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imaml_ext.checks import check_int
from imaml_ext.models import LossFunction
from imaml_ext.models.loss import TaskLoss, check_losses, task_gradient


def task_rows(theta: Tensor, data: Any, num_tasks: int | None) -> tuple[Tensor, int]:
    """theta as [1, N] or [B, N], and the number of tasks B: `num_tasks`, else rows of data.x, else rows of theta.

    Raises:
        TypeError, ValueError: theta is not a floating-point [N] or [B, N], or B is unknown or contradictory.
    """
    if not isinstance(theta, Tensor):
        raise TypeError(f"theta must be a tensor, got {type(theta).__name__}")
    if theta.dim() not in (1, 2):
        raise ValueError(f"theta must have shape [N], or [B, N] with one row a task, got {list(theta.shape)}")
    if theta.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"theta must be float32 or float64, got {theta.dtype}")
    x = getattr(data, "x", None)
    tasks = num_tasks
    if tasks is None and isinstance(x, Tensor) and x.dim() > 0:
        tasks = x.shape[0]
    if tasks is None and theta.dim() == 2:
        tasks = theta.shape[0]
    if tasks is None:
        raise ValueError("num_tasks must be given where neither data.x nor theta has one row a task")
    check_int("num_tasks", tasks, minimum=1)
    if theta.dim() == 2 and theta.shape[0] != tasks:
        raise ValueError(f"theta must have shape [N] or [{tasks}, N] (one row a task), got {list(theta.shape)}")
    if isinstance(x, Tensor) and x.device != theta.device:
        raise ValueError(f"data.x must be on the device of theta, {theta.device}, got {x.device}")
    return (theta.unsqueeze(0) if theta.dim() == 1 else theta), tasks


def task_losses(loss: LossFunction, params: Tensor, data: Any) -> Tensor:
    """loss(params, data), checked to be one loss a task: [B]."""
    losses = loss(params, data)
    check_losses(losses, params.shape[0], "loss")
    return losses


def loss_and_gradient(loss: LossFunction, phi: Tensor, data: Any) -> tuple[Tensor, Tensor]:
    """Losses [B] and every task's own gradient [B, N], in one pass, without a graph."""
    if isinstance(loss, TaskLoss):
        result = loss.gradient(phi, data)
        return result.losses, result.gradient
    params = phi.detach().requires_grad_()
    with torch.enable_grad():
        losses = task_losses(loss, params, data)
        gradient = task_gradient(losses, params)
    return losses.detach(), gradient
