"""MAML: meta-gradients by back-propagation through the inner steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from imaml_ext import _renamed
from imaml_ext.batch import Episodes
from imaml_ext.errors import ConfigTypeError
from imaml_ext.inner import GradientDescent, InnerResult
from imaml_ext.inner.unrolled import unroll
from imaml_ext.losses.loss import task_rows
from imaml_ext.meta.algorithm import (
    MetaAlgorithm,
    MetaGradient,
    MetaParameters,
    count_metrics,
    finite_tasks,
    lam_rows,
    query_gradient,
)


@_renamed.old_keywords(_renamed.solver_keywords)
@dataclass(frozen=True, kw_only=True)
class MAML(MetaAlgorithm):
    """Takes the exact gradient of F(θ) = mean Q(φ_K(θ)), for φ_K the outcome of K gradient steps from θ.

    Memory grows with K: by all that the network computes in a step or, with `checkpoint`, by N numbers per task, at the
    price of one more gradient per step. The loss is to be twice differentiable. `inner` is a `GradientDescent` of any
    rule, without a tolerance; λ = 0 is MAML as published.

    Source: Finn, Abbeel, Levine, Model-Agnostic Meta-Learning (2017). Learnt rates: Li et al., Meta-SGD (2017).
    """

    no_derivative: ClassVar[dict[str, str]] = {}

    # Keep the inner iterates alone and compute the rest again in the backward sweep: memory for time.
    checkpoint: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.inner, GradientDescent):
            raise ConfigTypeError(
                f"MAML.inner must be GradientDescent, whose steps are differentiated, got {type(self.inner).__name__}: "
                "use IMAML, FOMAML or Reptile with any other solver"
            )
        self.require(self.inner.tolerance is None, "inner", "without a tolerance for MAML")

    def meta_gradient(self, params: Tensor | MetaParameters, episodes: Episodes) -> MetaGradient:
        """Returns dF/dθ [N], the mean over the tasks that count, and the derivative of what is learnt beside it.

        Metrics, means over tasks: query_loss and query_accuracy (classification) after adaptation, support_loss_before;
        and the fractions of tasks that are non_finite, which do not count, and left out (skipped).
        """
        params = self._checked(params)
        rows, tasks = task_rows(params["theta"], episodes.support, None)
        start = rows.expand(tasks, -1).clone().requires_grad_()  # [B, N], a θ of its own for every task
        leaves = {
            name: each.value(params[f"log_{name}"]).expand_as(start).clone().requires_grad_()  # [B, N]
            for name, each in self._learnt.items()
        }
        problem = self._problem(params, leaves)
        lam = problem["lam"] if "lam" in leaves else lam_rows(problem, start)
        with torch.enable_grad():
            phi, support_losses = unroll(
                problem["inner"], self._loss, start, episodes.support, lam, checkpoint=self.checkpoint
            )
        v, metrics = query_gradient(self._loss, phi.detach(), episodes.query)
        by_theta, *by = torch.autograd.grad(
            phi, [start, *leaves.values()], v, allow_unused=True, materialize_grads=True
        )  # [B, N] each
        inner = InnerResult(phi.detach(), support_losses, torch.full((tasks,), self.inner.steps, device=phi.device))
        counted = finite_tasks(inner, by_theta, *by)
        metrics |= {**inner.metrics, **count_metrics(counted, counted, by_theta.dtype)}
        return self._result(params, by_theta, dict(zip(leaves, by, strict=True)), counted, metrics)
