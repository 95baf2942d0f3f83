"""Criteria: losses [B] of outputs [B, S, *] against targets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

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


# Criteria of all tasks at once, which the native engine and KFAC know.
NAMED: dict[str, Criterion] = {"cross_entropy": cross_entropy, "mse": mse}

# The criteria of torch that take outputs and targets alone, by the names of their functions.
_MODULES: dict[str, type[nn.Module]] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "nll_loss": nn.NLLLoss,
    "binary_cross_entropy": nn.BCELoss,
    "binary_cross_entropy_with_logits": nn.BCEWithLogitsLoss,
    "mse_loss": nn.MSELoss,
    "l1_loss": nn.L1Loss,
    "smooth_l1_loss": nn.SmoothL1Loss,
    "huber_loss": nn.HuberLoss,
    "poisson_nll_loss": nn.PoissonNLLLoss,
    "kl_div": nn.KLDivLoss,
    "soft_margin_loss": nn.SoftMarginLoss,
    "multilabel_soft_margin_loss": nn.MultiLabelSoftMarginLoss,
    "hinge_embedding_loss": nn.HingeEmbeddingLoss,
}
_FUNCTIONS = {name: getattr(nn.functional, name) for name in _MODULES}
_OF_LABELS = ("cross_entropy", "nll_loss")
CRITERIA: dict[str, Any] = NAMED | {name: each for name, each in _FUNCTIONS.items() if name not in NAMED}


def torch_name(criterion: Any) -> str | None:
    """Returns the name of the function that a criterion of torch is or calls; None for any other criterion."""
    if isinstance(criterion, nn.Module):
        return next((name for name, module in _MODULES.items() if type(criterion) is module), None)
    function = criterion.func if isinstance(criterion, functools.partial) else criterion
    return next((name for name, known in _FUNCTIONS.items() if function is known), None)


def of_each_task(criterion: Callable[[Tensor, Tensor], Tensor], name: str) -> Criterion:
    """Returns losses [B] of a criterion of torch that is called with one task's outputs [S, *] at a time.

    A loop, since the batching rules of torch.func lack or distort some of these criteria (label smoothing with weights,
    ignore_index).
    """

    def losses(outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point() or name not in _OF_LABELS:  # torch broadcasts whatever it can
            targets = check_values(outputs.shape, outputs.dtype, targets)
        each = [criterion(*of_task) for of_task in zip(outputs, targets, strict=True)]
        return torch.stack(each) if each else outputs.new_empty(0)

    return losses


def ignored_label(criterion: Any) -> int | None:
    """Returns the label that a cross-entropy of torch leaves out; None where there is none."""
    options = criterion.keywords if isinstance(criterion, functools.partial) else vars(criterion)
    return options.get("ignore_index", -100)


def label_accuracy(outputs: Tensor, targets: Tensor, ignored: int | None) -> Tensor:
    """Returns the fraction [B] of a task's examples that are classified right, those of the label `ignored` left out.

    Args:
        outputs: [B, S, K]. targets: [B, S] labels or [B, S, K] probabilities.
    """
    targets = targets.argmax(-1) if targets.is_floating_point() else targets
    hits = (outputs.argmax(-1) == targets).to(outputs.dtype)
    if ignored is None:
        return hits.mean(1)
    kept = (targets != ignored).to(outputs.dtype)
    return (hits * kept).sum(1) / kept.sum(1)


def check_targets(targets: object, device: torch.device) -> None:
    """Raises TypeError or ValueError unless targets are a tensor, or a structure of such, on this device."""
    for each in pytree.tree_leaves(targets):
        if not isinstance(each, Tensor):
            raise TypeError(f"targets must be a tensor, got {type(each).__name__}")
        if each.device != device:
            raise ValueError(f"targets must be on the device of the outputs, {device}, got {each.device}")


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
