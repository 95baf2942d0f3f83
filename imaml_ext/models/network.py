"""The door to the native network ops: a loss whose first and second derivatives are written out by hand.

csrc/network/network.h says what a network is there: a list of layers, each a product with a weight, a norm, an
activation and a pooling. On the CPU a task goes through all of its layers at once, so that its activations stay in the
processor's cache; on CUDA all tasks go through a layer together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

import imaml_ext.ops  # noqa: F401  (registers the ops)
from imaml_ext._native import native

Network = tuple[int, ...]  # the int[] of the ops

NORMS = {"bias": 0, "batch": 1}
ACTIVATIONS = {"identity": 0, "relu": 1, "tanh": 2}
POOLS = {"none": 0, "max": 1, "mean": 2}

# What a solve may take of the last-level cache, which others use too; and x, r, p, H p, b and φ of a task.
_CACHE_BYTES = 16 * 2**20
_VECTORS_OF_A_SOLVE = 6


def describe_input(channels: int, height: int = 1, width: int = 1) -> Network:
    """The beginning of a description: the shape of an example."""
    return (channels, height, width)


def describe_layer(
    channels: int,
    *,
    kernel: int = 0,
    stride: int = 1,
    norm: str = "bias",
    activation: str = "identity",
    pool: str = "none",
) -> Network:
    """One layer: `kernel` 3 for a 3×3 convolution with zero padding 1, or 0 for a linear layer over all pixels."""
    return (kernel, stride, channels, NORMS[norm], ACTIVATIONS[activation], POOLS[pool])


def supports(params: Tensor) -> bool:
    """Whether there are kernels for parameters of this device and dtype, outside the transforms of torch.func."""
    return (
        (params.is_cpu or (params.is_cuda and native().with_cuda))
        and params.dtype in (torch.float32, torch.float64)
        and not is_functorch_wrapped_tensor(params)
    )


def network_outputs(params: Tensor, x: Tensor, network: Network) -> Tensor:
    """Outputs [B, S, K] without a graph."""
    return torch.ops.imaml_ext.network_outputs(params.detach().contiguous(), x.contiguous(), network)


def network_gradient(params: Tensor, x: Tensor, y: Tensor, network: Network) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [B], outputs [B, S, K] and every task's own gradient [B, N], without a graph."""
    return torch.ops.imaml_ext.network_gradient(params.detach().contiguous(), x.contiguous(), y.contiguous(), network)


def network_descend_(
    phi: Tensor, theta: Tensor, lam: Tensor, lr: Tensor, x: Tensor, y: Tensor, network: Network, steps: int
) -> Tensor:
    """`steps` proximal gradient steps on phi [B, N] in place, and the losses [steps, B] before each.

    theta: [1 or B, N]; lam, lr: [1 or B, 1 or N].
    """
    return torch.ops.imaml_ext.network_descend_(phi, theta, lam, lr, x.contiguous(), y.contiguous(), network, steps)


class NetworkLinearisation:
    """The loss around params [B, N]: its value, its gradient, and products with its second derivative.

    Attributes:
        losses: [B]. outputs: [B, S, K]. gradient: [B, N]; none has a graph.
    """

    def __init__(self, params: Tensor, x: Tensor, y: Tensor, network: Network) -> None:
        self._params = params.detach().contiguous()
        self._y = y.contiguous()
        self._network = network
        self.losses, self.outputs, self.gradient, self._tape = torch.ops.imaml_ext.network_linearise(
            self._params, x.contiguous(), self._y, network
        )

    def product(self, p: Tensor, rows: slice = slice(None), *, gauss_newton: bool = False) -> Tensor:
        """H p, or Jᵀ C J p, [B, N] for p [B, N]: one pass forward along p and one back, over what was stored.

        With `rows`, of some tasks alone: [k, N] for p [k, N].
        """
        return torch.ops.imaml_ext.network_product(
            self._params[rows], self._tape[rows], self._y[rows], p.detach().contiguous(), self._network, gauss_newton
        )

    def curvature(self, p: Tensor) -> Tensor:
        """pᵀ Jᵀ C J p [B] float64 for p [B, N]: the pass forward alone, half of a product."""
        return torch.ops.imaml_ext.network_curvature(
            self._params, self._tape, self._y, p.detach().contiguous(), self._network
        )

    @property
    def rows_per_block(self) -> int | None:
        """So many tasks at a time that a solve of theirs stays in the cache, and each thread has one at least; None for
        all of them, on CUDA, where they are to fill the device.
        """
        if not self._params.is_cpu:
            return None
        of_a_task = self._tape[0].nbytes + _VECTORS_OF_A_SOLVE * self._params[0].nbytes
        threads = torch.get_num_threads()
        return max(1, _CACHE_BYTES // (of_a_task * threads)) * threads


def network_losses(params: Tensor, x: Tensor, y: Tensor, network: Network) -> Tensor:
    """Losses [B], twice differentiable in params [B, N]."""
    return _Losses.apply(params, x, y, network)


class _Losses(torch.autograd.Function):
    """The gradient comes with the losses, in one pass; a graph of it is made where one is asked for."""

    @staticmethod
    def forward(ctx: Any, params: Tensor, x: Tensor, y: Tensor, network: Network) -> Tensor:
        losses, _, gradient = network_gradient(params, x, y, network)
        ctx.save_for_backward(params, x, y, gradient)
        ctx.network = network
        return losses

    @staticmethod
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor, None, None, None]:
        params, x, y, gradient = ctx.saved_tensors
        return _Gradient.apply(params, weights, x, y, gradient, ctx.network), None, None, None


class _Gradient(torch.autograd.Function):
    """w ∇L [B, N] for weights w [B]; its derivative is the product with the Hessian."""

    @staticmethod
    def forward(
        ctx: Any, params: Tensor, weights: Tensor, x: Tensor, y: Tensor, gradient: Tensor, network: Network
    ) -> Tensor:
        ctx.save_for_backward(params, weights, x, y, gradient)
        ctx.network = network
        ctx.linearisation = None
        return weights.unsqueeze(1) * gradient

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        params, weights, x, y, gradient = ctx.saved_tensors
        needs_params, needs_weights, *_ = ctx.needs_input_grad
        by_params = by_weights = None
        if needs_params:
            if ctx.linearisation is None:  # once, however many products follow
                ctx.linearisation = NetworkLinearisation(params, x, y, ctx.network)
            by_params = ctx.linearisation.product(weights.unsqueeze(1) * u)
            if torch.is_grad_enabled():
                by_params = _Last.apply(by_params, params, weights, u)
        if needs_weights:
            by_weights = (gradient * u).sum(1)
        return by_params, by_weights, None, None, None, None


class _Last(torch.autograd.Function):
    """A second derivative, for which there is no third: an error, where autograd by itself would take it for zero."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, *depends_on: Tensor) -> Tensor:
        return product.view_as(product)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "the native engine of TaskLoss differentiates twice; for higher derivatives give it engine='torch'"
        )
