"""What every meta-learning algorithm offers the outer loop, and what they share."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Annotated, Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from imaml_ext import _renamed
from imaml_ext.batch import Data, Episodes, Sides, TaskData, as_episodes, ragged
from imaml_ext.errors import ConfigError
from imaml_ext.inner import GradientDescent, InnerResult, InnerSolver
from imaml_ext.losses.loss import Loss, as_loss, task_rows
from imaml_ext.losses.shared import gradient_with_shared
from imaml_ext.meta.learnt import Learnt, Sharing, learnt
from imaml_ext.meta.sums import Rows, Sums, coefficients, means, settings_of, tasks_of
from imaml_ext.ops import Coefficient, as_coefficient, check_entries
from imaml_ext.ops.recording import recordable, recording
from imaml_ext.settings import COUNT, NOT_NEGATIVE, Choice

# "theta" [N], and what is learnt beside it: "log_lam" [G], "log_lr" [G], "shared" [N_s] where tasks share parameters.
MetaParameters = Mapping[str, Tensor]
Self = TypeVar("Self", bound="MetaAlgorithm")


@dataclass(frozen=True, eq=False)
class MetaGradient:
    """What an outer optimiser needs to know of a batch of tasks; nothing has been read back.

    Attributes:
        gradients: ∂F of every meta-parameter by name, in its shape: means over the tasks that count.
        counted: 0-d, how many tasks those are.
        metrics: 0-d tensors that describe the step: means over the tasks that count, and of truth values, such as
            "skipped", the part of all tasks.
        per_task: {name: [B]}, what the metrics are made of.
        carried: next values of the meta-parameters that no gradient moves, by name: means over the tasks that count.
    """

    gradients: dict[str, Tensor]
    counted: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    per_task: dict[str, Tensor] = field(default_factory=dict)
    carried: dict[str, Tensor] = field(default_factory=dict)

    @property
    def gradient(self) -> Tensor:
        """∂F/∂θ [N]."""
        return self.gradients["theta"]

    @property
    def lam_gradient(self) -> Tensor | None:
        """∂F/∂ log λ where λ is learnt, under its old name."""
        _renamed.warn("MetaGradient.lam_gradient", 'gradients["log_lam"]')
        return self.gradients.get("log_lam")


@dataclass(frozen=True)
class MetaAlgorithm(Choice):
    """An algorithm's settings, and the algorithm: adapts meta-parameters to tasks, and says how to improve them.

    A new one is a file, and an entry of `kinds`. Without a loss it is a setting only; `bound` gives it one.

    Attributes:
        no_derivative: {coefficient: why} of the inner problem's coefficients that it cannot learn.
        carried: names of the meta-parameters that no gradient moves: each meta-step has their next values.

    Raises:
        ConfigTypeError, ConfigError: a setting of the wrong type or outside its range; a TypeError and a ValueError.
        TypeError: the loss is neither a `Loss` nor a function.
    """

    kinds: ClassVar[dict[str, str]] = {
        "imaml": "imaml_ext.meta.imaml.IMAML",
        "maml": "imaml_ext.meta.maml.MAML",
        "fomaml": "imaml_ext.meta.first_order.FOMAML",
        "reptile": "imaml_ext.meta.first_order.Reptile",
    }
    no_derivative: ClassVar[dict[str, str]] = {}

    loss: Any = field(default=None, metadata={"recorded": False})

    _: KW_ONLY

    _given: dict[str, Any] = field(default_factory=dict, repr=False, metadata={"recorded": False})

    # Regularisation lambda: how strongly a task's parameters are held at theta; 0 holds them not at all.
    lam: Annotated[Coefficient, NOT_NEGATIVE] = 0.0
    inner: InnerSolver = field(default_factory=GradientDescent)  # Solver of the inner problem.
    # Learnt beside theta: `lam` or `lr` (inner rates), each `global`, per `tensor` or per `parameter`.
    learn: dict[str, Sharing] = field(default_factory=dict)
    # Tasks that go through all stages together, for a memory that does not grow with their number; unset: all, and of
    # a large nn.Module on the CPU as many as are fastest.
    tasks_per_chunk: Annotated[int | None, COUNT] = None
    # Sets that the query examples of a training task come in, in turn; each is judged by itself, as batch norm notices.
    query_sets: Annotated[int, COUNT] = 1

    @classmethod
    def upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {"tasks_per_chunk": None, "query_sets": 1, **values}

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.lam, Tensor):
            check_entries(self.lam, "lam", at_least=0)
        for name in self.learn:
            if name not in Learnt.kinds:
                raise ConfigError(f"learn must name some of {', '.join(Learnt.kinds)}, got {name!r}")
            if name in self.no_derivative:
                raise ConfigError(f"{type(self).__name__} cannot learn {name}: {self.no_derivative[name]}")
        if self.loss is not None:
            object.__setattr__(self, "loss", as_loss(self.loss))
            if self.loss.shared is not None and "shared" in self.no_derivative:
                raise ConfigError(
                    f"{type(self).__name__} cannot learn parameters that tasks share: {self.no_derivative['shared']}"
                )

    @property
    def carried(self) -> tuple[str, ...]:
        return ()

    def bound(self: Self, loss: Any) -> Self:
        """Returns the same algorithm on this loss, a `TaskLoss` or losses [B] = loss(params [B, N], data)."""
        return replace(self, loss=loss)

    def initial(self, theta: Tensor) -> dict[str, Tensor]:
        """Returns the meta-parameters to begin with: theta [N], and what is learnt beside it as logarithms [G].

        With a loss whose tasks share parameters, also their values, "shared" [N_s].

        Raises:
            ConfigError: what is to be learnt is not positive at the start, or the inner solver has no such setting.
        """
        params = {"theta": theta} | {
            f"log_{name}": each.initial(self, check_theta(theta)) for name, each in self._learnt.items()
        }
        shared = self._loss.shared
        return params if shared is None else params | {"shared": shared.detach().to(theta, copy=True)}

    def adapt(self, params: Tensor | MetaParameters, support: Data) -> Tensor:
        """Returns phi [B, N]: theta adapted to each task's support set by the inner solver.

        Args:
            params: theta [N], or all meta-parameters, as `initial` gives them.

        Raises:
            TypeError, ValueError: the meta-parameters or the data have a wrong dtype, shape or device.
        """
        phi = None
        with recording():
            params, support = self._checked(params), recordable(support)
            theta = params["theta"]
            tasks = task_rows(theta, support, None)[1]
            for algorithm, part, rows in self._chunks(theta, support, tasks, support):
                found = algorithm._solve(algorithm._problem(params), theta, part).phi
                if len(found) == tasks:
                    return found
                phi = theta.new_empty(tasks, len(theta)) if phi is None else phi
                phi[rows] = found
        assert phi is not None
        return phi

    def meta_gradient(self, params: Tensor | MetaParameters, episodes: Episodes) -> MetaGradient:
        """Returns how to improve the meta-parameters: the gradient of the mean query loss, or what stands for it.

        The algorithm's class says what its metrics are.

        Args:
            params: theta [N], or all meta-parameters, as `initial` gives them.

        Raises:
            TypeError, ValueError: the meta-parameters or the episodes have a wrong dtype, shape or device.
            SolveError: of `IMAML` with `on_breakdown="raise"` only.
        """
        by: dict[str, Tensor] = {}
        counted, metrics = [], []
        with recording():
            params, episodes = self._checked(params), as_episodes(episodes)
            sides = recordable(Sides(episodes.support, episodes.query))
            tasks = task_rows(params["theta"], sides.support, None)[1]
            for algorithm, part, _ in self._chunks(params["theta"], sides, tasks, *sides):
                sums = algorithm._sums_that_count(params, part)
                by = {name: by[name] + value if name in by else value for name, value in sums.by.items()}
                counted.append(sums.counted)
                metrics.append(sums.metrics)
            per_task = {name: torch.cat([each[name] for each in metrics]) for name in metrics[0]}
            return self._result(params, Sums(by, torch.cat(counted), per_task))

    def learnt_metrics(self, params: MetaParameters) -> dict[str, Tensor]:
        """Returns the value of everything learnt beside theta, or its mean and range, 0-d."""
        metrics = {}
        for name in self.learn:
            values = params[f"log_{name}"].detach().exp()
            metrics[name] = values[0] if len(values) == 1 else values.mean()
            if len(values) > 1:
                metrics |= {f"{name}_min": values.min(), f"{name}_max": values.max()}
        return metrics

    # --- for the algorithms -----------------------------------------------------------------------------------------

    @abstractmethod
    def _sums(self, params: MetaParameters, episodes: Episodes) -> Sums:
        """What `meta_gradient` is made of, for tasks that go through every stage together."""

    @functools.cached_property
    def _coefficients(self) -> list[tuple[str, Tensor]]:
        return list(coefficients(self))

    @functools.cached_property
    def _learnt(self) -> dict[str, Learnt]:
        return {name: learnt(name, sharing, self._loss) for name, sharing in self.learn.items()}

    @property
    def _loss(self) -> Loss:
        if self.loss is None:
            raise ConfigError(f"{type(self).__name__}.loss must be given: bind the settings to one by `bound(loss)`")
        return self.loss

    def _checked(self, params: Tensor | MetaParameters) -> dict[str, Tensor]:
        """The meta-parameters without a graph."""
        given = {"theta": params, **self._given} if not isinstance(params, Mapping) else dict(params)
        wanted = ["theta", *(f"log_{name}" for name in self.learn)] + ["shared"] * (self._loss.shared is not None)
        wanted += self.carried
        missing = [name for name in wanted if name not in given]
        if missing:
            raise ValueError(f"params must hold all that `initial(theta)` gives, {', '.join(missing)} is missing")
        for name, value in self._coefficients:
            if value.requires_grad:
                coefficient = name.rpartition(".")[2]
                how = f", and learn={{{coefficient!r}: 'global'}} to learn it" if coefficient in Learnt.kinds else ""
                raise ConfigError(
                    f"{type(self).__name__}.{name} must not require a gradient, as no setting gets one: "
                    f"give it detached{how}"
                )
        return {name: check_theta(recordable(value), name) for name, value in given.items()}

    def _chunks(self: Self, theta: Tensor, batch: Any, tasks: int, *sides: Any) -> Iterator[tuple[Self, Any, Rows]]:
        """Parts of a batch of tasks, with the algorithm for them, and which rows they are; `sides`: its data."""
        size = self.tasks_per_chunk
        if size is None:
            each = theta.expand(tasks, -1)
            advised = [self._loss.tasks_at_once(each, side) for side in sides] if tasks > 1 else []
            size = min([tasks, *(number for number in advised if number is not None)])
        if size >= tasks:
            yield self, batch, slice(0, tasks)
            return
        for first in range(0, tasks, size):
            rows = slice(first, min(first + size, tasks))
            yield self._for(rows, theta, tasks), tasks_of(batch, rows, tasks), rows

    def _for(self: Self, rows: Rows, theta: Tensor, tasks: int) -> Self:
        """The algorithm for some of the tasks."""
        return settings_of(self, rows, theta.expand(tasks, -1))

    def _sums_that_count(self, params: MetaParameters, episodes: Sides) -> Sums:
        """`_sums` of the tasks as the loss takes them best; in shared parameters, too, of the tasks that count alone.

        The latter come out of one backward pass for all tasks. Where there are such, the device is waited for, and the
        tasks that count go through every stage again without those that do not.
        """
        sums = self._sums(params, Sides(*(self._loss.prepared(side) for side in episodes)))
        if "shared" not in sums.by or bool(sums.counted.all()):
            return sums
        tasks, kept = len(sums.counted), sums.counted.nonzero().flatten()
        if len(kept) == 0:
            return replace(sums, by={name: torch.zeros_like(value) for name, value in sums.by.items()})
        algorithm = self._for(kept, params["theta"], tasks)
        again = algorithm._sums_that_count(params, tasks_of(episodes, kept, tasks))
        return replace(sums, by=again.by, counted=torch.zeros_like(sums.counted).index_put((kept,), again.counted))

    def _problem(self, params: MetaParameters, values: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """The inner problem {"loss": …, "lam": …, "inner": …} with what is learnt in place; `values`: in place of their
        own, among them "shared"."""
        values = values or {}
        shared = values.get("shared", params.get("shared"))
        loss = self._loss if shared is None else self._loss.sharing(shared)
        problem: dict[str, Any] = {"loss": loss, "lam": self.lam, "inner": self.inner}
        for name, each in self._learnt.items():
            problem = each.applied(problem, values.get(name, each.value(params[f"log_{name}"])))
        return problem

    def _solve(self, problem: Mapping[str, Any], theta: Tensor, support: Data) -> InnerResult:
        return problem["inner"].solve(problem["loss"], theta, support, lam=problem["lam"])

    def _result(self, params: MetaParameters, sums: Sums) -> MetaGradient:
        """The means; of no task that counts, 0 / 0: a NaN that the outer loop must see."""
        number = sums.counted.sum()
        gradients = {name: by / number for name, by in sums.by.items() if name in ("theta", "shared")}
        for name, each in self._learnt.items():
            by_parameter = sums.by[each.coefficient] / number
            gradients[f"log_{name}"] = each.gradient(params[f"log_{name}"], by_parameter)
        metrics = means(sums.metrics, sums.counted, params["theta"].dtype)
        carried = {name: sums.by[name] / number for name in self.carried}
        return MetaGradient(gradients, number, metrics, sums.metrics, carried)


def check_theta(theta: Tensor, name: str = "theta") -> Tensor:
    """Returns theta without a graph, checked to be one set of meta-parameters [N]."""
    if not isinstance(theta, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(theta).__name__}")
    if theta.dim() != 1:
        raise ValueError(f"{name} must have shape [N], got {list(theta.shape)}")
    return theta.detach()


def lam_rows(problem: Mapping[str, Any], like: Tensor) -> Tensor:
    """Returns λ as [1 or B, 1 or N] for `like` [B, N], without a graph."""
    return as_coefficient(problem["lam"], "lam", like).detach()


def finite_tasks(losses: Tensor, *values: Tensor) -> Tensor:
    """Returns [B] bool: no NaN or infinity in a task's support losses [steps, B], nor in the values [B, N]."""
    finite = losses.isfinite().all(0)
    for value in values:
        finite = finite & value.isfinite().all(1)
    return finite


