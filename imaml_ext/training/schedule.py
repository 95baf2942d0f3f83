"""The outer learning rate as a function of the meta-step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from imaml_ext.training.config import OuterConfig


def learning_rate(outer: OuterConfig, step: int) -> float:
    """The rate of meta-step `step`, counted from 0: linear warm-up, then the schedule down to its final fraction."""
    if step < outer.warmup_steps:
        return outer.lr * (step + 1) / outer.warmup_steps
    if outer.schedule == "constant":
        return outer.lr
    progress = (step - outer.warmup_steps) / (outer.steps - outer.warmup_steps)  # in [0, 1)
    remaining = 1.0 - progress if outer.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return outer.lr * (outer.final_lr_fraction + (1.0 - outer.final_lr_fraction) * remaining)


def outer_optimizer(outer: OuterConfig, theta: Tensor, log_lam: Tensor | None = None) -> torch.optim.Optimizer:
    """The optimiser of the flat meta-parameters theta [N] and, where λ is learnt, of log λ, a group of its own."""
    groups: list[dict[str, Any]] = [{"params": [theta], "weight_decay": outer.weight_decay}]
    if log_lam is not None:
        groups.append({"params": [log_lam]})
    if outer.optimizer == "adam":
        return torch.optim.Adam(groups, lr=outer.lr, betas=outer.betas, eps=outer.eps)
    return torch.optim.SGD(groups, lr=outer.lr, momentum=outer.momentum)
