"""MAML: meta-gradients by back-propagation through the inner steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.autograd.graph import get_gradient_edge

from imaml_ext import _renamed
from imaml_ext.batch import Episodes
from imaml_ext.errors import ConfigTypeError
from imaml_ext.inner import GradientDescent
from imaml_ext.inner.unrolled import unroll
from imaml_ext.losses.loss import task_rows
from imaml_ext.meta.algorithm import (
    MetaAlgorithm,
    MetaParameters,
    finite_tasks,
    lam_rows,
    left_out,
    query_gradient,
)
from imaml_ext.meta.sums import Sums, counted_sum


@_renamed.old_keywords(_renamed.solver_keywords)
@dataclass(frozen=True, kw_only=True)
class MAML(MetaAlgorithm):
    """Takes the exact gradient of F(θ) = mean Q(φ_K(θ)), for φ_K the outcome of K gradient steps from θ.

    Memory grows with K: by all that the network computes in a step or, with `checkpoint`, by N numbers per task, at the
    price of one more gradient per step. The loss is to be twice differentiable. `inner` is a `GradientDescent` of any
    rule, without a tolerance; λ = 0 is MAML as published.

    Metrics of a task: query_loss and query_accuracy (classification) after adaptation, support_loss_before; and whether
    it is non_finite, does not count (skipped).

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

    def _sums(self, params: MetaParameters, episodes: Episodes) -> Sums:
        rows, tasks = task_rows(params["theta"], episodes.support, None)
        start = rows.expand(tasks, -1).clone().requires_grad_()  # [B, N], a θ of its own for every task
        leaves = {
            name: each.value(params[f"log_{name}"]).expand_as(start).clone().requires_grad_()  # [B, N]
            for name, each in self._learnt.items()
        }
        if "shared" in params:
            leaves["shared"] = params["shared"].clone().requires_grad_()  # [N_s]
        problem = self._problem(params, leaves)
        lam = problem["lam"] if "lam" in leaves else lam_rows(problem, start)
        if not isinstance(problem["lam"], torch.Tensor) and problem["lam"] == 0:
            lam = None  # as published: there is no proximal term
        phi, support_losses = unroll(
            problem["inner"], problem["loss"], start, episodes.support, lam, checkpoint=self.checkpoint
        )
        v, by, metrics = query_gradient(problem["loss"], phi.detach(), episodes.query, self.query_sets)
        reached = get_gradient_edge(phi)
        del phi  # the graph alone is needed, and not these numbers
        by_theta, *found = torch.autograd.grad(
            reached, [start, *leaves.values()], v, allow_unused=True, materialize_grads=True
        )  # [B, N] each, and [N_s]
        by_leaf = dict(zip(leaves, found, strict=True))
        if "shared" in by:
            by["shared"] = by["shared"] + by_leaf.pop("shared")
        counted = finite_tasks(support_losses, by_theta, *by_leaf.values())
        by |= {name: counted_sum(value, counted) for name, value in {"theta": by_theta, **by_leaf}.items()}
        metrics |= {"support_loss_before": support_losses[0]} if self.inner.steps else {}
        return Sums(by, counted, {**metrics, **left_out(counted, counted)})
