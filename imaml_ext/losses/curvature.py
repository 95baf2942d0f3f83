"""Curvature of the support loss as a product with vectors, linearised once and multiplied many times."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree

from imaml_ext.ops.network import NetworkLinearisation
from imaml_ext.ops.recording import recordable, recording
from imaml_ext.solvers.preconditioners.kfac import KroneckerFactors

ALL = slice(None)
_ONCE = "torch::autograd::Error"  # the node that autograd puts behind a function marked `once_differentiable`


class CurvatureOperator(ABC):
    """p [B, N] -> H p [B, N], row b from row b alone; with what linearising at phi has found on the way.

    Attributes:
        kind: "hessian" or "gauss_newton". losses: [B] support losses at phi. gradient: [B, N] their gradients.
        rows_per_block: how many rows at a time a solver does best with; None: all. With a number the operator also
            multiplies some rows alone, p [k, N] and the slice of the B rows that they are.
        kronecker_factors: makes what the preconditioner `KFAC` needs, from samples and a seed; None where a model's
            layers are unknown.

    Raises:
        TypeError, ValueError: a vector does not have the shape, dtype and device of phi, or of those rows of it.
    """

    kind: str
    losses: Tensor
    gradient: Tensor
    rows_per_block: int | None = None
    kronecker_factors: Callable[..., KroneckerFactors] | None = None

    def __init__(self, phi: Tensor) -> None:
        if phi.dim() != 2:
            raise ValueError(f"phi must have shape [B, N] (one row per task), got {list(phi.shape)}")
        with recording():
            self._phi = recordable(phi).detach().requires_grad_()

    def __call__(self, p: Tensor, rows: slice = ALL) -> Tensor:
        self._check(p, self._phi[rows])
        return self._product(p, rows)

    def curvature(self, p: Tensor) -> Tensor:
        """Returns pᵀ H p of every task, [B] float64, at the least price that there is."""
        return _dot(p, self(p))

    def of_columns(self, columns: int) -> Callable[..., Tensor] | None:
        """Returns p [B K, N] -> product for K = `columns` vectors per task, which share what linearising has found;
        None where there is no better way than one call for each. With a `rows_per_block` it also multiplies some rows
        alone, as this operator does."""
        return None

    @abstractmethod
    def _product(self, p: Tensor, rows: slice) -> Tensor: ...

    @staticmethod
    def _check(p: Tensor, phi: Tensor) -> None:
        if not isinstance(p, Tensor):
            raise TypeError(f"p must be a tensor, got {type(p).__name__}")
        if p.shape != phi.shape:
            raise ValueError(f"p must have the shape of phi, {list(phi.shape)}, got {list(p.shape)}")
        if p.dtype != phi.dtype or p.device != phi.device:
            raise ValueError(f"p must be {phi.dtype} on {phi.device} as phi is, got {p.dtype} on {p.device}")


class NativeCurvature(CurvatureOperator):
    """Either curvature by the native engine: one pass over what the gradient has stored."""

    def __init__(self, linearisation: NetworkLinearisation, phi: Tensor, kind: str) -> None:
        super().__init__(phi)
        self._native, self.kind = linearisation, kind
        self.losses, self.gradient = linearisation.losses, linearisation.gradient
        self.rows_per_block = linearisation.rows_per_block

    def of_columns(self, columns: int) -> Callable[..., Tensor]:
        return self._native.products(columns, gauss_newton=self.kind == "gauss_newton")

    def _product(self, p: Tensor, rows: slice) -> Tensor:
        return self._native.product(p, rows, gauss_newton=self.kind == "gauss_newton")

    def curvature(self, p: Tensor) -> Tensor:
        """Returns pᵀ H p; pᵀ G p is (J p)ᵀ C (J p), half of a product, as nothing goes back."""
        if self.kind == "hessian":
            return super().curvature(p)
        self._check(p, self._phi)
        return self._native.curvature(p)


class HessianOperator(CurvatureOperator):
    """H_b = ∇²L_b(φ_b): the gradient is built once, with its graph; a product differentiates that graph only."""

    kind = "hessian"

    def __init__(self, loss: Callable[[Tensor, Any], Tensor], phi: Tensor, data: Any) -> None:
        super().__init__(phi)
        with recording():
            losses = loss(self._phi, recordable(data))
            gradient = task_gradient(losses, self._phi, create_graph=True)
        self.losses, self.gradient = losses.detach(), gradient.detach()
        # The graph alone, so that whoever needs no gradient any more can let go of its memory.
        self._edge = get_gradient_edge(gradient) if gradient.requires_grad else None

    def _product(self, p: Tensor, rows: slice) -> Tensor:
        if self._edge is None:
            return torch.zeros_like(p)
        return torch.autograd.grad(
            self._edge, self._phi, p, retain_graph=True, allow_unused=True, materialize_grads=True
        )[0]


class GaussNewtonOperator(CurvatureOperator):
    """G_b = J_bᵀ C_b J_b, J the Jacobian of the outputs in the parameters, C the criterion's Hessian in the outputs.

    Positive semi-definite where the criterion is convex in the outputs, as cross-entropy and squared error are, and
    equal to the Hessian where the outputs are linear in the parameters. J p comes from differentiating w ↦ Jᵀ w, which
    is linear, so that reverse mode alone is needed; its graph is built once.

    Args:
        outputs: params [B, N] -> outputs [B, S, *], a tensor or a structure of tensors, in which those of floating
            point count. criterion: outputs -> losses [B].

    Source: Schraudolph, Fast curvature matrix-vector products (2002); Martens, Hessian-free optimization (2010).
    """

    kind = "gauss_newton"

    def __init__(self, outputs: Callable[[Tensor], Any], criterion: Callable[[Any], Tensor], phi: Tensor) -> None:
        super().__init__(phi)
        with recording():
            self._outputs, structured = _flattened(outputs(self._phi))  # [B, M]
            self._leaf_outputs = self._outputs.detach().requires_grad_()
            losses = criterion(structured(self._leaf_outputs))  # [B]
            self._output_gradient = task_gradient(losses, self._leaf_outputs, create_graph=True)
            self._cotangent = torch.zeros_like(self._outputs).requires_grad_()  # w
            self._pullback = _pullback(self._outputs, self._phi, self._cotangent, "model")  # Jᵀ w
        self.losses = losses.detach()
        self.gradient = vector_jacobian(self._outputs, self._phi, self._output_gradient.detach())

    def _product(self, p: Tensor, rows: slice) -> Tensor:
        return vector_jacobian(self._outputs, self._phi, self._along(p)[1])  # Jᵀ C J p

    def curvature(self, p: Tensor) -> Tensor:
        """Returns pᵀ G p as (J p)ᵀ C (J p): half of a product, as nothing goes back."""
        self._check(p, self._phi)
        tangent, curved = self._along(p)
        return _dot(tangent, curved)

    def _along(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """J p and C J p, [B, M]."""
        tangent = vector_jacobian(self._pullback, self._cotangent, p)
        return tangent, vector_jacobian(self._output_gradient, self._leaf_outputs, tangent)


def _flattened(outputs: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Outputs, a structure of tensors [B, *], as [B, M], and what makes the structure of such a tensor again."""
    leaves, spec = pytree.tree_flatten(outputs)
    counted = [leaf for leaf in leaves if leaf.is_floating_point()]
    widths = [leaf[0].numel() for leaf in counted]

    def structured(flat: Tensor) -> Any:
        pieces = iter(flat.split(widths, 1))
        filled = [next(pieces).view(leaf.shape) if leaf.is_floating_point() else leaf for leaf in leaves]
        return pytree.tree_unflatten(filled, spec)

    return torch.cat([leaf.reshape(len(leaf), -1) for leaf in counted], 1), structured


