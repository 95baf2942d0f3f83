"""The outer learning rates as functions of the meta-step, and the optimiser that takes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from imaml_ext.train.config import Outer


def learning_rate(outer: Outer, step: int) -> float:
    """Returns the rate of theta at meta-step `step`, counted from 0: linear warm-up, then the schedule down to 0."""
    if step < outer.warmup_steps:
        return outer.lr * (step + 1) / outer.warmup_steps
    if outer.schedule == "constant":
        return outer.lr
    progress = (step - outer.warmup_steps) / (outer.steps - outer.warmup_steps)  # in [0, 1)
    return outer.lr * (1.0 - progress if outer.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress)))


def average_weight(outer: Outer, step: int) -> float:
    """Returns 1 − d of θ̄ ← d θ̄ + (1 − d) θ after meta-step `step`, counted from 0: d is smaller at first."""
    return 1 - min(outer.average, (2 + step) / (11 + step))


def outer_optimizer(outer: Outer, params: Mapping[str, Tensor], *, static: bool = False) -> torch.optim.Optimizer:
    """Returns the optimiser of the meta-parameters, with a group for each: theta first.

    Args:
        static: learning rates in tensors on the device, that a CUDA graph reads anew at each replay; Adam only. Adam on
            CUDA always has them, so that captured and eager training take the same steps.
    """
    groups: list[dict[str, Any]] = [{"params": [value]} for value in params.values()]
    if static or (outer.optimizer == "adam" and params["theta"].is_cuda):
        for group in groups:
            value = group["params"][0]
            group["lr"] = torch.full((), outer.lr, dtype=value.dtype, device=value.device)
            group |= {"capturable": value.is_cuda, "foreach": False}
    kind = torch.optim.Adam if outer.optimizer == "adam" else torch.optim.SGD
    return kind(groups, lr=outer.lr)


def set_learning_rate(optimizer: torch.optim.Optimizer, outer: Outer, lr: float) -> None:
    """Sets the rate of theta and, in proportion, the rates of what is learnt beside it."""
    for index, group in enumerate(optimizer.param_groups):
        rate = lr if index == 0 else lr * (outer.learnt_lr / outer.lr)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns its state_dict as a checkpoint holds it, the same whether the optimiser is static or not."""
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
