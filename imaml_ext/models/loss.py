"""Losses of many tasks at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from imaml_ext.batch import Data
from imaml_ext.models.module import ModuleModel
from imaml_ext.models.network import (
    Network,
    NetworkLinearisation,
    network_descend_,
    network_gradient,
    network_losses,
    network_outputs,
    supports,
)
from imaml_ext.models.task_model import TaskModel

Criterion = Callable[[Tensor, Tensor], Tensor]  # outputs [B, S, *], targets [B, S, *] -> losses [B]


LossFunction = Callable[[Tensor, Data], Tensor]  # params [B, N], data -> losses [B]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over a task's examples of −log softmax(outputs)[target].

    Args:
        outputs: [B, S, K] logits. targets: [B, S] int64 labels.

    Returns [B].

    Raises:
        TypeError, ValueError: a dtype or shape that does not fit; names the argument.
    """
    check_labels(outputs.shape, targets)
    log_probabilities = outputs.log_softmax(-1)
    return -log_probabilities.gather(-1, targets.unsqueeze(-1)).mean((1, 2))


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over all entries of a task of (output − target)².

    Args:
        outputs, targets: [B, S, *], of one shape; targets [B, S] fit outputs [B, S, 1].

    Returns [B].

    Raises:
        TypeError, ValueError: a dtype or shape that does not fit; names the argument.
    """
    return (outputs - check_values(outputs.shape, outputs.dtype, targets)).square().flatten(1).mean(1)


def check_labels(outputs_shape: torch.Size, targets: Tensor) -> Tensor:
    """Raises TypeError or ValueError unless targets are labels [B, S] for outputs [B, S, K]."""
    if len(outputs_shape) != 3:
        raise ValueError(f"outputs must have shape [B, S, classes] for cross-entropy, got {list(outputs_shape)}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64 labels for cross-entropy, got {targets.dtype}")
    if targets.shape != outputs_shape[:2]:
        raise ValueError(f"targets must have shape {list(outputs_shape[:2])}, got {list(targets.shape)}")
    return targets


def check_values(outputs_shape: torch.Size, dtype: torch.dtype, targets: Tensor) -> Tensor:
    """Targets in the shape of the outputs; raises TypeError or ValueError where they do not fit."""
    if outputs_shape == (*targets.shape, 1):
        targets = targets.unsqueeze(-1)
    if targets.shape != outputs_shape:
        raise ValueError(
            f"targets must have the shape of the outputs, {list(outputs_shape)}, got {list(targets.shape)}"
        )
    if targets.dtype != dtype:
        raise TypeError(f"targets must have the dtype of the outputs, {dtype}, got {targets.dtype}")
    return targets


_CRITERIA: dict[str, Criterion] = {"cross_entropy": cross_entropy, "mse": mse}


ENGINES = ("auto", "native", "torch")


class LossGradient(NamedTuple):
    """Losses [B], outputs [B, S, *] and every task's own gradient [B, N], without a graph."""

    losses: Tensor
    outputs: Tensor
    gradient: Tensor


