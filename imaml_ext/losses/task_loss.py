"""The loss of a model: its outputs judged against targets, task by task."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from imaml_ext.batch import Data, Structure, TaskData, as_data
from imaml_ext.checks import check_choice
from imaml_ext.losses.criteria import (
    CRITERIA,
    NAMED,
    Criterion,
    check_labels,
    check_targets,
    check_values,
    ignored_label,
    label_accuracy,
    of_each_task,
    torch_name,
)
from imaml_ext.losses.curvature import CurvatureOperator, GaussNewtonOperator, NativeCurvature, task_gradient
from imaml_ext.losses.kronecker import kronecker_factors
from imaml_ext.losses.loss import Loss, LossGradient, check_losses, task_rows
from imaml_ext.losses.ragged import OneSize, RaggedCurvature, RaggedData, may_look
from imaml_ext.losses.ways import absent_biases, of_classes, without_others
from imaml_ext.models.layout import ParameterLayout
from imaml_ext.models.module import ModuleModel
from imaml_ext.models.task_model import TaskModel
from imaml_ext.ops import prox_sgd_step_
from imaml_ext.ops.network import (
    Arranged,
    Network,
    NetworkLinearisation,
    network_descend_,
    network_gradient,
    network_losses,
    network_outputs,
    num_outputs,
    supports,
)
from imaml_ext.ops.recording import recordable, recording

ENGINES = ("auto", "native", "torch")
IGNORED = -100  # the label of no example, as torch has it


class TaskLoss(Loss):
    """losses [B] = loss(params [B, N], data): a model's outputs on data.x judged against data.y, task by task.

    Args:
        model: a `TaskModel`.
        criterion: "cross_entropy", "mse"; or a criterion of torch, as a function, a module or the function's name
            ("huber_loss"), which is called with each task's outputs [S, *] and targets; or any other callable of
            outputs [B, S, *] and targets [B, S, *] that returns [B], entry b from row b alone. Convex in the outputs
            where the Gauss-Newton matrix is to be positive semi-definite.
        engine: "native", kernels that know the whole network with its first and second derivatives (`Conv4` and `MLP`
            with a named criterion, in float32 and float64, on the CPU and, where the extension was built for it, on
            CUDA); "torch", autograd through torch ops, differentiable to any order; "auto", native where there is one.
            They agree up to rounding. On CUDA a label outside the classes is no error with "native": the losses and
            derivatives of its task are NaN.
        compiled: for a model made by `from_module`, `gradient` goes through torch.compile: half a minute at its first
            call with inputs of each shape, faster from then on. Second derivatives do not, where it is no faster than
            the graph that they are linearised by. Tasks that have ways of their own go without.
        accuracy: a function of outputs [B, S, *] and targets that returns accuracies [B]; unless given, the fraction
            of right labels of a cross-entropy, and none of any other criterion.

    Tasks of different sizes (a mask or ways in the data, see `TaskData`) are put into groups of equal ones, each of
    which is computed without padding: the result is that of every task alone, also with a batch norm. Grouping waits
    for the device. With "cross_entropy" the label -100 means an example that is not there. On the CPU such labels are
    looked for; on CUDA give mask = y != -100, since without it they are labels outside the classes.

    Raises:
        TypeError, ValueError: not a model, an unknown criterion or engine, compiled with another model.
    """

    def __init__(
        self,
        model: TaskModel,
        criterion: str | Criterion,
        *,
        engine: str = "auto",
        compiled: bool = False,
        accuracy: Callable[[Tensor, Tensor], Tensor] | None = None,
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
        named = isinstance(criterion, str) and criterion in NAMED
        if engine == "native" and (model.network is None or not named):
            raise ValueError(
                f"engine must be 'auto' or 'torch' for a {type(model).__name__} with {criterion!r}: "
                "there are native kernels for Conv4 and MLP with a named criterion only"
            )
        if compiled and not isinstance(model, ModuleModel):
            raise ValueError(f"compiled must be False for a {type(model).__name__}: it is for models of from_module")
        if accuracy is not None and not callable(accuracy):
            raise TypeError(f"accuracy must be a function, got {type(accuracy).__name__}")
        if compiled and model.shared_layout.numel:
            raise ValueError("compiled must be False for a model with parameters that tasks share")
        self.model = model
        self.engine = engine
        self.criterion_name = criterion if isinstance(criterion, str) and named else None
        function = CRITERIA[criterion] if isinstance(criterion, str) else criterion
        of_torch = None if named else torch_name(function)
        self.classification = "cross_entropy" in (self.criterion_name, of_torch)
        self._ignored = ignored_label(function) if of_torch == "cross_entropy" else None
        self._criterion = function if of_torch is None else of_each_task(function, of_torch)
        self._accuracy = accuracy
        self._ways: int | None = None  # those of every task, where not all outputs are classes
        self._by_kernels = named and engine != "torch"
        self._compiled = torch.compile(self._gradient_of_all, dynamic=False) if compiled else None

    curvatures = ("hessian", "gauss_newton")

    @property
    def layout(self) -> ParameterLayout:  # type: ignore[override]
        """Where the model's named parameters lie in a row."""
        return self.model.layout

    @functools.cached_property
    def shared(self) -> Tensor | None:  # type: ignore[override]
        """[N_s] the values that all tasks share, of a model that has such parameters."""
        return self.model.initial_shared(torch.float64, "cpu") if self.model.shared_layout.numel else None

    def sharing(self, values: Tensor) -> TaskLoss:
        loss = copy.copy(self)
        loss.model, loss.shared = self.model.sharing(values), values
        return loss

    @property
    def may_reach_others(self) -> bool:  # type: ignore[override]
        """A criterion of one's own may."""
        return self.criterion_name is None

    def tasks_at_once(self, params: Tensor, data: Any) -> int | None:
        return self.model.tasks_at_once(params, as_data(data).x)

    def by_autograd(self) -> TaskLoss:
        if not self._by_kernels:
            return self
        loss = copy.copy(self)
        loss.engine, loss._by_kernels = "torch", False
        return loss

    def prepared(self, data: Any) -> Any:
        """Returns the data with x and y and, where tasks differ in size, in groups of equal ones.

        Raises:
            TypeError, ValueError: data without x and y, or whose mask and ways do not fit; see `RaggedData.of`.
        """
        if isinstance(data, RaggedData | OneSize):
            return data
        data = as_data(data)
        mask, ways = getattr(data, "mask", None), getattr(data, "ways", None)
        if ways is not None and self.criterion_name == "mse":
            raise ValueError("ways must be None with the criterion 'mse', which has no classes")
        ragged = mask is not None or ways is not None
        if self.criterion_name == "cross_entropy" and may_look(data.y, ragged) and data.y.amin().cpu().numpy() < 0:
            there = data.y != IGNORED
            if not bool(there.all()):
                mask, ragged = there if mask is None else mask & there, True
        return RaggedData.of(TaskData(data.x, data.y, mask, ways)) if ragged else OneSize(data.x, data.y)

    def outputs(self, params: Tensor, x: Structure, mask: Tensor | None = None, ways: Tensor | None = None) -> Tensor:
        """The model's outputs [B, S, *] for params [B, N] and inputs x [B, S, *]; differentiable to any order.

        With a mask or ways (see `TaskData`) they are 0 where no example is, and −∞ for what is no class of the task.
        """
        if mask is not None or ways is not None:
            data = RaggedData.of(TaskData(x, (), mask, ways))
            return data.join_outputs([loss.outputs(p, part.x) for loss, part, p in self._groups(data, params)])
        network = self._native(params, x)
        needs_graph = torch.is_grad_enabled() and params.requires_grad
        if network is None or needs_graph:
            return self.model(params, x)
        self.model.check(params, x)
        return network_outputs(params, x, network)

    def criterion(
        self, outputs: Tensor, targets: Structure, mask: Tensor | None = None, ways: Tensor | None = None
    ) -> Tensor:
        """Losses [B] of outputs [B, S, *].

        Raises:
            TypeError, ValueError: outputs and targets do not fit each other, or the criterion does not give [B].
        """
        if mask is not None or ways is not None:
            data = RaggedData.of(TaskData(outputs, targets, mask, ways))
            return data.join([loss.criterion(part.x, part.y) for loss, part in self._groups(data)])
        outputs, tasks = of_classes(outputs, self._ways), len(pytree.tree_leaves(outputs)[0])
        check_targets(targets, pytree.tree_leaves(outputs)[0].device)
        return check_losses(self._criterion(outputs, targets), tasks, "criterion")

    def accuracy(
        self,
        outputs: Tensor | None,
        targets: Structure,
        mask: Tensor | None = None,
        ways: Tensor | None = None,
    ) -> Tensor | None:
        """Returns the accuracies [B]: the fraction of a task's examples with the right label, or what `accuracy` gives.

        None unless the criterion is a cross-entropy of labels, or such a function was given.
        """
        if outputs is None or not (self.classification or self._accuracy):
            return None
        if mask is not None or ways is not None:
            data = RaggedData.of(TaskData(outputs, targets, mask, ways))
            parts = [loss.accuracy(part.x, part.y) for loss, part in self._groups(data)]
            return None if parts[0] is None else data.join(parts)  # type: ignore[arg-type]
        outputs, tasks = of_classes(outputs, self._ways), len(pytree.tree_leaves(outputs)[0])
        if self._accuracy is not None:
            return check_losses(self._accuracy(outputs, targets), tasks, "accuracy", "accuracy")
        return label_accuracy(outputs, targets, self._ignored) if outputs.dim() == 3 else None

    def __call__(self, params: Tensor, data: Data) -> Tensor:
        """Losses [B] of every task; differentiable in params, twice with the native engine, else to any order."""
        data = self.prepared(data)
        if isinstance(data, RaggedData):
            return data.join([loss(p, part) for loss, part, p in self._groups(data, params)])
        network = self._native(params, data.x)
        of_targets = isinstance(data.y, Tensor) and data.y.requires_grad
        if network is None or of_targets or not (torch.is_grad_enabled() and params.requires_grad):
            return self.criterion(self.outputs(params, data.x), data.y)
        return network_losses(
            without_others(params, self.model, self._ways), data.x, self._checked(params, data), network
        )

    def measure(self, params: Tensor, data: Data) -> tuple[Tensor, Tensor | None]:
        """Returns the losses [B] and the accuracies [B] where there are any, without a graph."""
        data = self.prepared(data)
        if isinstance(data, RaggedData):
            losses, found = zip(*(loss.measure(p, part) for loss, part, p in self._groups(data, params)), strict=True)
            return data.join(losses), None if found[0] is None else data.join(found)
        with recording():  # for a model or criterion that takes derivatives itself
            params, data = recordable(params).detach(), recordable(data)
            outputs = self.outputs(params, data.x)
            found = pytree.tree_map(Tensor.detach, outputs)
            return self.criterion(outputs, data.y).detach(), self.accuracy(found, data.y)

    def gradient(self, params: Tensor, data: Data) -> LossGradient:
        """Returns losses, outputs and gradients of every task in one pass, without a graph.

        Raises:
            TypeError, ValueError: params or data of a wrong dtype, shape or device, or losses without a gradient.
        """
        data = self.prepared(data)
        if isinstance(data, RaggedData):
            parts = [loss.gradient(p, part) for loss, part, p in self._groups(data, params)]
            of_all = data.join([part.losses for part in parts]), data.join_outputs([part.outputs for part in parts])
            return LossGradient(*of_all, data.join([part.gradient for part in parts]))
        network = self._native(params, data.x)
        if network is not None:
            y = self._checked(params, data)
            return LossGradient(*network_gradient(without_others(params, self.model, self._ways), data.x, y, network))
        if self._compiled is not None:
            self.model.check(params, data.x)
            check_targets(data.y, params.device)
            return LossGradient(*self._compiled(params.detach(), data.x, data.y))
        with recording():
            leaf, data = recordable(params).detach().requires_grad_(), recordable(data)
            outputs = self.outputs(leaf, data.x)
            losses = self.criterion(outputs, data.y)
            gradient = task_gradient(losses, leaf)
        return LossGradient(losses.detach(), pytree.tree_map(Tensor.detach, outputs), gradient)

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
        data = self.prepared(data)
        network = self._native(phi, data.x)
        if network is None:
            return None
        if isinstance(data, RaggedData):
            losses, rows = [], []
            for loss, part, p, *coefficients in self._groups(data, phi, theta, lam, lr):
                rows.append(p.clone())
                settings = dict(zip(("theta", "lam", "lr"), coefficients, strict=True))
                losses.append(loss.descend_(rows[-1], data=part, steps=steps, **settings).T)  # type: ignore[union-attr]
            phi.copy_(data.join(rows))
            return data.join(losses).T.contiguous()
        y = self._checked(phi, data)
        if self._ways is None:
            return network_descend_(phi, theta, lam, lr, data.x, y, network, steps)
        absent = absent_biases(self.model, self._ways, phi.device)
        rest, *others = (v[:, absent].contiguous() if v.shape[1] > 1 else v for v in (phi, theta, lam, lr))
        center = without_others(theta, self.model, self._ways)
        result = network_descend_(
            phi.copy_(without_others(phi, self.model, self._ways)), center, lam, lr, data.x, y, network, steps
        )
        for _ in range(steps):  # what no loss depends on goes to theta
            prox_sgd_step_(rest, torch.zeros_like(rest), *others)
        phi[:, absent] = rest
        return result

    def linearize(self, params: Tensor, data: Data, kind: str = "hessian") -> CurvatureOperator:
        self.check_curvature(kind)
        data = self.prepared(data)
        task_rows(params, data, None)
        if isinstance(data, RaggedData):
            parts = [loss.linearize(p, part, kind) for loss, part, p in self._groups(data, params)]
            return RaggedCurvature(parts, data, params)
        operator = self._linearize(params, data, kind)
        if self.criterion_name is not None:
            operator.kronecker_factors = functools.partial(
                kronecker_factors, self.model, self.criterion_name, params.detach(), data, self._ways
            )
        return operator

    def _linearize(self, params: Tensor, data: Data, kind: str) -> CurvatureOperator:
        network = self._native(params, data.x)
        if network is not None and params.dim() == 2:
            y = self._checked(params, data)
            linearisation = NetworkLinearisation(without_others(params, self.model, self._ways), data.x, y, network)
            return NativeCurvature(linearisation, params, kind)
        if kind == "hessian":
            return super().linearize(params, data)
        with recording():
            data = recordable(data)
        return GaussNewtonOperator(
            lambda phi: self.outputs(phi, data.x), lambda outputs: self.criterion(outputs, data.y), params
        )

    def _groups(self, data: RaggedData, *rows: Tensor) -> Iterator[Any]:
        """For every group the loss of its ways, its data, and its part of the rows [1 or B, …]."""
        for value in rows[:1]:  # params
            if not isinstance(value, Tensor) or value.dim() != 2 or len(value) != data.shape[0]:
                found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"params must have shape [{data.shape[0]}, N] (one row per task), got {found}")
        for group, *parts in zip(data.groups, *map(data.split, rows), strict=True):
            loss = self
            if group.ways is not None:
                loss = copy.copy(self)
                loss._ways, loss._compiled = group.ways, None
            yield loss, group.data, *parts

    def _native(self, params: Tensor, x: Any) -> Network | Arranged | None:
        """The network where the native engine computes it."""
        if not (self._by_kernels and isinstance(params, Tensor) and isinstance(x, Tensor)) or x.requires_grad:
            return None
        network = self.model.network_for(x)
        if network is None or supports(params):
            return network
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
        network = self.model.network_for(data.x)
        assert network is not None
        shape = torch.Size((*data.x.shape[:2], num_outputs(network)))  # [B, S, K]
        return check_labels(shape, data.y) if self.classification else check_values(shape, params.dtype, data.y)
