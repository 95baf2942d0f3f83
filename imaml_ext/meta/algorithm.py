"""What every meta-learning algorithm offers the outer loop, and what they share."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Annotated, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from imaml_ext import _renamed
from imaml_ext.batch import Data, Episodes
from imaml_ext.errors import ConfigError
from imaml_ext.inner import GradientDescent, InnerResult, InnerSolver
from imaml_ext.losses.loss import Loss, as_loss
from imaml_ext.meta.learnt import Learnt, Sharing, learnt
from imaml_ext.ops import Coefficient, as_coefficient, check_entries
from imaml_ext.settings import NOT_NEGATIVE, Choice

MetaParameters = Mapping[str, Tensor]  # "theta" [N], and what is learnt beside it: "log_lam" [G], "log_lr" [G]
Self = TypeVar("Self", bound="MetaAlgorithm")


@dataclass(frozen=True, eq=False)
class MetaGradient:
    """What an outer optimiser needs to know of a batch of tasks; nothing has been read back.

    Attributes:
        gradients: ∂F of every meta-parameter by name, in its shape: means over the tasks that count.
        counted: 0-d, how many tasks those are.
        metrics: 0-d tensors that describe the step.
    """

    gradients: dict[str, Tensor]
    counted: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)

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

    def bound(self: Self, loss: Any) -> Self:
        """Returns the same algorithm on this loss, a `TaskLoss` or losses [B] = loss(params [B, N], data)."""
        return replace(self, loss=loss)

    def initial(self, theta: Tensor) -> dict[str, Tensor]:
        """Returns the meta-parameters to begin with: theta [N], and what is learnt beside it as logarithms [G].

        Raises:
            ConfigError: what is to be learnt is not positive at the start, or the inner solver has no such setting.
        """
        return {"theta": theta} | {
            f"log_{name}": each.initial(self, check_theta(theta)) for name, each in self._learnt.items()
        }

    def adapt(self, params: Tensor | MetaParameters, support: Data) -> Tensor:
        """Returns phi [B, N]: theta adapted to each task's support set by the inner solver.

        Args:
            params: theta [N], or all meta-parameters, as `initial` gives them.

        Raises:
            TypeError, ValueError: the meta-parameters or the data have a wrong dtype, shape or device.
        """
        params = self._checked(params)
        return self._solve(self._problem(params), params["theta"], support).phi

    @abstractmethod
    def meta_gradient(self, params: Tensor | MetaParameters, episodes: Episodes) -> MetaGradient:
        """Returns how to improve the meta-parameters: the gradient of the mean query loss, or what stands for it.

        Args:
            params: theta [N], or all meta-parameters, as `initial` gives them.

        Raises:
            TypeError, ValueError: the meta-parameters or the episodes have a wrong dtype, shape or device.
            SolveError: of `IMAML` with `on_breakdown="raise"` only.
        """

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
        missing = [name for name in ("theta", *(f"log_{name}" for name in self.learn)) if name not in given]
        if missing:
            raise ValueError(f"params must hold all that `initial(theta)` gives, {', '.join(missing)} is missing")
        return {name: check_theta(value, name) for name, value in given.items()}

    def _problem(self, params: MetaParameters, values: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """The inner problem {"lam": …, "inner": …} with what is learnt in place; `values`: in place of their own."""
        problem: dict[str, Any] = {"lam": self.lam, "inner": self.inner}
        for name, each in self._learnt.items():
            problem = each.applied(problem, (values or {}).get(name, each.value(params[f"log_{name}"])))
        return problem

    def _solve(self, problem: Mapping[str, Any], theta: Tensor, support: Data) -> InnerResult:
        return problem["inner"].solve(self._loss, theta, support, lam=problem["lam"])

    def _result(
        self,
        params: MetaParameters,
        by_theta: Tensor,
        by_coefficient: Mapping[str, Tensor],
        counted: Tensor,
        metrics: dict[str, Tensor],
    ) -> MetaGradient:
        """The means of every task's derivative in theta and in the coefficients that are learnt, [B, N] each."""
        gradients = {"theta": task_mean(by_theta, counted)}
        for name, each in self._learnt.items():
            by_parameter = task_mean(by_coefficient[each.coefficient], counted)
            gradients[f"log_{name}"] = each.gradient(params[f"log_{name}"], by_parameter)
        return MetaGradient(gradients, counted.sum(), metrics)


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


def task_mean(rows: Tensor, counted: Tensor) -> Tensor:
    """Returns the mean over the tasks that count, [B, …] → […]; of none, 0 / 0: a NaN that the outer loop must see."""
    kept = torch.where(counted.view(-1, *(1,) * (rows.dim() - 1)), rows, 0.0)  # a NaN times 0 is a NaN
    return kept.sum(0) / counted.sum()


def finite_tasks(inner: InnerResult, *values: Tensor) -> Tensor:
    """Returns [B] bool: no NaN or infinity in a task's support losses, nor in the values [B, N]: it may count."""
    finite = inner.losses.isfinite().all(0)
    for value in values:
        finite = finite & value.isfinite().all(1)
    return finite


def query_metrics(losses: Tensor, accuracies: Tensor | None) -> dict[str, Tensor]:
    """Returns the mean query loss, and the mean accuracy where there is one."""
    metrics = {"query_loss": losses.mean()}
    return metrics if accuracies is None else metrics | {"query_accuracy": accuracies.mean()}


def query_gradient(loss: Loss, phi: Tensor, query: Data) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns v = ∇Q(φ) [B, N], and the metrics of the query set."""
    losses, outputs, v = loss.gradient(phi, query)
    return v, query_metrics(losses, loss.accuracy(outputs, query.y) if outputs is not None else None)


def count_metrics(counted: Tensor, finite: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the fractions of tasks that are not finite, and that are left out for whatever reason."""
    return {"non_finite": 1 - finite.to(dtype).mean(), "skipped": 1 - counted.to(dtype).mean()}
