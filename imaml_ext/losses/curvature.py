"""Curvature of the support loss as a product with vectors, linearised once and multiplied many times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from imaml_ext.losses.gradients import task_gradient, vector_jacobian
from imaml_ext.ops.network import NetworkLinearisation

ALL = slice(None)


class CurvatureOperator(Protocol):
    """p [B, N] -> H p [B, N], row b from row b alone; with what linearising at phi has found on the way.

    Attributes:
        kind: "hessian" or "gauss_newton". losses: [B] support losses at phi. gradient: [B, N] their gradients.
        rows_per_block: how many rows at a time a solver does best with; None: all. With a number the operator also
            multiplies some rows alone, p [k, N] and the slice of the B rows that they are.
    """

    kind: str
    losses: Tensor
    gradient: Tensor
    rows_per_block: int | None

    def __call__(self, p: Tensor, rows: slice = ...) -> Tensor: ...

    def curvature(self, p: Tensor) -> Tensor:
        """Returns pᵀ H p of every task, [B] float64, at the least price that there is."""
        ...


class NativeCurvature:
    """Either curvature by the native engine: one pass over what the gradient has stored. It lives as the operator does.

    Raises:
        ValueError: a vector does not have the shape of phi, or of the rows of it that it is for.
    """

    def __init__(self, linearisation: NetworkLinearisation, phi: Tensor, kind: str) -> None:
        self._native, self._phi, self.kind = linearisation, phi, kind
        self.losses, self.gradient = linearisation.losses, linearisation.gradient
        self.rows_per_block = linearisation.rows_per_block

    def __call__(self, p: Tensor, rows: slice = ALL) -> Tensor:
        _check_vector(p, self._phi[rows])
        return self._native.product(p, rows, gauss_newton=self.kind == "gauss_newton")

    def curvature(self, p: Tensor) -> Tensor:
        """Returns pᵀ G p as (J p)ᵀ C (J p): half of a product, as nothing goes back."""
        _check_vector(p, self._phi)
        return _dot(p, self(p)) if self.kind == "hessian" else self._native.curvature(p)


class HessianOperator:
    """H_b = ∇²L_b(φ_b): the gradient is built once, with its graph; a product differentiates that graph only.

    Raises:
        ValueError: a vector does not have the shape of phi.
    """

    kind = "hessian"
    rows_per_block = None

    def __init__(self, loss: Callable[[Tensor, Any], Tensor], phi: Tensor, data: Any) -> None:
        self._params = _leaf(phi)
        with torch.enable_grad():
            losses = loss(self._params, data)
            self._gradient = task_gradient(losses, self._params, create_graph=True)
        self.losses, self.gradient = losses.detach(), self._gradient.detach()

    def __call__(self, p: Tensor, rows: slice = ALL) -> Tensor:
        _check_vector(p, self._params)
        return vector_jacobian(self._gradient, self._params, p)

    def curvature(self, p: Tensor) -> Tensor:
        return _dot(p, self(p))


class GaussNewtonOperator:
    """G_b = J_bᵀ C_b J_b, J the Jacobian of the outputs in the parameters, C the criterion's Hessian in the outputs.

    Positive semi-definite where the criterion is convex in the outputs, as cross-entropy and squared error are, and
    equal to the Hessian where the outputs are linear in the parameters. J p comes from differentiating w ↦ Jᵀ w, which
    is linear, so that reverse mode alone is needed; its graph is built once.

    Args:
        outputs: params [B, N] -> outputs [B, S, *]. criterion: outputs -> losses [B].

    Raises:
        ValueError: a vector does not have the shape of phi.

    Source: Schraudolph, Fast curvature matrix-vector products (2002); Martens, Hessian-free optimization (2010).
    """

    kind = "gauss_newton"
    rows_per_block = None

    def __init__(self, outputs: Callable[[Tensor], Tensor], criterion: Callable[[Tensor], Tensor], phi: Tensor) -> None:
        self._params = _leaf(phi)
        with torch.enable_grad():
            self._outputs = outputs(self._params)  # [B, S, *]
            self._leaf_outputs = self._outputs.detach().requires_grad_()
            losses = criterion(self._leaf_outputs)  # [B]
            self._output_gradient = task_gradient(losses, self._leaf_outputs, create_graph=True)
            self._cotangent = torch.zeros_like(self._outputs).requires_grad_()  # w
            self._pullback = vector_jacobian(self._outputs, self._params, self._cotangent, create_graph=True)  # Jᵀ w
        self.losses = losses.detach()
        self.gradient = vector_jacobian(self._outputs, self._params, self._output_gradient.detach())

    def __call__(self, p: Tensor, rows: slice = ALL) -> Tensor:
        _check_vector(p, self._params)
        return vector_jacobian(self._outputs, self._params, self._along(p)[1])  # Jᵀ C J p

    def curvature(self, p: Tensor) -> Tensor:
        """Returns pᵀ G p as (J p)ᵀ C (J p): half of a product, as nothing goes back."""
        _check_vector(p, self._params)
        tangent, curved = self._along(p)
        return _dot(tangent.flatten(1), curved.flatten(1))

    def _along(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """J p and C J p, [B, S, *]."""
        tangent = vector_jacobian(self._pullback, self._cotangent, p)
        return tangent, vector_jacobian(self._output_gradient, self._leaf_outputs, tangent)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b of every row, [B] float64."""
    return (a.double() * b.double()).sum(1)


def _leaf(phi: Tensor) -> Tensor:
    if phi.dim() != 2:
        raise ValueError(f"phi must have shape [B, N] (one row per task), got {list(phi.shape)}")
    return phi.detach().requires_grad_()


def _check_vector(p: Tensor, params: Tensor) -> None:
    if not isinstance(p, Tensor):
        raise TypeError(f"p must be a tensor, got {type(p).__name__}")
    if p.shape != params.shape:
        raise ValueError(f"p must have the shape of phi, {list(params.shape)}, got {list(p.shape)}")
    if p.dtype != params.dtype or p.device != params.device:
        raise ValueError(f"p must be {params.dtype} on {params.device} as phi is, got {p.dtype} on {p.device}")
