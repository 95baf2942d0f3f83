"""The native network ops: a whole network with its loss, whose first and second derivatives are written out by hand.

A network is a list of layers here, each a product with a weight, a norm, an activation and a pooling.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from imaml_ext._native import native, no_cuda_code
from imaml_ext.ops.registration import register_fake

Network = tuple[int, ...]  # the int[] of the ops: channels, height and width of an example, then six numbers per layer

_NORMS = {"bias": 0, "batch": 1}
_ACTIVATIONS = {"identity": 0, "relu": 1, "tanh": 2}
_POOLS = {"none": 0, "max": 1, "mean": 2}

# What a solve may take of the last-level cache, which others use too; and x, r, p, H p, b and φ of a task.
_CACHE_BYTES = 16 * 2**20
_VECTORS_OF_A_SOLVE = 6


@dataclass(frozen=True, eq=False)
class Arranged:
    """A network whose parameters lie in the rows of its model in another order.

    Attributes:
        layers: the network. order: int64 [N], which entry of the model's row each entry of the network's row is.
    """

    layers: Network
    order: Tensor

    @functools.cached_property
    def inverse(self) -> Tensor:
        return self.order.argsort()

    def to_network(self, rows: Tensor) -> Tensor:
        """Rows [k, N] of the model as the network's; [k, 1] for all parameters stay."""
        return rows if rows.shape[1] == 1 else rows.index_select(1, self.order.to(rows.device))

    def to_model(self, rows: Tensor) -> Tensor:
        """Rows [k, N] of the network as the model's."""
        return rows.index_select(1, self.inverse.to(rows.device))


def layers_of(network: Network | Arranged) -> Network:
    """Returns the layers of a network in either form."""
    return network.layers if isinstance(network, Arranged) else network


def num_outputs(network: Network | Arranged) -> int:
    """Returns K."""
    return layers_of(network)[-4]


def _to_network(network: Network | Arranged, rows: Tensor) -> Tensor:
    return network.to_network(rows) if isinstance(network, Arranged) else rows


def _to_model(network: Network | Arranged, rows: Tensor) -> Tensor:
    return network.to_model(rows) if isinstance(network, Arranged) else rows


def convolution(channels: int, *, stride: int, pool: str) -> Network:
    """Describes a layer: a 3×3 convolution with zero padding 1, batch norm, ReLU, then a pooling."""
    return (3, stride, channels, _NORMS["batch"], _ACTIVATIONS["relu"], _POOLS[pool])


def linear(channels: int, activation: str = "identity") -> Network:
    """Describes a layer: the product of all pixels with a weight, a bias, then an activation."""
    return (0, 1, channels, _NORMS["bias"], _ACTIVATIONS[activation], _POOLS["none"])


def supports(params: Tensor) -> bool:
    """Tells whether there are kernels for parameters of this device and dtype, outside the transforms of torch.func.

    Warns once of CUDA parameters where the compiled part has no CUDA code.

    Raises:
        NativeUnavailableError: there would be, but the compiled part does not load.
    """
    if params.dtype not in (torch.float32, torch.float64) or is_functorch_wrapped_tensor(params):
        return False
    if params.is_cuda and not native().with_cuda:
        _warn_without_cuda()
        return False
    return params.is_cuda or (params.is_cpu and native() is not None)


@functools.cache
def _warn_without_cuda() -> None:
    warnings.warn(f"networks on CUDA are left to torch's own ops: {no_cuda_code()}", RuntimeWarning, stacklevel=4)


def _ops(like: Tensor) -> Any:
    """Returns the native ops; raises NativeUnavailableError where there are none for the device of `like`."""
    native(like.device)
    return torch.ops.imaml_ext


def network_outputs(params: Tensor, x: Tensor, network: Network | Arranged) -> Tensor:
    """Returns outputs [B, S, K] without a graph."""
    params = _to_network(network, params.detach()).contiguous()
    return _ops(params).network_outputs(params, x.contiguous(), layers_of(network))


