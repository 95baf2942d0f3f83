"""First-order meta-gradients: what the inner problem is solved by, they do not ask."""

from __future__ import annotations

from torch import Tensor

from imaml_ext.inner import InnerSolver
from imaml_ext.meta.algorithm import (
    Episodes,
    InnerProblem,
    MetaGradient,
    count_metrics,
    one_row,
    query_gradient,
    query_metrics,
    sound,
    task_mean,
)
from imaml_ext.models import LossFunction
from imaml_ext.ops import Coefficient


class FOMAML(InnerProblem):
    """First-order MAML: mean ∇Q(φ), as if φ moved with θ one to one.

    Args:
        loss: a `TaskLoss`, or losses [B] = loss(params [B, N], data).
        inner: any inner solver; `GradientDescent()` unless given.
        lam: λ ≥ 0 of the inner problem: 0 as published; a number or a tensor.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range.

    Source: Finn, Abbeel, Levine, Model-Agnostic Meta-Learning (2017), section 5.2; Nichol, Achiam, Schulman, On
    first-order meta-learning algorithms (2018).
    """

    def __init__(self, loss: LossFunction, *, inner: InnerSolver | None = None, lam: Coefficient = 0.0) -> None:
        super().__init__(loss, lam=_fixed(lam), inner=inner, positive=False)

    def meta_gradient(self, theta: Tensor, episodes: Episodes) -> MetaGradient:
        """mean ∇Q(φ) [N] over the tasks that count, at theta [N].

        Metrics, means over tasks: query_loss and query_accuracy (classification) after adaptation, what the inner
        solver tells; and the fractions of tasks that are non_finite, which do not count, and left out (skipped).

        Raises:
            TypeError, ValueError: theta or the episodes have a wrong dtype, shape or device.
        """
        inner = self._solve(one_row(theta), episodes.support)
        v, metrics = query_gradient(self.loss, inner.phi, episodes.query)  # [B, N]
        counts = sound(inner, v)
        metrics |= {**inner.metrics, **count_metrics(counts, counts, v.dtype)}
        return MetaGradient(task_mean(v, counts), counts.sum(), metrics)


class Reptile(InnerProblem):
    """Reptile: mean (θ − φ), the way back from where the tasks went.

    With the sign of a gradient: an SGD step θ ← θ − ε · mean (θ − φ) is Reptile's θ ← θ + ε · mean (φ − θ), ε the outer
    learning rate. φ is the outcome of training on the support set; the query set is only looked at for the metrics.
    With φ the proximal minimiser, λ (θ − φ) is the gradient of the Moreau envelope of the support loss.

    Args:
        loss, inner, lam: as of `FOMAML`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range.

    Source: Nichol, Achiam, Schulman, On first-order meta-learning algorithms (2018), Algorithm 2, batched.
    """

    def __init__(self, loss: LossFunction, *, inner: InnerSolver | None = None, lam: Coefficient = 0.0) -> None:
        super().__init__(loss, lam=_fixed(lam), inner=inner, positive=False)

    def meta_gradient(self, theta: Tensor, episodes: Episodes) -> MetaGradient:
        """mean (θ − φ) [N] over the tasks that count, at theta [N]; metrics as of `FOMAML`.

        Raises:
            TypeError, ValueError: theta or the episodes have a wrong dtype, shape or device.
        """
        theta = one_row(theta)
        inner = self._solve(theta, episodes.support)
        metrics = query_metrics(self.loss, inner.phi, episodes.query)
        way_back = theta - inner.phi  # [B, N]
        counts = sound(inner, way_back)
        metrics |= {**inner.metrics, **count_metrics(counts, counts, theta.dtype)}
        return MetaGradient(task_mean(way_back, counts), counts.sum(), metrics)


def _fixed(lam: Coefficient) -> Coefficient:
    """λ, checked not to be one that is learnt."""
    if not isinstance(lam, int | float | Tensor):
        raise TypeError(
            f"lam must be a number or a tensor for a first-order algorithm, which has no gradient in it, "
            f"got {type(lam).__name__}: use IMAML or MAML to learn it"
        )
    return lam
