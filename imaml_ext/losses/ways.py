"""Tasks with fewer classes than their model has outputs: the first `ways` outputs are classes, None means all."""

from __future__ import annotations

import torch
from torch import Tensor

from imaml_ext.batch import Structure
from imaml_ext.models.task_model import TaskModel

# A logit of which softmax makes exactly 0 in float32 and float64, and 0 of all derivatives, beside any that is usual.
_ABSENT = -1e30


def of_classes(outputs: Structure, ways: int | None) -> Structure:
    """Returns the outputs [B, S, ways] of [B, S, K] that are classes."""
    if ways is None:
        return outputs
    if not isinstance(outputs, Tensor):
        raise TypeError("ways must be None where a model's outputs are no tensor")
    _check(ways, outputs.shape[-1])
    return outputs[..., :ways]


def absent_biases(model: TaskModel, ways: int | None, device: torch.device) -> Tensor:
    """Returns where the last layer's biases of the other outputs lie in a row."""
    return model.layout.positions[model.layout.names[-1]][ways:].to(device)


def without_others(params: Tensor, model: TaskModel, ways: int | None) -> Tensor:
    """Returns params [B, N] with which the other outputs have the probability 0, and exact zeros as derivatives."""
    if ways is None:
        return params
    _check(ways, model.layout.shapes[-1][0])
    return params.index_fill(1, absent_biases(model, ways, params.device), _ABSENT)


def _check(ways: int, outputs: int) -> None:
    if ways > outputs:
        raise ValueError(f"ways must be at most the {outputs} outputs of the model, got {ways}")
