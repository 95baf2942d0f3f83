"""Curvature of the support loss as a product with vectors, linearised once and multiplied many times."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from imaml_ext.inner.arguments import task_losses, task_rows
from imaml_ext.models import LossFunction, TaskLoss
from imaml_ext.models.loss import task_gradient

CURVATURES = ("hessian", "gauss_newton")
ALL = slice(None)


class CurvatureOperator(Protocol):
    """p [B, N] -> H p [B, N], row b from row b alone; with what linearising at phi has found on the way.

    With `rows_per_block`, the operator also multiplies some rows alone, p [k, N] and which of the B they are; a solver
    does best with so many at a time.
    """

    losses: Tensor  # [B] support losses at phi
    gradient: Tensor  # [B, N] their gradients
    rows_per_block: int | None

    def __call__(self, p: Tensor, rows: slice = ...) -> Tensor: ...


class HessianOperator:
    """H_b = ∇²L_b(φ_b): the gradient is built once, with its graph; a product differentiates that graph only.

    With the native engine of a `TaskLoss` a product is one pass over what the gradient has stored. What is stored lives
    as long as the operator.
    """

    def __init__(self, loss: LossFunction, phi: Tensor, data: Any) -> None:
        self._params = _leaf(phi, data)
        self._native = loss.linearise(self._params, data) if isinstance(loss, TaskLoss) else None
        self.rows_per_block = None if self._native is None else self._native.rows_per_block
        if self._native is not None:
            self.losses, self.gradient = self._native.losses, self._native.gradient
            return
        with torch.enable_grad():
            losses = task_losses(loss, self._params, data)
            self._gradient = task_gradient(losses, self._params, create_graph=True)
        self.losses = losses.detach()
        self.gradient = self._gradient.detach()

    def __call__(self, p: Tensor, rows: slice = ALL) -> Tensor:
        """H p [B, N] for p [B, N]; with the native engine also of some rows alone, p [k, N].

        Raises:
            ValueError: p does not have the shape of phi, or of those rows of it.
        """
        if self._native is not None:
            _check_vector(p, self._params[rows])
            return self._native.product(p, rows)
        _check_vector(p, self._params)
        return _product(self._gradient, self._params, p)


class GaussNewtonOperator:
    """G_b = J_bᵀ C_b J_b, J the Jacobian of the outputs in the parameters, C the criterion's Hessian in the outputs.

    Positive semi-definite where the criterion is convex in the outputs, as cross-entropy and squared error are, and
    equal to the Hessian where the outputs are linear in the parameters. J p comes from differentiating w ↦ Jᵀ w, which
    is linear, so that reverse mode alone is needed; its graph is built once.

    Source: Schraudolph, Fast curvature matrix-vector products (2002); Martens, Hessian-free optimization (2010).
    """

    def __init__(self, loss: LossFunction, phi: Tensor, data: Any) -> None:
        if not isinstance(loss, TaskLoss):
            raise TypeError(
                f"loss must be a TaskLoss for the Gauss-Newton matrix, which needs model outputs and criterion apart, "
                f"got {type(loss).__name__}"
            )
        self._params = _leaf(phi, data)
        self._native = loss.linearise(self._params, data)
        self.rows_per_block = None if self._native is None else self._native.rows_per_block
        if self._native is not None:
            self.losses, self.gradient = self._native.losses, self._native.gradient
            return
        with torch.enable_grad():
            self._outputs = loss.outputs(self._params, data.x)  # [B, S, *]
            self._leaf_outputs = self._outputs.detach().requires_grad_()
            losses = loss.criterion(self._leaf_outputs, data.y)  # [B]
            self._output_gradient = task_gradient(losses, self._leaf_outputs, create_graph=True)
            self._cotangent = torch.zeros_like(self._outputs).requires_grad_()  # w
            self._pullback = _product(self._outputs, self._params, self._cotangent, create_graph=True)  # Jᵀ w [B, N]
        self.losses = losses.detach()
        self.gradient = _product(self._outputs, self._params, self._output_gradient.detach())

    def __call__(self, p: Tensor, rows: slice = ALL) -> Tensor:
        """G p [B, N] for p [B, N]; with the native engine also of some rows alone, p [k, N].

        Raises:
            ValueError: p does not have the shape of phi, or of those rows of it.
        """
        if self._native is not None:
            _check_vector(p, self._params[rows])
            return self._native.product(p, rows, gauss_newton=True)
        _check_vector(p, self._params)
        _, curved = self._along(p)
        return _product(self._outputs, self._params, curved)  # Jᵀ C J p

    def curvature(self, p: Tensor) -> Tensor:
        """pᵀ G p = (J p)ᵀ C (J p) [B] float64 for p [B, N], at half the price of a product: nothing goes back.

        Raises:
            ValueError: p does not have the shape of phi.
        """
        _check_vector(p, self._params)
        if self._native is not None:
            return self._native.curvature(p)
        tangent, curved = self._along(p)
        return (tangent.double() * curved.double()).flatten(1).sum(1)

    def _along(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """J p and C J p, [B, S, *]."""
        tangent = _product(self._pullback, self._cotangent, p)
        return tangent, _product(self._output_gradient, self._leaf_outputs, tangent)


def hessian_operator(loss: LossFunction, phi: Tensor, data: Any) -> HessianOperator:
    """The Hessian of every task's loss at phi.

    Args:
        loss: losses [B] = loss(params [B, N], data). phi: [B, N]. data: handed to `loss`.

    Raises:
        TypeError, ValueError: phi or what the loss returned has the wrong dtype or shape.
    """
    return HessianOperator(loss, phi, data)


def gauss_newton_operator(loss: TaskLoss, phi: Tensor, data: Any) -> GaussNewtonOperator:
    """The Gauss-Newton matrix of every task's loss at phi; as `hessian_operator`, but loss is a `TaskLoss`."""
    return GaussNewtonOperator(loss, phi, data)


def curvature_operator(name: str, loss: LossFunction, phi: Tensor, data: Any) -> CurvatureOperator:
    """The operator called `name`, one of CURVATURES."""
    return (HessianOperator if name == "hessian" else GaussNewtonOperator)(loss, phi, data)


def _leaf(phi: Tensor, data: Any) -> Tensor:
    rows, _ = task_rows(phi, data, None)
    if phi.dim() != 2:
        raise ValueError(f"phi must have shape [B, N] (one row a task), got {list(phi.shape)}")
    return rows.detach().requires_grad_()


def _check_vector(p: Tensor, params: Tensor) -> None:
    if not isinstance(p, Tensor):
        raise TypeError(f"p must be a tensor, got {type(p).__name__}")
    if p.shape != params.shape:
        raise ValueError(f"p must have the shape of phi, {list(params.shape)}, got {list(p.shape)}")
    if p.dtype != params.dtype or p.device != params.device:
        raise ValueError(f"p must be {params.dtype} on {params.device} as phi is, got {p.dtype} on {p.device}")


def _product(outputs: Tensor, inputs: Tensor, vector: Tensor, *, create_graph: bool = False) -> Tensor:
    """vectorᵀ ∂outputs/∂inputs, keeping the graph of the outputs; zero where there is no dependence."""
    if not outputs.requires_grad:
        return torch.zeros_like(inputs)
    (product,) = torch.autograd.grad(
        outputs,
        inputs,
        vector,
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return product
