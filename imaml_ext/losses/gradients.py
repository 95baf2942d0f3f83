"""Gradients of many tasks at once, and products with Jacobians."""

from __future__ import annotations

import torch
from torch import Tensor


def task_gradient(losses: Tensor, params: Tensor, *, create_graph: bool = False) -> Tensor:
    """Returns every task's own gradient [B, N] from one backward pass; zero where no loss depends on a parameter.

    Raises:
        ValueError: the losses depend on nothing by differentiable operations.
    """
    if not losses.requires_grad:
        raise ValueError("loss must depend on params by differentiable operations, got a constant")
    (gradient,) = torch.autograd.grad(
        losses.sum(), params, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return gradient if create_graph else gradient.contiguous()


def vector_jacobian(outputs: Tensor, inputs: Tensor, vector: Tensor, *, create_graph: bool = False) -> Tensor:
    """Returns vectorᵀ ∂outputs/∂inputs and keeps the graph of the outputs; zero where there is no dependence."""
    if not outputs.requires_grad:
        return torch.zeros_like(inputs)
    (product,) = torch.autograd.grad(
        outputs,
        inputs,
        vector,
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return product


def check_losses(losses: object, tasks: int, name: str) -> None:
    """Raises TypeError or ValueError unless `losses`, which `name` returned, has one number per task."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"{name} must return a tensor, got {type(losses).__name__}")
    if losses.shape != (tasks,):
        raise ValueError(f"{name} must return one loss per task, shape [{tasks}], got {list(losses.shape)}")
