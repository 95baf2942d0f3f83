"""What the solvers of the proximal problem, argmin_φ L(φ) + ½ Σ_j λ_j (φ_j − θ_j)², begin and end with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imaml_ext import ops
from imaml_ext.checks import check_number
from imaml_ext.inner.arguments import loss_and_gradient, task_rows
from imaml_ext.models import LossFunction
from imaml_ext.ops import Coefficient


def start(theta: Tensor, data: Any, lam: Coefficient, num_tasks: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """φ = θ [B, N] to work on, θ as [1 or B, N] and λ as [1 or B, 1 or N], all without a graph.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; see `InnerSolver.solve`.
    """
    if not isinstance(lam, Tensor):
        check_number("lam", lam, at_least=0)
    rows, tasks = task_rows(theta, data, num_tasks)
    center = rows.detach().contiguous()
    phi = center.expand(tasks, -1).clone(memory_format=torch.contiguous_format)
    return phi, center, ops.as_coefficient(lam, "lam", phi).detach()


def measured(
    loss: LossFunction, phi: Tensor, data: Any, theta: Tensor, lam: Tensor, measure: bool
) -> tuple[Tensor | None, Tensor | None]:
    """L(φ) and ‖∇L(φ) + λ (φ − θ)‖ of every task, [B] each; None unless they are to be measured."""
    if not measure:
        return None, None
    losses, grad = loss_and_gradient(loss, phi, data)
    return losses, proximal_norm(grad, phi, theta, lam)


def proximal_norm(grad: Tensor, phi: Tensor, theta: Tensor, lam: Tensor) -> Tensor:
    """‖∇L(φ) + λ (φ − θ)‖ of every task: [B]."""
    return torch.linalg.vector_norm(ops.prox_gradient_(grad.clone(), phi, theta, lam), dim=1)
