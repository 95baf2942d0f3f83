"""Derivatives in the parameters that all tasks share, `Loss.shared`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from imaml_ext.losses.curvature import task_gradient
from imaml_ext.losses.loss import Loss
from imaml_ext.ops.recording import recordable, recording


def gradient_with_shared(loss: Loss, phi: Tensor, data: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns losses [B], every task's gradient [B, N], and Σ_b ∂L_b/∂s [N_s]; without a graph."""
    with recording():
        leaf, values = _leaf(phi), _leaf(loss.shared)
        losses = loss.sharing(values)(leaf, recordable(data))
        gradient, by_shared = torch.autograd.grad(
            losses.sum(), (leaf, values), allow_unused=True, materialize_grads=True
        )
    return losses.detach(), gradient, by_shared


class SharedLinearisation:
    """u [B, N] -> H_b u_b [B, N] and Σ_b ∂(u_bᵀ ∇_φ L_b)/∂s [N_s], without a graph.

    Attributes:
        gradient: [B, N], every task's gradient at phi.
    """

    def __init__(self, loss: Loss, phi: Tensor, data: Any) -> None:
        with recording():
            self._phi, self._values = _leaf(phi), _leaf(loss.shared)
            losses = loss.sharing(self._values)(self._phi, recordable(data))
            gradient = task_gradient(losses, self._phi, create_graph=True)
        self.gradient, self._edge = gradient.detach(), get_gradient_edge(gradient)

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        at = (self._phi, self._values)
        product, by_shared = torch.autograd.grad(
            self._edge, at, u, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return product, by_shared


def _leaf(values: Tensor | None) -> Tensor:
    assert values is not None, "the loss has no parameters that tasks share"
    return recordable(values).detach().requires_grad_()
