"""Gradient descent on the proximal problem of every task, with fused proximal steps."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from imaml_ext import _renamed, ops
from imaml_ext.batch import TaskData
from imaml_ext.errors import ConfigError
from imaml_ext.inner.solver import InnerResult, InnerSolver, Moments, proximal_norm
from imaml_ext.losses.loss import Loss
from imaml_ext.models.layout import ParameterLayout
from imaml_ext.ops import Coefficient
from imaml_ext.settings import COUNT, FRACTION, NOT_NEGATIVE, POSITIVE


@_renamed.old_keywords(_renamed.proximal_keyword)
@dataclass(frozen=True)
class GradientDescent(InnerSolver):
    """Takes `steps` descent steps on L_b(φ) + ½ Σ_j λ_j (φ_j − θ_j)² for every task b, from φ = θ.

    Settings have their meaning beside them. With a `tolerance`, a task whose proximal gradient norm is that small stays
    where it is for the remaining steps. With `batch_size`, a step takes the gradient of about that many of a task's S
    examples, the next ones in turn (see `batches`), and `losses` are theirs.

    Source: Algorithm 2 of Rajeswaran et al., arXiv 1909.04630, with the proximal problem of its equation 3.
    """

    steps: Annotated[int, NOT_NEGATIVE] = 16  # Gradient steps per task.
    lr: Annotated[Coefficient, NOT_NEGATIVE] = 0.1  # Learning rate of the steps.
    # Other rates for parameter tensors by name, * for any letters: `* 0 linear.* 0.1` adapts the last layer alone.
    lr_of: Annotated[dict[str, float], NOT_NEGATIVE] = field(default_factory=dict)
    # Rule of the steps: plain, torch.optim.SGD's with momentum, or torch.optim.Adam's.
    optimizer: Literal["sgd", "momentum", "adam"] = "sgd"
    momentum: Annotated[float, FRACTION] = 0.9  # Momentum of the rule `momentum`.
    nesterov: bool = False  # Nesterov's form of the rule `momentum`.
    betas: Annotated[tuple[float, float], FRACTION] = (0.9, 0.999)  # Decay rates of the moments of the rule `adam`.
    eps: Annotated[float, POSITIVE] = 1e-8  # Epsilon of the rule `adam`.
    # Every step descends on the proximal objective; or plain steps, then one step of the penalty (authors' code).
    proximal: Literal["gradient", "after"] = "gradient"
    # Norm of the proximal gradient at which a task stops; unset: never.
    tolerance: Annotated[float | None, NOT_NEGATIVE] = None
    # Examples of a task in a step, in turn; unset: its whole support set.
    batch_size: Annotated[int | None, COUNT] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        alone = "None with proximal='after' or a batch_size, whose steps do not go to the proximal minimum"
        self.require(
            self.tolerance is None or (self.proximal, self.batch_size) == ("gradient", None), "tolerance", alone
        )
        self.require(not self.lr_of or not isinstance(self.lr, Tensor), "lr_of", "empty where lr is a tensor")

    def batches(self, data: Any) -> list[Any]:
        """Returns what the steps take their gradients of, in turns: the data, or ⌈S / batch_size⌉ parts of them.

        Part k of n holds the examples k, k + n, k + 2n, … of each task. Support sets of `data` go class by class, so
        that every part has as many of each class as can be. With a mask S and n are those of a task alone.

        Raises:
            ValueError: there are to be parts, and data has no x and y of the shape [B, S, …].
        """
        if self.batch_size is None:
            return [data]
        x, y = getattr(data, "x", None), getattr(data, "y", None)
        if not (isinstance(x, Tensor) and isinstance(y, Tensor) and min(x.dim(), y.dim()) >= 2):
            raise ValueError("data must have tensors x and y [B, S, …] where batch_size is given")
        if x.shape[:2] != y.shape[:2]:
            raise ValueError(
                f"data.x and data.y must agree in [B, S] where batch_size is given, "
                f"got {list(x.shape[:2])} and {list(y.shape[:2])}"
            )
        mask, ways = getattr(data, "mask", None), getattr(data, "ways", None)
        if mask is not None:
            of_each = (mask.sum(1, keepdim=True) - 1) // self.batch_size + 1  # [B, 1], n of a task
            turns = min(self.steps, math.lcm(*of_each.flatten().tolist()))
            turn = (mask.cumsum(1) - 1) % of_each  # [B, S], the part that an example is in
            return [TaskData(x, y, mask & (turn == k % of_each), ways) for k in range(turns)]
        parts = -(-x.shape[1] // self.batch_size)
        if parts <= 1:
            return [data]
        return [TaskData(x[:, k::parts].contiguous(), y[:, k::parts].contiguous(), None, ways) for k in range(parts)]

    def rate(self, loss: Loss, like: Tensor) -> Coefficient:
        if not self.lr_of or isinstance(self.lr, Tensor):
            return self.lr
        if loss.layout is None:
            raise ConfigError("GradientDescent.lr_of must be empty for a function, whose parameters have no names")
        return _rates(self.lr, tuple(self.lr_of.items()), loss.layout, like.dtype, like.device)

    def _minimise(
        self, loss: Loss, phi: Tensor, center: Tensor, data: Any, lam: Tensor, *, moments: Moments | None = None
    ) -> InnerResult:
        batches = [loss.prepared(part) for part in self.batches(data)]
        lr = ops.as_coefficient(self.rate(loss, phi), "lr", phi).detach()
        lam_of_steps = torch.zeros_like(lam) if self.proximal == "after" else lam
        losses = None  # [steps, B]
        if self.optimizer == "sgd" and self.tolerance is None and len(batches) == 1:
            losses = loss.descend_(phi, center, batches[0], lam=lam_of_steps, lr=lr, steps=self.steps)
        taken = torch.full((len(phi),), self.steps, device=phi.device)
        begun = moments or Moments(tuple(phi.new_zeros(()) for _ in range(self.moments)), 0)
        ended = None
        if losses is None:
            losses, taken, ended = self._descend_(loss, phi, center, batches, lam_of_steps, lr, begun)
        if self.proximal == "after":  # φ ← φ − η λ (φ − θ)
            ops.prox_sgd_step_(phi, torch.zeros_like(phi), center, lam, lr)
        return InnerResult(phi, losses, taken, moments=None if moments is None else ended)

    def _descend_(
        self, loss: Loss, phi: Tensor, center: Tensor, batches: list[Any], lam: Tensor, lr: Tensor, begun: Moments
    ) -> tuple[Tensor, Tensor, Moments]:
        """Steps one by one, in place; returns the losses [steps, B] before each, the steps taken [B], the moments."""
        losses = phi.new_empty(self.steps, len(phi))
        taken = torch.zeros(len(phi), dtype=torch.int64, device=phi.device)
        state = (phi, *(each.expand_as(phi).clone(memory_format=torch.contiguous_format) for each in begun.vectors))
        for step in range(self.steps):
            losses[step], _, grad = loss.gradient(phi, batches[step % len(batches)])  # [B], [B, N]
            step_lr = lr
            if self.tolerance is None:
                taken += 1
            else:
                # A task that has arrived keeps its φ, so its gradient too: it stays for good. A NaN has not arrived.
                moving = ~(proximal_norm(grad, phi, center, lam) <= self.tolerance)  # [B]
                taken += moving
                step_lr = torch.where(moving.unsqueeze(1), lr, 0.0)  # [B, 1 or N]
            self.step_(begun.steps + step, state, grad, center, lam, step_lr)
        return losses, taken, Moments(state[1:], begun.steps + self.steps)

    @property
    def moments(self) -> int:
        return {"sgd": 0, "momentum": 1, "adam": 2}[self.optimizer]

    def step_(
        self, step: int, state: tuple[Tensor, ...], grad: Tensor, center: Tensor, lam: Tensor, lr: Tensor
    ) -> None:
        """Takes the step of that number in place, of φ and the moments [B, N]."""
        if self.optimizer == "sgd":
            ops.prox_sgd_step_(state[0], grad, center, lam, lr)
        elif self.optimizer == "momentum":
            phi, velocity = state
            ops.prox_momentum_step_(phi, velocity, grad, center, lam, lr, self.momentum, self.nesterov)
        else:
            phi, first, second = state
            ops.prox_adam_step_(phi, first, second, grad, center, lam, lr, *self.betas, self.eps, step + 1)


@functools.lru_cache(maxsize=32)
def _rates(
    lr: float, lr_of: tuple[tuple[str, float], ...], layout: ParameterLayout, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The rate of every parameter, [1, N]; a later pattern goes before an earlier one."""
    rates = dict.fromkeys(layout.names, lr)
    for pattern, rate in lr_of:
        named = [name for name in layout.names if fnmatchcase(name, pattern)]
        if not named:
            raise ConfigError(f"GradientDescent.lr_of must name parameters {list(layout.names)}, got {pattern!r}")
        rates |= dict.fromkeys(named, rate)
    each = torch.tensor([rates[name] for name in layout.names], dtype=dtype)
    return each.repeat_interleave(torch.tensor(layout.sizes)).unsqueeze(0).to(device)
