"""The losses of many tasks, checked, and their gradients in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imaml_ext.models.loss import LossFunction, check_losses

__all__ = ["task_gradient", "task_losses"]


def task_losses(loss: LossFunction, params: Tensor, data: Any) -> Tensor:
    """loss(params, data), checked to be one number a task, [B].

    Raises:
        TypeError, ValueError: the loss returned something else.
    """
    losses = loss(params, data)
    check_losses(losses, params.shape[0], "loss")
    return losses


def task_gradient(losses: Tensor, params: Tensor, **options: bool) -> Tensor:
    """Every task's gradient [B, N] in one pass; zeros for parameters that no loss depends on.

    Raises:
        ValueError: no loss is differentiable.
    """
    if not losses.requires_grad:
        raise ValueError("loss must depend on params through differentiable operations, got a constant")
    (gradient,) = torch.autograd.grad(losses.sum(), params, allow_unused=True, materialize_grads=True, **options)
    return gradient