def network_gradient(
    params: Tensor, x: Tensor, y: Tensor, network: Network | Arranged
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns losses [B], outputs [B, S, K] and every task's own gradient [B, N], without a graph."""
    params = _to_network(network, params.detach()).contiguous()
    losses, outputs, gradient = _ops(params).network_gradient(
        params, x.contiguous(), y.contiguous(), layers_of(network)
    )
    return losses, outputs, _to_model(network, gradient)


def network_descend_(
    phi: Tensor, theta: Tensor, lam: Tensor, lr: Tensor, x: Tensor, y: Tensor, network: Network | Arranged, steps: int
) -> Tensor:
    """Takes `steps` proximal gradient steps on phi [B, N] in place; returns the losses [steps, B] before each.

    theta is [1 or B, N], lam and lr are [1 or B, 1 or N].
    """
    moved, *others = (_to_network(network, rows) for rows in (phi, theta, lam, lr))
    losses = _ops(phi).network_descend_(moved, *others, x.contiguous(), y.contiguous(), layers_of(network), steps)
    if moved is not phi:
        phi.copy_(_to_model(network, moved))
    return losses


class NetworkLinearisation:
    """Holds losses [B], outputs [B, S, K] and gradient [B, N] at params [B, N]; multiplies by the second derivative."""

    def __init__(self, params: Tensor, x: Tensor, y: Tensor, network: Network | Arranged) -> None:
        self._params = _to_network(network, params.detach()).contiguous()
        self._y, self._network, self._given = y.contiguous(), layers_of(network), network
        self.losses, self.outputs, gradient, self._tape = _ops(params).network_linearise(
            self._params, x.contiguous(), self._y, self._network
        )
        self.gradient = _to_model(network, gradient)

    def product(self, p: Tensor, rows: slice = slice(None), *, gauss_newton: bool = False) -> Tensor:
        """Returns H p, or Jᵀ C J p, [k, N] for p [k, N] of the tasks `rows`: a pass forward along p and one back.

        Where there is one task, p [k, N] may be as many vectors for it, which share what it has stored.
        """
        stored, p = (self._params[rows], self._tape[rows], self._y[rows]), _to_network(self._given, p.detach())
        product = _ops(p).network_product(*stored, p.contiguous(), self._network, gauss_newton)
        return _to_model(self._given, product)

    def curvature(self, p: Tensor) -> Tensor:
        """Returns pᵀ Jᵀ C J p [B] float64 for p [B, N], by the pass forward alone, half of a product."""
        p = _to_network(self._given, p.detach()).contiguous()
        return _ops(p).network_curvature(self._params, self._tape, self._y, p, self._network)

    def products(self, columns: int, *, gauss_newton: bool = False) -> Callable[..., Tensor]:
        """Returns p [B K, N] -> product, for K = `columns` vectors per task, which share what it has stored."""
        batch = len(self._params)
        if batch == 1 or (self._params.is_cpu and columns >= torch.get_num_threads()):
            return ProductsOfColumns(self, columns, gauss_newton)
        wide = copy.copy(self)  # all rows in one call
        for name in ("_params", "_y", "_tape"):
            setattr(wide, name, getattr(self, name).repeat_interleave(columns, 0))
        return functools.partial(wide.product, gauss_newton=gauss_newton)

    @property
    def rows_per_block(self) -> int | None:
        """Tasks to solve for at a time, so that they stay in the cache and each thread has one; None: all, on CUDA."""
        if not self._params.is_cpu:
            return None
        of_a_task = self._tape[0].nbytes + _VECTORS_OF_A_SOLVE * self._params[0].nbytes
        threads = torch.get_num_threads()
        return max(1, _CACHE_BYTES // (of_a_task * threads)) * threads


@dataclass(frozen=True)
class ProductsOfColumns:
    """p [B K, N] -> product; or p [k, N] and which of those rows they are: rows of one task, or all rows of some."""

    linearisation: NetworkLinearisation
    columns: int
    gauss_newton: bool

    @property
    def rows_per_block(self) -> int | None:
        """For one task one row per thread, as a block takes as many products as its slowest row; else a task's rows."""
        if not self.linearisation.losses.is_cpu:
            return None
        return torch.get_num_threads() if len(self.linearisation.losses) == 1 else self.columns

    def __call__(self, p: Tensor, rows: slice = slice(None)) -> Tensor:
        task = (rows.start or 0) // self.columns
        parts = [
            self.linearisation.product(part, slice(i, i + 1), gauss_newton=self.gauss_newton)
            for i, part in enumerate(p.split(self.columns), task)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def network_losses(params: Tensor, x: Tensor, y: Tensor, network: Network | Arranged) -> Tensor:
    """Returns losses [B], twice differentiable in params [B, N]."""
    return _Losses.apply(params, x, y, network)


class _Losses(torch.autograd.Function):
    """Computes the gradient with the losses, in one pass; makes a graph of it only when asked."""

    @staticmethod
    def forward(ctx: Any, params: Tensor, x: Tensor, y: Tensor, network: Network | Arranged) -> Tensor:
        losses, _, gradient = network_gradient(params, x, y, network)
        ctx.save_for_backward(params, x, y, gradient)
        ctx.network = network
        return losses

    @staticmethod
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor, None, None, None]:
        params, x, y, gradient = ctx.saved_tensors
        return _Gradient.apply(params, weights, x, y, gradient, ctx.network), None, None, None


class _Gradient(torch.autograd.Function):
    """Computes w ∇L [B, N] for weights w [B]; its derivative is the product with the Hessian."""

    @staticmethod
    def forward(
        ctx: Any, params: Tensor, weights: Tensor, x: Tensor, y: Tensor, gradient: Tensor, network: Network | Arranged
    ) -> Tensor:
        ctx.save_for_backward(params, weights, x, y, gradient)
        ctx.network, ctx.linearisation = network, None
        return weights.unsqueeze(1) * gradient

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        params, weights, x, y, gradient = ctx.saved_tensors
        needs_params, needs_weights, *_ = ctx.needs_input_grad
        by_params = None
        if needs_params:
            if ctx.linearisation is None:  # once, however many products follow
                ctx.linearisation = NetworkLinearisation(params, x, y, ctx.network)
            by_params = ctx.linearisation.product(weights.unsqueeze(1) * u)
            if torch.is_grad_enabled():
                by_params = _Last.apply(by_params, params, weights, u)
        return by_params, (gradient * u).sum(1) if needs_weights else None, None, None, None, None


class _Last(torch.autograd.Function):
    """Refuses a third derivative, which autograd by itself would take for zero."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, *depends_on: Tensor) -> Tensor:
        return product.view_as(product)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "the native engine of TaskLoss differentiates twice; for higher derivatives give it engine='torch'"
        )


# --- what torch.compile needs to know -------------------------------------------------------------------------------


def _fake_outputs(params: Tensor, x: Tensor, network: list[int]) -> Tensor:
    return params.new_empty((*x.shape[:2], network[-4]))


def _fake_gradient(params: Tensor, x: Tensor, y: Tensor, network: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    return params.new_empty(x.shape[:1]), _fake_outputs(params, x, network), torch.empty_like(params)


def _fake_linearise(params: Tensor, x: Tensor, y: Tensor, network: list[int]) -> tuple[Tensor, ...]:
    size = native().network_tape_size(network, x.shape[1], params.element_size())
    return *_fake_gradient(params, x, y, network), params.new_empty((x.shape[0], size), dtype=torch.uint8)


register_fake("network_outputs", _fake_outputs)
register_fake("network_gradient", _fake_gradient)
register_fake("network_descend_", lambda phi, theta, lam, lr, x, y, network, steps: phi.new_empty((steps, len(phi))))
register_fake("network_linearise", _fake_linearise)
register_fake("network_product", lambda params, tape, y, p, network, gauss_newton: torch.empty_like(p))
register_fake("network_curvature", lambda params, tape, y, p, network: p.new_empty(len(p), dtype=torch.float64))
