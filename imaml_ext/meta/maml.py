"""MAML: meta-gradients by back-propagation through the inner steps."""

from __future__ import annotations

import torch
from torch import Tensor

from imaml_ext.inner import GradientDescent, InnerResult, InnerSolver
from imaml_ext.inner.arguments import task_rows
from imaml_ext.inner.unrolled import unroll
from imaml_ext.meta.algorithm import (
    Episodes,
    InnerProblem,
    MetaGradient,
    count_metrics,
    one_row,
    query_gradient,
    sound,
    task_mean,
)
from imaml_ext.meta.regularisation import LearnableLam
from imaml_ext.models import LossFunction
from imaml_ext.ops import Coefficient


class MAML(InnerProblem):
    """The exact gradient of F(θ) = mean Q(φ_K(θ)), for φ_K the outcome of K gradient steps from θ.

    Memory grows with K: by all that the network computes in a step or, with `checkpoint`, by N numbers a task, at the
    price of one more gradient a step.

    Args:
        loss: a `TaskLoss`, or losses [B] = loss(params [B, N], data), twice differentiable.
        inner: a `GradientDescent` without a tolerance, of any optimiser; its steps are what is differentiated.
        lam: λ ≥ 0 of the inner steps: 0 is MAML as published; a number, a tensor or a `LearnableLam`.
        checkpoint: keep the iterates alone, and compute the rest anew in the backward sweep.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range.

    Source: Finn, Abbeel, Levine, Model-Agnostic Meta-Learning (2017).
    """

    def __init__(
        self,
        loss: LossFunction,
        *,
        inner: InnerSolver | None = None,
        lam: Coefficient | LearnableLam = 0.0,
        checkpoint: bool = False,
    ) -> None:
        super().__init__(loss, lam=lam, inner=inner, positive=False)
        if not isinstance(self.inner, GradientDescent):
            raise TypeError(
                f"inner must be GradientDescent for MAML, which differentiates its steps, got {type(inner).__name__}: "
                "use IMAML, FOMAML or Reptile with any other solver"
            )
        if self.inner.tolerance is not None:
            raise ValueError(f"inner.tolerance must be None for MAML, got {self.inner.tolerance}")
        self.checkpoint = bool(checkpoint)

    def meta_gradient(self, theta: Tensor, episodes: Episodes) -> MetaGradient:
        """dF/dθ [N], the mean over the tasks that count, at theta [N], and dF/dλ where it is learnt.

        Metrics, means over tasks: query_loss and query_accuracy (classification) after adaptation, support_loss_before;
        and the fractions of tasks that are non_finite, which do not count, and left out (skipped).

        Raises:
            TypeError, ValueError: theta or the episodes have a wrong dtype, shape or device.
        """
        assert isinstance(self.inner, GradientDescent)
        rows, tasks = task_rows(one_row(theta), episodes.support, None)
        start = rows.expand(tasks, -1).clone().requires_grad_()  # [B, N], a θ of its own for every task
        lam = self._coefficient(start)
        learnt = isinstance(self.lam, LearnableLam)
        if learnt:
            lam = lam.expand_as(start).clone().requires_grad_()  # [B, N]
        with torch.enable_grad():
            phi, support_losses = unroll(
                self.inner, self.loss, start, episodes.support, lam, checkpoint=self.checkpoint
            )
        v, metrics = query_gradient(self.loss, phi.detach(), episodes.query)
        by_theta, *by_lam = torch.autograd.grad(
            phi, [start, lam] if learnt else [start], v, allow_unused=True, materialize_grads=True
        )  # [B, N]
        inner = InnerResult(phi.detach(), support_losses, torch.full((tasks,), self.inner.steps, device=phi.device))
        counts = sound(inner, by_theta, *by_lam)
        metrics |= {**inner.metrics, **count_metrics(counts, counts, by_theta.dtype)}
        lam_gradient = self._lam_gradient(by_lam[0], counts) if learnt else None
        return MetaGradient(task_mean(by_theta, counts), counts.sum(), metrics, lam_gradient)
