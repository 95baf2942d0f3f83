"""First-order meta-gradients: what the inner problem is solved by, they do not ask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from imaml_ext.batch import Episodes
from imaml_ext.meta.algorithm import (
    MetaAlgorithm,
    MetaGradient,
    MetaParameters,
    count_metrics,
    finite_tasks,
    query_gradient,
    query_metrics,
)


@dataclass(frozen=True, kw_only=True)
class FOMAML(MetaAlgorithm):
    """First-order MAML: takes mean ∇Q(φ), as if φ moved with θ one to one. λ = 0 as published.

    A rate η that is learnt has the derivative v ⊙ (φ − θ) / η: of steps whose gradients do not depend on η.

    Source: Finn, Abbeel, Levine, Model-Agnostic Meta-Learning (2017), section 5.2; Nichol, Achiam, Schulman, On
    first-order meta-learning algorithms (2018).
    """

    no_derivative: ClassVar[dict[str, str]] = {
        "lam": "its gradient takes φ to move with θ one to one; IMAML and MAML learn λ"
    }

    def meta_gradient(self, params: Tensor | MetaParameters, episodes: Episodes) -> MetaGradient:
        """Returns mean ∇Q(φ) [N] over the tasks that count, and the derivative of what is learnt beside theta.

        Metrics, means over tasks: query_loss and query_accuracy (classification) after adaptation, what the inner
        solver tells; and the fractions of tasks that are non_finite, which do not count, and left out (skipped).
        """
        params = self._checked(params)
        problem = self._problem(params)
        inner = self._solve(problem, params["theta"], episodes.support)
        v, metrics = query_gradient(self._loss, inner.phi, episodes.query)  # [B, N]
        counted = finite_tasks(inner, v)
        metrics |= {**inner.metrics, **count_metrics(counted, counted, v.dtype)}
        by = {"lr": v * (inner.phi - params["theta"]) / problem["inner"].lr} if self.learn else {}
        return self._result(params, v, by, counted, metrics)


@dataclass(frozen=True, kw_only=True)
class Reptile(MetaAlgorithm):
    """Reptile: takes mean (θ − φ), the way back from where the tasks went. λ = 0 as published.

    With the sign of a gradient: an SGD step θ ← θ − ε · mean (θ − φ) is Reptile's θ ← θ + ε · mean (φ − θ), ε the outer
    learning rate. φ is the outcome of training on the support set; the query set is only looked at for the metrics.
    With φ the proximal minimiser, λ (θ − φ) is the gradient of the Moreau envelope of the support loss.

    Source: Nichol, Achiam, Schulman, On first-order meta-learning algorithms (2018), Algorithm 2, batched.
    """

    no_derivative: ClassVar[dict[str, str]] = dict.fromkeys(("lam", "lr"), "it has no derivative; MAML learns both")

    def meta_gradient(self, params: Tensor | MetaParameters, episodes: Episodes) -> MetaGradient:
        """Returns mean (θ − φ) [N] over the tasks that count; metrics and errors as of `FOMAML`."""
        params = self._checked(params)
        theta = params["theta"]
        inner = self._solve(self._problem(params), theta, episodes.support)
        metrics = query_metrics(*self._loss.measure(inner.phi, episodes.query))
        way_back = theta - inner.phi  # [B, N]
        counted = finite_tasks(inner, way_back)
        metrics |= {**inner.metrics, **count_metrics(counted, counted, theta.dtype)}
        return self._result(params, way_back, {}, counted, metrics)
