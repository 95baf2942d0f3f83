"""Criteria: losses [B] of outputs [B, S, *] against targets."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Criterion = Callable[[Tensor, Tensor], Tensor]  # outputs [B, S, *], targets [B, S, *] -> losses [B]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean over a task's examples of −log softmax(outputs)[target], [B].

    Args:
        outputs: [B, S, K] logits. targets: [B, S] int64 labels.

    Raises:
        TypeError, ValueError: a dtype or shape that does not fit; names the argument.
    """
    check_labels(outputs.shape, targets)
    log_probabilities = outputs.log_softmax(-1)
    return -log_probabilities.gather(-1, targets.unsqueeze(-1)).mean((1, 2))


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean over all entries of a task of (output − target)², [B].

    Args:
        outputs, targets: [B, S, *], of one shape; targets [B, S] fit outputs [B, S, 1].

    Raises:
        TypeError, ValueError: a dtype or shape that does not fit; names the argument.
    """
    return (outputs - check_values(outputs.shape, outputs.dtype, targets)).square().flatten(1).mean(1)


CRITERIA: dict[str, Criterion] = {"cross_entropy": cross_entropy, "mse": mse}


def check_targets(targets: object, device: torch.device) -> None:
    """Raises TypeError or ValueError unless targets are a tensor on this device."""
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets must be a tensor, got {type(targets).__name__}")
    if targets.device != device:
        raise ValueError(f"targets must be on the device of the outputs, {device}, got {targets.device}")


def check_labels(outputs_shape: torch.Size, targets: Tensor) -> Tensor:
    """Returns targets; raises TypeError or ValueError unless they are labels [B, S] for outputs [B, S, K]."""
    if len(outputs_shape) != 3:
        raise ValueError(f"outputs must have shape [B, S, classes] for cross-entropy, got {list(outputs_shape)}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64 labels for cross-entropy, got {targets.dtype}")
    if targets.shape != outputs_shape[:2]:
        raise ValueError(f"targets must have shape {list(outputs_shape[:2])}, got {list(targets.shape)}")
    return targets


def check_values(outputs_shape: torch.Size, dtype: torch.dtype, targets: Tensor) -> Tensor:
    """Returns targets in the shape of the outputs; raises TypeError or ValueError where they do not fit."""
    if outputs_shape == (*targets.shape, 1):
        targets = targets.unsqueeze(-1)
    if targets.shape != outputs_shape:
        raise ValueError(
            f"targets must have the shape of the outputs, {list(outputs_shape)}, got {list(targets.shape)}"
        )
    if targets.dtype != dtype:
        raise TypeError(f"targets must have the dtype of the outputs, {dtype}, got {targets.dtype}")
    return targets
