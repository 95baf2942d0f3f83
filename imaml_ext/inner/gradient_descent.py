"""Gradient descent on the proximal problem of every task, with fused proximal steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imaml_ext import ops
from imaml_ext.checks import check_choice, check_int, check_number
from imaml_ext.inner.arguments import loss_and_gradient
from imaml_ext.inner.problem import measured, proximal_norm, start
from imaml_ext.inner.solver import InnerResult
from imaml_ext.models import LossFunction, TaskData, TaskLoss
from imaml_ext.ops import Coefficient

OPTIMIZERS = ("sgd", "momentum", "adam")
PROXIMAL = ("gradient", "pullback")


@dataclass(frozen=True, eq=False)
class GradientDescent:
    """Gradient descent on the proximal problem, as an `InnerSolver`; what it does, `gradient_descent` says.

    Args:
        steps, lr, optimizer, momentum, nesterov, betas, eps, proximal, tolerance, batch_size: of `gradient_descent`.

    Raises:
        TypeError, ValueError: a setting of the wrong type or outside its range.
    """

    steps: int = 16
    lr: Coefficient = 0.1
    optimizer: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    proximal: str = "gradient"
    tolerance: float | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("proximal", self.proximal, PROXIMAL)
        check_int("steps", self.steps, minimum=0)
        if not isinstance(self.lr, Tensor):
            check_number("lr", self.lr, at_least=0)
        for name, value in (("momentum", self.momentum), ("betas[0]", self.betas[0]), ("betas[1]", self.betas[1])):
            if not 0 <= check_number(name, value) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value}")
        check_number("eps", self.eps, above=0)
        if self.tolerance is not None:
            check_number("tolerance", self.tolerance, at_least=0)
            if self.proximal == "pullback":
                raise ValueError(
                    "tolerance must be None with proximal='pullback', whose steps do not go to the proximal minimum"
                )
        if self.batch_size is not None:
            check_int("batch_size", self.batch_size, minimum=1)
            if self.tolerance is not None:
                raise ValueError("tolerance must be None with batch_size: no step sees the gradient of the whole task")

    def batches(self, data: Any) -> list[Any]:
        """What the steps take their gradients of, in turns: the data themselves, or ⌈S / batch_size⌉ parts of them.

        Part k of n holds the examples k, k + n, k + 2n, … of each task, so that of the support sets of `data`, which go
        class by class, every part has as many of each class as can be.

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
        parts = -(-x.shape[1] // self.batch_size)
        if parts <= 1:
            return [data]
        return [TaskData(x[:, k::parts].contiguous(), y[:, k::parts].contiguous()) for k in range(parts)]

    def solve(
        self,
        loss: LossFunction,
        theta: Tensor,
        data: Any,
        *,
        lam: Coefficient,
        num_tasks: int | None = None,
        measure: bool = False,
    ) -> InnerResult:
        """`gradient_descent` with these settings."""
        return gradient_descent(loss, theta, data, lam=lam, num_tasks=num_tasks, measure=measure, **vars(self))


def gradient_descent(
    loss: LossFunction,
    theta: Tensor,
    data: Any,
    *,
    lam: Coefficient,
    steps: int,
    lr: Coefficient,
    optimizer: str = "sgd",
    momentum: float = 0.9,
    nesterov: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    proximal: str = "gradient",
    tolerance: float | None = None,
    batch_size: int | None = None,
    measure: bool = False,
    num_tasks: int | None = None,
) -> InnerResult:
    """`steps` descent steps on L_b(φ) + ½ Σ_j λ_j (φ_j − θ_j)² for every task b, from φ = θ; no host synchronisation.

    Args:
        loss: losses [B] = loss(params [B, N], data), row b from row b alone (a `TaskLoss`, or any such function).
        theta: [N] shared, or [B, N]; float32 or float64. Not changed.
        data: handed to `loss`; `data.x` [B, …] tells the number of tasks.
        lam: λ ≥ 0, a number, one a task [B], one a parameter [N], or [B, N] ([B, 1] and [1, N] where B == N).
        lr: step size, in the same forms.
        optimizer: "sgd", "momentum" (torch.optim.SGD's rule) or "adam" (torch.optim.Adam's).
        momentum, nesterov: of "momentum". betas, eps: of "adam".
        proximal: "gradient", every step is on the proximal objective; or "pullback", the steps are on L alone and one
            φ ← φ − η λ (φ − θ) follows them, as in the code that the paper's authors published.
        tolerance: a task whose proximal gradient norm is at most this stays where it is for the remaining steps.
        batch_size: every step takes the gradient of that many of a task's S examples, the next ones in turn (see
            `GradientDescent.batches`); `losses` are then theirs. All of them unless given, and where S is no more.
        measure: evaluate loss and proximal gradient once more, at the end, on all examples.
        num_tasks: B, where `data` has no `x`.

    Raises:
        TypeError, ValueError: an argument, or what the loss returned, of the wrong type, dtype, shape or device.
        NativeUnavailableError: the compiled part is missing.

    Source: Algorithm 2 of Rajeswaran et al., arXiv 1909.04630, with the proximal problem of its equation 3.
    """
    settings = GradientDescent(steps, lr, optimizer, momentum, nesterov, betas, eps, proximal, tolerance, batch_size)
    batches = settings.batches(data)
    phi, center, lam = start(theta, data, lam, num_tasks)
    tasks = len(phi)
    lr = ops.as_coefficient(lr, "lr", phi).detach()
    pull = torch.zeros_like(lam) if proximal == "pullback" else lam  # of the steps

    losses: Tensor | None = None  # [steps, B]
    if optimizer == "sgd" and tolerance is None and len(batches) == 1 and isinstance(loss, TaskLoss):
        losses = loss.descend_(phi, center, data, lam=pull, lr=lr, steps=steps)
    to_take = range(steps if losses is None else 0)
    losses = phi.new_empty(steps, tasks) if losses is None else losses
    taken = torch.full((tasks,), steps if tolerance is None else 0, device=phi.device)
    first = torch.zeros_like(phi) if optimizer != "sgd" else None  # velocity, or first moment
    second = torch.zeros_like(phi) if optimizer == "adam" else None
    for step in to_take:
        losses[step], grad = loss_and_gradient(loss, phi, batches[step % len(batches)])  # [B], [B, N]
        step_lr = lr
        if tolerance is not None:
            # A task that has arrived keeps its φ, so its gradient too: it stays for good. A NaN has not arrived.
            moving = ~(proximal_norm(grad, phi, center, lam) <= tolerance)  # [B]
            taken += moving
            step_lr = torch.where(moving.unsqueeze(1), lr, 0.0)  # [B, 1 or N]
        if first is None:
            ops.prox_sgd_step_(phi, grad, center, pull, step_lr)
        elif second is None:
            ops.prox_momentum_step_(phi, first, grad, center, pull, step_lr, momentum, nesterov)
        else:
            ops.prox_adam_step_(phi, first, second, grad, center, pull, step_lr, *betas, eps, step + 1)
    if proximal == "pullback":  # φ ← φ − η λ (φ − θ)
        ops.prox_sgd_step_(phi, torch.zeros_like(phi), center, lam, lr)

    return InnerResult(phi, losses, taken, *measured(loss, phi, data, center, lam, measure))