def task_gradient(losses: Tensor, params: Tensor, *, create_graph: bool = False) -> Tensor:
    """Returns every task's own gradient [B, N] from one backward pass; zero where no loss depends on a parameter.

    Raises:
        ValueError: the losses depend on nothing by differentiable operations; or, where a graph is asked for, their
            gradient cannot be differentiated.
    """
    if not losses.requires_grad:
        raise ValueError("loss must depend on params by differentiable operations, got a constant")
    if not create_graph:
        (gradient,) = torch.autograd.grad(losses.sum(), params, allow_unused=True, materialize_grads=True)
        return gradient.contiguous()
    return _pullback(losses, params, torch.ones_like(losses).requires_grad_(), "loss")


def _check_graph(derivative: Tensor, params: Tensor, weights: Tensor, name: str) -> None:
    """Raises ValueError where autograd cannot follow a derivative in params, linear in the leaf `weights`, to these.

    So it is where a function on the way is marked `once_differentiable`, or where all ways are cut. Autograd by itself
    would take the derivative for a constant, as that of a linear function is. A backward that detaches a part of what
    it returns is not found.
    """
    reached, found = False, {params.grad_fn}
    waiting = [derivative.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in found:
            continue
        found.add(node)
        if node.name() == _ONCE:
            reached = False
            break
        reached |= getattr(node, "variable", None) is weights
        waiting += [following for following, _ in node.next_functions]
    if not reached:
        raise ValueError(
            f"{name} must be twice differentiable in params, got one whose gradient is differentiable no further: "
            "write the backward of its autograd.Function in differentiable operations (not once_differentiable)"
        )


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Says what it means where autograd does not know the derivative of an operation."""
    try:
        yield
    except RuntimeError as error:
        unknown = "is not implemented" in str(error) or "don't support automatic differentiation" in str(error)
        if not unknown:
            raise
        raise ValueError(
            f"{name} must be twice differentiable in params, got an operation that is not ({error})"
        ) from error


def vector_jacobian(outputs: Tensor, inputs: Tensor, vector: Tensor) -> Tensor:
    """Returns vectorᵀ ∂outputs/∂inputs and keeps the graph of the outputs; zero where there is no dependence."""
    if not outputs.requires_grad:
        return torch.zeros_like(inputs)
    with _explained("loss"):
        return torch.autograd.grad(outputs, inputs, vector, True, allow_unused=True, materialize_grads=True)[0]


def _pullback(outputs: Tensor, params: Tensor, cotangent: Tensor, name: str) -> Tensor:
    """cotangentᵀ ∂outputs/∂params [B, N] with a graph into the leaf `cotangent`; zero where there is no dependence."""
    if not outputs.requires_grad:
        return torch.zeros_like(params)
    with _explained(name):
        (pulled,) = torch.autograd.grad(outputs, params, cotangent, create_graph=True, allow_unused=True)
    if pulled is None:
        return torch.zeros_like(params)
    _check_graph(pulled, params, cotangent, name)
    return pulled


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b of every row, [B] float64."""
    return (a.double() * b.double()).sum(1)