def query_metrics(losses: Tensor, accuracies: Tensor | None) -> dict[str, Tensor]:
    """Returns the query losses [B], and the accuracies [B] where there are such."""
    metrics = {"query_loss": losses}
    return metrics if accuracies is None else metrics | {"query_accuracy": accuracies}


def query_measure(loss: Loss, phi: Tensor, query: Data, sets: int = 1) -> dict[str, Tensor]:
    """Returns the metrics of the query set at phi [B, N]; of several sets, the means of theirs."""
    if sets == 1:
        return query_metrics(*loss.measure(phi, query))
    found = query_metrics(*loss.measure(phi.repeat_interleave(sets, 0), in_sets(query, sets)))
    return {name: value.unflatten(0, (-1, sets)).mean(1) for name, value in found.items()}


def query_gradient(
    loss: Loss, phi: Tensor, query: Data, sets: int = 1
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Returns v = ∇Q(φ) [B, N], {"shared": Σ_b ∂Q_b/∂s [N_s]} where tasks share s, and the metrics of the query set.

    With several sets, Q is the mean of their losses: set k of n holds the query examples k, k + n, k + 2n, … of a task.
    """
    if sets > 1:
        v, by, metrics = query_gradient(loss, phi.repeat_interleave(sets, 0), in_sets(query, sets))
        means = {name: value.unflatten(0, (-1, sets)).mean(1) for name, value in metrics.items()}
        return v.unflatten(0, (-1, sets)).mean(1), {name: value / sets for name, value in by.items()}, means
    if loss.shared is None:
        losses, outputs, v = loss.gradient(phi, query)
        accuracies = None if outputs is None else loss.accuracy(outputs, query.y, **ragged(query))
        return v, {}, query_metrics(losses, accuracies)
    losses, v, by_shared = gradient_with_shared(loss, phi, query)
    return v, {"shared": by_shared}, query_metrics(*loss.measure(phi, query))


def in_sets(query: Data, sets: int) -> TaskData:
    """Returns the query sets of B tasks as those of B · sets tasks, a task's one after another."""
    if ragged(query):
        raise ValueError(f"query_sets must be 1 for tasks with a mask or ways, got {sets}")

    def rows(leaf: Tensor) -> Tensor:
        if leaf.dim() < 2 or leaf.shape[1] % sets:
            expected = f"a divisor of the query examples of a task, {list(leaf.shape)} as [tasks, examples, …]"
            raise ValueError(f"query_sets must be {expected}, got {sets}")
        return leaf.unflatten(1, (-1, sets)).transpose(1, 2).flatten(0, 1)

    return TaskData(tree_map(rows, query.x), tree_map(rows, query.y))


def left_out(counted: Tensor, finite: Tensor) -> dict[str, Tensor]:
    """Returns which tasks are not finite, and which are left out for whatever reason, [B] bool each."""
    return {"non_finite": ~finite, "skipped": ~counted}
