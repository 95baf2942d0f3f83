"""Gradient descent on the proximal problem of every task, with fused proximal steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imaml_ext import ops
from imaml_ext.inner.arguments import check_choice, check_int, check_number, task_gradient, task_losses, task_rows
from imaml_ext.models import LossFunction
from imaml_ext.ops import Coefficient

OPTIMIZERS = ("sgd", "momentum", "adam")


@dataclass(frozen=True)
class InnerResult:
    """Where the inner solver ended; every field stays on the device.

    Attributes:
        phi: [B, N] task parameters, without a graph.
        losses: [steps, B] support loss before each step.
        steps: [B] int64, steps taken by each task (fewer than asked for only where a tolerance was met).
        final_loss: [B] support loss at phi; None unless measured.
        final_gradient_norm: [B] ‖∇L(φ) + λ (φ − θ)‖, zero at the exact solution; None unless measured.
    """

    phi: Tensor
    losses: Tensor
    steps: Tensor
    final_loss: Tensor | None = None
    final_gradient_norm: Tensor | None = None


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
    tolerance: float | None = None,
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
        tolerance: a task whose proximal gradient norm is at most this stays where it is for the remaining steps.
        measure: evaluate loss and proximal gradient once more, at the end.
        num_tasks: B, where `data` has no `x`.

    Raises:
        TypeError, ValueError: an argument, or what the loss returned, of the wrong type, dtype, shape or device.
        NativeUnavailableError: the compiled part is missing.

    Source: Algorithm 2 of Rajeswaran et al., arXiv 1909.04630, with the proximal problem of its equation 3.
    """
    check_choice("optimizer", optimizer, OPTIMIZERS)
    check_int("steps", steps, minimum=0)
    for name, value in (("momentum", momentum), ("betas[0]", betas[0]), ("betas[1]", betas[1])):
        if not 0 <= check_number(name, value) < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {value}")
    check_number("eps", eps, above=0)
    if tolerance is not None:
        check_number("tolerance", tolerance, at_least=0)
    for name, coefficient in (("lam", lam), ("lr", lr)):
        if not isinstance(coefficient, Tensor):
            check_number(name, coefficient, at_least=0)
    rows, tasks = task_rows(theta, data, num_tasks)
    center = rows.detach().contiguous()  # [1 or B, N]
    phi = center.expand(tasks, -1).clone(memory_format=torch.contiguous_format)  # [B, N]
    lam = ops.as_coefficient(lam, "lam", phi).detach()  # [1 or B, 1 or N]
    lr = ops.as_coefficient(lr, "lr", phi).detach()

    losses = phi.new_empty(steps, tasks)
    taken = torch.full((tasks,), steps if tolerance is None else 0, device=phi.device)
    first = torch.zeros_like(phi) if optimizer != "sgd" else None  # velocity, or first moment
    second = torch.zeros_like(phi) if optimizer == "adam" else None
    for step in range(steps):
        losses[step], grad = _loss_and_gradient(loss, phi, data)  # [B], [B, N]
        step_lr = lr
        if tolerance is not None:
            # A task that has arrived keeps its φ, so its gradient too: it stays for good. A NaN has not arrived.
            moving = ~(_proximal_norm(grad, phi, center, lam) <= tolerance)  # [B]
            taken += moving
            step_lr = torch.where(moving.unsqueeze(1), lr, 0.0)  # [B, 1 or N]
        if first is None:
            ops.prox_sgd_step_(phi, grad, center, lam, step_lr)
        elif second is None:
            ops.prox_momentum_step_(phi, first, grad, center, lam, step_lr, momentum, nesterov)
        else:
            ops.prox_adam_step_(phi, first, second, grad, center, lam, step_lr, *betas, eps, step + 1)

    final_loss = final_norm = None
    if measure:
        final_loss, grad = _loss_and_gradient(loss, phi, data)
        final_norm = _proximal_norm(grad, phi, center, lam)
    return InnerResult(phi, losses, taken, final_loss, final_norm)


def _loss_and_gradient(loss: LossFunction, phi: Tensor, data: Any) -> tuple[Tensor, Tensor]:
    """Losses [B] and every task's own gradient [B, N], in one backward pass."""
    params = phi.detach().requires_grad_()
    with torch.enable_grad():
        losses = task_losses(loss, params, data)
        grad = task_gradient(losses, params)
    return losses.detach(), grad


def _proximal_norm(grad: Tensor, phi: Tensor, theta: Tensor, lam: Tensor) -> Tensor:
    """‖∇L(φ) + λ (φ − θ)‖ of every task: [B]."""
    return torch.linalg.vector_norm(ops.prox_gradient_(grad.clone(), phi, theta, lam), dim=1)
