"""What every meta-learning algorithm offers the outer loop, and what they share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from imaml_ext.batch import Episodes
from imaml_ext.checks import check_number
from imaml_ext.inner import GradientDescent, InnerResult, InnerSolver
from imaml_ext.inner.arguments import loss_and_gradient, task_losses
from imaml_ext.meta.regularisation import LearnableLam
from imaml_ext.models import Data, LossFunction, TaskLoss
from imaml_ext.ops import Coefficient, as_coefficient


@dataclass(frozen=True)
class MetaGradient:
    """What an outer optimiser needs to know of a batch of tasks; nothing has been read back.

    Attributes:
        gradient: ∂F/∂θ [N], a mean over the tasks that count.
        counted: 0-d, how many those are.
        metrics: 0-d tensors that describe the step.
        lam_gradient: ∂F/∂λ in the shape of `LearnableLam.log`; None where λ is not learnt.
    """

    gradient: Tensor
    counted: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    lam_gradient: Tensor | None = None


class MetaAlgorithm(Protocol):
    """Adapts meta-parameters to tasks, and says how to improve them."""

    def adapt(self, theta: Tensor, support: Data) -> Tensor:
        """Task parameters phi [B, N] from theta [N] and the support sets."""
        ...

    def meta_gradient(self, theta: Tensor, episodes: Episodes) -> MetaGradient:
        """How to improve theta [N]: the gradient of the mean query loss of the adapted tasks, or what stands for it."""
        ...


class InnerProblem:
    """What the algorithms share: a loss, λ, and the solver of argmin_φ L(φ) + ½ Σ_j λ_j (φ_j − θ_j)².

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range.
    """

    def __init__(
        self, loss: LossFunction, *, lam: Coefficient | LearnableLam, inner: InnerSolver | None, positive: bool
    ) -> None:
        if not callable(loss):
            raise TypeError(f"loss must be a TaskLoss or a function, got {type(loss).__name__}")
        if inner is not None and not hasattr(inner, "solve"):
            raise TypeError(f"inner must be an inner solver such as GradientDescent(), got {type(inner).__name__}")
        if not isinstance(lam, Tensor | LearnableLam):
            check_number("lam", lam, **({"above": 0} if positive else {"at_least": 0}))
        self.loss = loss
        self.lam = lam
        self.inner = GradientDescent() if inner is None else inner

    def adapt(self, theta: Tensor, support: Data) -> Tensor:
        """phi [B, N]: theta [N] adapted to each task's support set by the inner solver.

        Raises:
            TypeError, ValueError: theta or the data have a wrong dtype, shape or device.
        """
        return self._solve(one_row(theta), support).phi

    def _solve(self, theta: Tensor, support: Data) -> InnerResult:
        lam = self.lam.coefficient() if isinstance(self.lam, LearnableLam) else self.lam
        return self.inner.solve(self.loss, theta, support, lam=lam)

    def _coefficient(self, like: Tensor) -> Tensor:
        """λ as [1 or B, 1 or N] for `like` [B, N], without a graph."""
        lam = self.lam.coefficient() if isinstance(self.lam, LearnableLam) else self.lam
        return as_coefficient(lam, "lam", like).detach()

    def _lam_gradient(self, rows: Tensor, counts: Tensor) -> Tensor | None:
        """∂F/∂λ from every task's derivative in every λ_j, [B, N]; None where λ is not learnt."""
        return self.lam.gather(task_mean(rows, counts)) if isinstance(self.lam, LearnableLam) else None


def one_row(theta: Tensor) -> Tensor:
    """theta without a graph, checked to be one set of meta-parameters [N]."""
    if not isinstance(theta, Tensor):
        raise TypeError(f"theta must be a tensor, got {type(theta).__name__}")
    if theta.dim() != 1:
        raise ValueError(f"theta must have shape [N], got {list(theta.shape)}")
    return theta.detach()


def task_mean(rows: Tensor, counts: Tensor) -> Tensor:
    """Mean over the tasks that count, [B, …] -> […]; of none, 0 / 0: a NaN that the outer loop must see."""
    kept = torch.where(counts.view(-1, *(1,) * (rows.dim() - 1)), rows, 0.0)  # a NaN times 0 is a NaN
    return kept.sum(0) / counts.sum()


def sound(inner: InnerResult, *values: Tensor) -> Tensor:
    """[B] bool: no NaN or infinity in a task's support losses, nor in the values [B, N]: it may count."""
    finite = inner.losses.isfinite().all(0)
    for value in values:
        finite = finite & value.isfinite().all(1)
    return finite


def query_metrics(loss: LossFunction, phi: Tensor, query: Any) -> dict[str, Tensor]:
    """The mean query loss at phi [B, N], and the accuracy where there is one."""
    with torch.no_grad():
        if not isinstance(loss, TaskLoss):
            return {"query_loss": task_losses(loss, phi, query).mean()}
        outputs = loss.outputs(phi, query.x)
        return _metrics(loss, loss.criterion(outputs, query.y), outputs, query.y)


def query_gradient(loss: LossFunction, phi: Tensor, query: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """v = ∇Q(φ) [B, N], and the metrics of the query set."""
    if not isinstance(loss, TaskLoss):
        losses, v = loss_and_gradient(loss, phi, query)
        return v, {"query_loss": losses.mean()}
    losses, outputs, v = loss.gradient(phi, query)
    return v, _metrics(loss, losses, outputs, query.y)


def _metrics(loss: TaskLoss, losses: Tensor, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    metrics = {"query_loss": losses.mean()}
    accuracy = loss.accuracy(outputs, targets)
    if accuracy is not None:
        metrics["query_accuracy"] = accuracy.mean()
    return metrics


def count_metrics(counts: Tensor, finite: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Fractions of tasks that are not finite, and that are left out for whatever reason."""
    return {"non_finite": 1 - finite.to(dtype).mean(), "skipped": 1 - counts.to(dtype).mean()}
