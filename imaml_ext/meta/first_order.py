"""First-order meta-gradients: what the inner problem is solved by, they do not ask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from imaml_ext.batch import Data, Episodes
from imaml_ext.inner.solver import InnerResult, Moments
from imaml_ext.meta.algorithm import (
    MetaAlgorithm,
    MetaParameters,
    finite_tasks,
    left_out,
    query_gradient,
    query_measure,
)
from imaml_ext.meta.sums import Sums, counted_sum


@dataclass(frozen=True, kw_only=True)
class FOMAML(MetaAlgorithm):
    """First-order MAML: takes mean ∇Q(φ), as if φ moved with θ one to one. λ = 0 as published.

    A rate η that is learnt has the derivative v ⊙ (φ − θ) / η: of steps whose gradients do not depend on η. Parameters
    s that tasks share have the derivative ∂Q(φ, s)/∂s, as if φ did not move with s.

    Metrics of a task: query_loss and query_accuracy (classification) after adaptation, what the inner solver tells; and
    whether it is non_finite, does not count (skipped).

    Source: Finn, Abbeel, Levine, Model-Agnostic Meta-Learning (2017), section 5.2; Nichol, Achiam, Schulman, On
    first-order meta-learning algorithms (2018).
    """

    no_derivative: ClassVar[dict[str, str]] = {
        "lam": "its gradient takes φ to move with θ one to one; IMAML and MAML learn λ"
    }

    def _sums(self, params: MetaParameters, episodes: Episodes) -> Sums:
        problem = self._problem(params)
        inner = self._solve(problem, params["theta"], episodes.support)
        v, by, metrics = query_gradient(problem["loss"], inner.phi, episodes.query, self.query_sets)  # [B, N]
        counted = finite_tasks(inner.losses, v)
        by["theta"] = counted_sum(v, counted)
        if self.learn:
            by["lr"] = counted_sum(v * (inner.phi - params["theta"]) / problem["inner"].lr, counted)
        return Sums(by, counted, {**metrics, **inner.metrics, **left_out(counted, counted)})


@dataclass(frozen=True, kw_only=True)
class Reptile(MetaAlgorithm):
    """Reptile: takes mean (θ − φ), the way back from where the tasks went. λ = 0 as published.

    With the sign of a gradient: an SGD step θ ← θ − ε · mean (θ − φ) is Reptile's θ ← θ + ε · mean (φ − θ), ε the outer
    learning rate. φ is the outcome of training on the support set; the query set is only looked at for the metrics.
    With φ the proximal minimiser, λ (θ − φ) is the gradient of the Moreau envelope of the support loss. Metrics as of
    `FOMAML`.

    With `keep_moments` the inner rule's moments go on from task to task, as one optimiser would have them. They are
    meta-parameters beside theta: "moment_1", … [N], and "moment_steps" [1], how many inner steps they come from. Every
    task of a meta-step begins with those of the meta-steps before. Their next values are the means over the tasks that
    count. With one task per meta-step that is the published order of steps exactly. Tests begin with them too, and
    change nothing in them. A GPU is waited for once per meta-step, for the number of steps.

    Source: Nichol, Achiam, Schulman, On first-order meta-learning algorithms (2018), Algorithm 2, batched; its
    published code for the moments.
    """

    no_derivative: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("lam", "lr"), "it has no derivative; MAML learns both"),
        "shared": "it moves theta towards what each task adapts, and these stay; IMAML, MAML and FOMAML learn them",
    }

    # Keep the inner rule's moments (momentum, adam) from task to task, and into the test.
    keep_moments: bool = False

    @classmethod
    def upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        return super().upgraded({"keep_moments": False, **values})

    def __post_init__(self) -> None:
        super().__post_init__()
        expected = "false for inner steps without moments: GradientDescent's rules momentum and adam have them"
        self.require(not self.keep_moments or self.inner.moments > 0, "keep_moments", expected)

    @property
    def carried(self) -> tuple[str, ...]:
        names = [f"moment_{number}" for number in range(1, self.inner.moments + 1)]
        return (*names, "moment_steps") if self.keep_moments else ()

    def initial(self, theta: Tensor) -> dict[str, Tensor]:
        params = super().initial(theta)
        sizes = {name: len(theta) for name in self.carried} | {"moment_steps": 1}
        return params | {name: torch.zeros_like(theta[:1]).repeat(sizes[name]) for name in self.carried}

    def _problem(self, params: MetaParameters, values: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        problem = super()._problem(params, values)
        if not self.keep_moments:
            return problem
        *names, steps = self.carried
        # Of a run that has become non-finite the number is a NaN too; the outer loop is who says so.
        moments = Moments(tuple(params[name] for name in names), round(float(params[steps].nan_to_num())))
        return problem | {"moments": moments}

    def _solve(self, problem: Mapping[str, Any], theta: Tensor, support: Data) -> InnerResult:
        given = {name: problem[name] for name in ("lam", "moments") if name in problem}
        return problem["inner"].solve(problem["loss"], theta, support, **given)

    def _sums(self, params: MetaParameters, episodes: Episodes) -> Sums:
        problem, theta = self._problem(params), params["theta"]
        inner = self._solve(problem, theta, episodes.support)
        metrics = query_measure(problem["loss"], inner.phi, episodes.query, self.query_sets)
        way_back = theta - inner.phi  # [B, N]
        ended = inner.moments or Moments((), 0)
        counted = finite_tasks(inner.losses, way_back, *ended.vectors)
        steps = torch.full_like(way_back[:, :1], ended.steps)
        found = {"theta": way_back, **dict(zip(self.carried, (*ended.vectors, steps), strict=False))}
        by = {name: counted_sum(rows, counted) for name, rows in found.items()}
        return Sums(by, counted, {**metrics, **inner.metrics, **left_out(counted, counted)})
