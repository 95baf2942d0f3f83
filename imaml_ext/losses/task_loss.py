"""The loss of a model: its outputs judged against targets, task by task."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from imaml_ext.batch import Data
from imaml_ext.checks import check_choice
from imaml_ext.losses.criteria import CRITERIA, Criterion, check_labels, check_targets, check_values
from imaml_ext.losses.curvature import CurvatureOperator, GaussNewtonOperator, NativeCurvature, task_gradient
from imaml_ext.losses.kronecker import kronecker_factors
from imaml_ext.losses.loss import Loss, LossGradient, check_losses, task_rows
from imaml_ext.models.layout import ParameterLayout
from imaml_ext.models.module import ModuleModel
from imaml_ext.models.task_model import TaskModel
from imaml_ext.ops.network import (
    Network,
    NetworkLinearisation,
    network_descend_,
    network_gradient,
    network_losses,
    network_outputs,
    supports,
)

ENGINES = ("auto", "native", "torch")


class TaskLoss(Loss):
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
            check_choice("criterion", criterion, CRITERIA)
        elif not callable(criterion):
            raise TypeError(f"criterion must be a name or a callable, got {type(criterion).__name__}")
        check_choice("engine", engine, ENGINES)
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
        self.criterion_name = criterion if isinstance(criterion, str) else None
        self._criterion = CRITERIA[criterion] if isinstance(criterion, str) else criterion
        self._network = model.network if isinstance(criterion, str) and engine != "torch" else None
        self._compiled = torch.compile(self._gradient_of_all, dynamic=False) if compiled else None

    curvatures = ("hessian", "gauss_newton")

    @property
    def layout(self) -> ParameterLayout:  # type: ignore[override]
        """Where the model's named parameters lie in a row."""
        return self.model.layout

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
        check_targets(targets, outputs.device)
        return check_losses(self._criterion(outputs, targets), outputs.shape[0], "criterion")

    def accuracy(self, outputs: Tensor | None, targets: Tensor) -> Tensor | None:
        """Returns the fraction [B] of a task's examples that are classified right; None unless cross-entropy."""
        if not self.classification or outputs is None:
            return None
        return (outputs.argmax(-1) == targets).to(outputs.dtype).mean(1)

    def __call__(self, params: Tensor, data: Data) -> Tensor:
        """Losses [B] of every task; differentiable in params, twice with the native engine, else to any order."""
        network = self._native(params, data.x)
        if network is None or not (torch.is_grad_enabled() and params.requires_grad):
            return self.criterion(self.outputs(params, data.x), data.y)
        return network_losses(params, data.x, self._checked(params, data), network)

    def measure(self, params: Tensor, data: Data) -> tuple[Tensor, Tensor | None]:
        """Returns the losses [B] and, in classification, the accuracies [B], without a graph."""
        with torch.no_grad():
            outputs = self.outputs(params, data.x)
            return self.criterion(outputs, data.y), self.accuracy(outputs, data.y)

    def gradient(self, params: Tensor, data: Data) -> LossGradient:
        """Returns losses, outputs and gradients of every task in one pass, without a graph.

        Raises:
            TypeError, ValueError: params or data of a wrong dtype, shape or device, or losses without a gradient.
        """
        network = self._native(params, data.x)
        if network is not None:
            return LossGradient(*network_gradient(params, data.x, self._checked(params, data), network))
        if self._compiled is not None:
            self.model.check(params, data.x)
            check_targets(data.y, params.device)
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
            losses = check_losses(self._criterion(outputs, y), outputs.shape[0], "criterion")
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

    def linearize(self, params: Tensor, data: Data, kind: str = "hessian") -> CurvatureOperator:
        self.check_curvature(kind)
        task_rows(params, data, None)
        operator = self._linearize(params, data, kind)
        if self.criterion_name is not None:
            operator.kronecker_factors = functools.partial(
                kronecker_factors, self.model, self.criterion_name, params.detach(), data
            )
        return operator

    def _linearize(self, params: Tensor, data: Data, kind: str) -> CurvatureOperator:
        network = self._native(params, data.x)
        if network is not None and params.dim() == 2:
            linearisation = NetworkLinearisation(params, data.x, self._checked(params, data), network)
            return NativeCurvature(linearisation, params, kind)
        if kind == "hessian":
            return super().linearize(params, data)
        return GaussNewtonOperator(
            lambda phi: self.outputs(phi, data.x), lambda outputs: self.criterion(outputs, data.y), params
        )

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
        check_targets(data.y, params.device)
        assert self.model.network is not None
        shape = torch.Size((*data.x.shape[:2], self.model.network[-4]))  # [B, S, K]
        return check_labels(shape, data.y) if self.classification else check_values(shape, params.dtype, data.y)
