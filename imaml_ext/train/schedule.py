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


def average_weight(outer: OuterConfig, step: int) -> float:
    """1 − d of θ̄ ← d θ̄ + (1 − d) θ after meta-step `step`, counted from 0: d is smaller over the first steps."""
    return 1 - min(outer.average, (2 + step) / (11 + step))


def outer_optimizer(
    outer: OuterConfig, theta: Tensor, log_lam: Tensor | None = None, *, static: bool = False
) -> torch.optim.Optimizer:
    """The optimiser of the flat meta-parameters theta [N] and, where λ is learnt, of log λ, a group of its own.

    Args:
        static: learning rates in tensors on the device, that a CUDA graph reads anew at each replay; Adam only.
    """
    groups: list[dict[str, Any]] = [{"params": [theta], "weight_decay": outer.weight_decay}]
    if log_lam is not None:
        groups.append({"params": [log_lam]})
    if static:
        for group in groups:
            group["lr"] = torch.full((), outer.lr, dtype=theta.dtype, device=theta.device)
            group |= {"capturable": theta.is_cuda, "foreach": False}
    if outer.optimizer == "adam":
        return torch.optim.Adam(groups, lr=outer.lr, betas=outer.betas, eps=outer.eps)
    return torch.optim.SGD(groups, lr=outer.lr, momentum=outer.momentum)


def set_learning_rate(optimizer: torch.optim.Optimizer, outer: OuterConfig, lr: float) -> None:
    """The rate of θ, and in proportion that of log λ."""
    for group, rate in zip(optimizer.param_groups, (lr, lr * (outer.lam_lr / outer.lr)), strict=False):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state_dict as a checkpoint holds it, the same whether the optimiser is static or not."""
    state = optimizer.state_dict()
    groups = [{**group, "lr": float(group["lr"])} for group in state["param_groups"]]
    for group in groups:
        if "capturable" in group:
            group |= {"capturable": False, "foreach": None}
    return {**state, "param_groups": groups}


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Puts what `optimizer_state` gave into an optimiser, which stays static or not."""
    own = optimizer.state_dict()["param_groups"]
    kept = [{name: group[name] for name in ("lr", "capturable", "foreach") if name in group} for group in own]
    groups = [{**group, **keep} for group, keep in zip(saved["param_groups"], kept, strict=True)]
    optimizer.load_state_dict({**saved, "param_groups": groups})
