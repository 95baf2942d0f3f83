"""Losses of many tasks at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from imaml_ext.models.task_model import TaskModel

Criterion = Callable[[Tensor, Tensor], Tensor]  # outputs [B, S, *], targets [B, S, *] -> losses [B]


class Data(Protocol):
    """One side (support or query) of a batch of tasks: x [B, S, *] and y [B, S, *]."""

    @property
    def x(self) -> Tensor: ...

    @property
    def y(self) -> Tensor: ...


LossFunction = Callable[[Tensor, Data], Tensor]  # params [B, N], data -> losses [B]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over a task's examples of −log softmax(outputs)[target].

    Args:
        outputs: [B, S, K] logits. targets: [B, S] int64 labels.

    Returns [B].

    Raises:
        TypeError, ValueError: a dtype or shape that does not fit; names the argument.
    """
    if outputs.dim() != 3:
        raise ValueError(f"outputs must have shape [B, S, classes] for cross-entropy, got {list(outputs.shape)}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64 labels for cross-entropy, got {targets.dtype}")
    if targets.shape != outputs.shape[:2]:
        raise ValueError(f"targets must have shape {list(outputs.shape[:2])}, got {list(targets.shape)}")
    log_probabilities = outputs.log_softmax(-1)
    return -log_probabilities.gather(-1, targets.unsqueeze(-1)).mean((1, 2))


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over all entries of a task of (output − target)².

    Args:
        outputs, targets: [B, S, *], of one shape; targets [B, S] fit outputs [B, S, 1].

    Returns [B].

    Raises:
        TypeError, ValueError: a dtype or shape that does not fit; names the argument.
    """
    if outputs.shape == (*targets.shape, 1):
        targets = targets.unsqueeze(-1)
    if targets.shape != outputs.shape:
        raise ValueError(
            f"targets must have the shape of the outputs, {list(outputs.shape)}, got {list(targets.shape)}"
        )
    if targets.dtype != outputs.dtype:
        raise TypeError(f"targets must have the dtype of the outputs, {outputs.dtype}, got {targets.dtype}")
    return (outputs - targets).square().flatten(1).mean(1)


_CRITERIA: dict[str, Criterion] = {"cross_entropy": cross_entropy, "mse": mse}


class TaskLoss:
    """losses [B] = loss(params [B, N], data): a model's outputs on data.x judged against data.y, task by task.

    Args:
        model: a `TaskModel`.
        criterion: "cross_entropy", "mse", or a callable of outputs [B, S, *] and targets [B, S, *] that returns [B],
            entry b from row b alone; convex in the outputs where the Gauss-Newton matrix is to be positive
            semi-definite.

    Raises:
        TypeError, ValueError: not a model, an unknown criterion.
    """

    def __init__(self, model: TaskModel, criterion: str | Criterion) -> None:
        if not isinstance(model, TaskModel):
            raise TypeError(
                f"model must be a TaskModel, got {type(model).__name__}: "
                "wrap an nn.Module with imaml_ext.models.from_module"
            )
        if isinstance(criterion, str):
            if criterion not in _CRITERIA:
                known = ", ".join(map(repr, _CRITERIA))
                raise ValueError(f"criterion must be one of {known} or a callable, got {criterion!r}")
        elif not callable(criterion):
            raise TypeError(f"criterion must be a name or a callable, got {type(criterion).__name__}")
        self.model = model
        self.classification = criterion == "cross_entropy"
        self._criterion = _CRITERIA[criterion] if isinstance(criterion, str) else criterion

    def outputs(self, params: Tensor, x: Tensor) -> Tensor:
        """The model's outputs [B, S, *] for params [B, N] and inputs x [B, S, *]."""
        return self.model(params, x)

    def criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Losses [B] of outputs [B, S, *].

        Raises:
            TypeError, ValueError: outputs and targets do not fit each other, or the criterion does not give [B].
        """
        if not isinstance(targets, Tensor):
            raise TypeError(f"targets must be a tensor, got {type(targets).__name__}")
        if targets.device != outputs.device:
            raise ValueError(f"targets must be on the device of the outputs, {outputs.device}, got {targets.device}")
        losses = self._criterion(outputs, targets)
        check_losses(losses, outputs.shape[0], "criterion")
        return losses

    def accuracy(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """Fraction [B] of a task's examples whose largest logit is the target's; None unless cross-entropy."""
        if not self.classification:
            return None
        return (outputs.argmax(-1) == targets).to(outputs.dtype).mean(1)

    def __call__(self, params: Tensor, data: Data) -> Tensor:
        """Losses [B] of every task."""
        return self.criterion(self.outputs(params, data.x), data.y)


def check_losses(losses: object, tasks: int, name: str) -> None:
    """Raises TypeError or ValueError unless `losses`, what `name` returned, has one number a task."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"{name} must return a tensor, got {type(losses).__name__}")
    if losses.shape != (tasks,):
        raise ValueError(f"{name} must return one loss a task, shape [{tasks}], got {list(losses.shape)}")