class TaskLoss:
    """losses [B] = loss(params [B, N], data): a model's outputs on data.x judged against data.y, task by task.

    Args:
        model: a `TaskModel`.
        criterion: "cross_entropy", "mse", or a callable of outputs [B, S, *] and targets [B, S, *] that returns [B],
            entry b from row b alone; convex in the outputs where the Gauss-Newton matrix is to be positive
            semi-definite.
        engine: "native", kernels that know the whole network with its first and second derivatives (`Conv4` and `MLP`
            with a named criterion, in float32 and float64, on the CPU and, where the extension was built for it, on
            CUDA); "torch", autograd through torch ops, differentiable to any order; "auto", native where there is one.
            They agree up to rounding. On CUDA a label outside the classes is no error with "native": the losses and
            derivatives of its task are NaN.
        compiled: for a model made by `from_module`, `gradient` goes through torch.compile: half a minute at its first
            call with inputs of each shape, faster from then on. Second derivatives do not, where it is no faster than
            the graph that they are linearised by.

    Raises:
        TypeError, ValueError: not a model, an unknown criterion or engine, compiled with another model.
    """

    def __init__(
        self, model: TaskModel, criterion: str | Criterion, *, engine: str = "auto", compiled: bool = False
    ) -> None:
        if not isinstance(model, TaskModel):
            raise TypeError(
                f"model must be a TaskModel, got {type(model).__name__}: "
                "wrap an nn.Module with imaml_ext.models.from_module"
            )
        if isinstance(criterion, str):
            if criterion not in _CRITERIA:
                known = ", ".join(map(repr, _CRITERIA))
                raise ValueError(f"criterion must be one of {known} or a callable, got {criterion!r}")
        elif not callable(criterion):
            raise TypeError(f"criterion must be a name or a callable, got {type(criterion).__name__}")
        if engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(map(repr, ENGINES))}, got {engine!r}")
        if engine == "native" and model.precision != "float32":
            raise ValueError(
                f"engine must be 'auto' or 'torch' for a {type(model).__name__} of precision {model.precision!r}: "
                "the native kernels multiply in the type of the parameters"
            )
        if engine == "native" and (model.network is None or not isinstance(criterion, str)):
            raise ValueError(
                f"engine must be 'auto' or 'torch' for a {type(model).__name__} with {criterion!r}: "
                "there are native kernels for Conv4 and MLP with a named criterion only"
            )
        if compiled and not isinstance(model, ModuleModel):
            raise ValueError(f"compiled must be False for a {type(model).__name__}: it is for models of from_module")
        self.model = model
        self.engine = engine
        self.classification = criterion == "cross_entropy"
        self._criterion = _CRITERIA[criterion] if isinstance(criterion, str) else criterion
        self._network = model.network if isinstance(criterion, str) and engine != "torch" else None
        self._compiled = torch.compile(self._gradient_of_all, dynamic=False) if compiled else None

    def outputs(self, params: Tensor, x: Tensor) -> Tensor:
        """The model's outputs [B, S, *] for params [B, N] and inputs x [B, S, *]; differentiable to any order."""
        network = self._native(params, x)
        needs_graph = torch.is_grad_enabled() and params.requires_grad
        if network is None or needs_graph:
            return self.model(params, x)
        self.model.check(params, x)
        return network_outputs(params, x, network)

    def criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Losses [B] of outputs [B, S, *].

        Raises:
            TypeError, ValueError: outputs and targets do not fit each other, or the criterion does not give [B].
        """
        _check_targets(targets, outputs.device)
        losses = self._criterion(outputs, targets)
        check_losses(losses, outputs.shape[0], "criterion")
        return losses

    def accuracy(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """Fraction [B] of a task's examples whose largest logit is the target's; None unless cross-entropy."""
        if not self.classification:
            return None
        return (outputs.argmax(-1) == targets).to(outputs.dtype).mean(1)

    def __call__(self, params: Tensor, data: Data) -> Tensor:
        """Losses [B] of every task; differentiable in params, twice with the native engine, else to any order."""
        network = self._native(params, data.x)
        if network is None or not (torch.is_grad_enabled() and params.requires_grad):
            return self.criterion(self.outputs(params, data.x), data.y)
        return network_losses(params, data.x, self._checked(params, data), network)

    def gradient(self, params: Tensor, data: Data) -> LossGradient:
        """Losses, outputs and gradients of every task in one pass, without a graph.

        Raises:
            TypeError, ValueError: params or data of a wrong dtype, shape or device, or losses without a gradient.
        """
        network = self._native(params, data.x)
        if network is not None:
            return LossGradient(*network_gradient(params, data.x, self._checked(params, data), network))
        if self._compiled is not None:
            self.model.check(params, data.x)
            _check_targets(data.y, params.device)
            assert isinstance(self.model, ModuleModel)
            self.model.place(params)
            return LossGradient(*self._compiled(params.detach(), data.x, data.y))
        leaf = params.detach().requires_grad_()
        with torch.enable_grad():
            outputs = self.outputs(leaf, data.x)
            losses = self.criterion(outputs, data.y)
            gradient = task_gradient(losses, leaf)
        return LossGradient(losses.detach(), outputs.detach(), gradient)

    def _gradient_of_all(self, params: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`gradient` by the transforms of torch.func, which torch.compile traces; arguments have been checked."""

        def total(params: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            outputs = self.model._outputs(params, x)
            losses = self._criterion(outputs, y)
            check_losses(losses, outputs.shape[0], "criterion")
            return losses.sum(), (losses, outputs)

        gradient, (losses, outputs) = torch.func.grad(total, has_aux=True)(params)
        return losses, outputs, gradient

    def descend_(self, phi: Tensor, theta: Tensor, data: Data, *, lam: Tensor, lr: Tensor, steps: int) -> Tensor | None:
        """`steps` times φ ← φ − η (∇L + λ (φ − θ)) in place, in one call, with the losses [steps, B] before
        each step; None, and nothing done, where the engine is torch.

        The same bits as `gradient` and `ops.prox_sgd_step_` in turn give, sooner.

        Args:
            phi: [B, N]. theta: [1 or B, N]. lam, lr: [1 or B, 1 or N].
        """
        network = self._native(phi, data.x)
        if network is None:
            return None
        return network_descend_(phi, theta, lam, lr, data.x, self._checked(phi, data), network, steps)

    def linearise(self, params: Tensor, data: Data) -> NetworkLinearisation | None:
        """The native second derivative around params [B, N], or None where the engine is torch."""
        network = self._native(params, data.x)
        if network is None:
            return None
        return NetworkLinearisation(params, data.x, self._checked(params, data), network)

    def _native(self, params: Tensor, x: Tensor) -> Network | None:
        """The network where the native engine computes it."""
        if self._network is None or not isinstance(params, Tensor) or not isinstance(x, Tensor) or x.requires_grad:
            return None
        if supports(params):
            return self._network
        if self.engine == "native":
            raise ValueError(
                "params must be float32 or float64, on the CPU or on CUDA with an extension built for it, with "
                f"engine='native', got {params.dtype} on {params.device}"
            )
        return None

    def _checked(self, params: Tensor, data: Data) -> Tensor:
        """The targets, all arguments having been checked."""
        self.model.check(params, data.x)
        _check_targets(data.y, params.device)
        assert self.model.network is not None
        shape = torch.Size((*data.x.shape[:2], self.model.network[-4]))  # [B, S, K]
        return check_labels(shape, data.y) if self.classification else check_values(shape, params.dtype, data.y)


def _check_targets(targets: object, device: torch.device) -> None:
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets must be a tensor, got {type(targets).__name__}")
    if targets.device != device:
        raise ValueError(f"targets must be on the device of the outputs, {device}, got {targets.device}")


def task_gradient(losses: Tensor, params: Tensor, *, create_graph: bool = False) -> Tensor:
    """Every task's own gradient [B, N] in one backward pass; zero where no loss depends on a parameter.

    Raises:
        ValueError: the losses depend on nothing by differentiable operations.
    """
    if not losses.requires_grad:
        raise ValueError("loss must depend on params by differentiable operations, got a constant")
    (gradient,) = torch.autograd.grad(
        losses.sum(), params, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return gradient if create_graph else gradient.contiguous()


def check_losses(losses: object, tasks: int, name: str) -> None:
    """Raises TypeError or ValueError unless `losses`, what `name` returned, has one number a task."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"{name} must return a tensor, got {type(losses).__name__}")
    if losses.shape != (tasks,):
        raise ValueError(f"{name} must return one loss a task, shape [{tasks}], got {list(losses.shape)}")
