"""iMAML: meta-gradients from the implicit function theorem."""

from __future__ import annotations

import torch
from torch import Tensor

from imaml_ext.inner import InnerResult, gradient_descent
from imaml_ext.inner.arguments import check_choice, check_int, check_number, task_gradient, task_losses
from imaml_ext.inner.gradient_descent import OPTIMIZERS
from imaml_ext.meta.algorithm import Episodes, MetaGradient
from imaml_ext.meta.curvature import CURVATURES, curvature_operator
from imaml_ext.meta.implicit import REACTIONS, implicit_solve
from imaml_ext.models import Data, LossFunction, TaskLoss
from imaml_ext.ops import Coefficient, as_coefficient, prox_gradient_


class IMAML:
    """Gradient descent on the proximal problem of every task, then the implicit gradient by conjugate gradients.

    For every task, φ ≈ argmin L(φ) + ½ λ ‖φ − θ‖², v = ∇Q(φ), (H + Λ + δI) u = v, and ∂F/∂θ = mean Λu. All tasks go
    through each stage together; nothing waits for the device (but `negative_curvature="raise"`, which must look).

    Args:
        loss: a `TaskLoss`, or losses [B] = loss(params [B, N], data).
        lam: λ > 0, a number, or a tensor [B], [N] or [B, N].
        inner_steps, inner_lr, inner_optimizer, inner_momentum: of `imaml_ext.inner.gradient_descent`.
        cg_steps: products with H at most. cg_rtol: stop at this relative residual.
        damping: δ ≥ 0, added to the system and not to the inner problem. It shortens u, most along directions of small
            curvature, and keeps early, indefinite Hessians from being inverted.
        curvature: "hessian", or "gauss_newton" (a `TaskLoss` only), which has no direction of negative curvature.
        negative_curvature: "keep", "gradient", "skip" or "raise"; see `imaml_ext.meta.implicit_solve`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range.

    Source: Rajeswaran, Finn, Kakade, Levine, Meta-Learning with Implicit Gradients, arXiv 1909.04630, Algorithm 2.
    """

    def __init__(
        self,
        loss: LossFunction,
        *,
        lam: Coefficient = 2.0,
        inner_steps: int = 16,
        inner_lr: Coefficient = 0.1,
        inner_optimizer: str = "sgd",
        inner_momentum: float = 0.9,
        cg_steps: int = 5,
        cg_rtol: float = 1e-5,
        damping: float = 0.0,
        curvature: str = "hessian",
        negative_curvature: str = "keep",
    ) -> None:
        if not callable(loss):
            raise TypeError(f"loss must be a TaskLoss or a function, got {type(loss).__name__}")
        if not isinstance(lam, Tensor):
            check_number("lam", lam, above=0)
        if not isinstance(inner_lr, Tensor):
            check_number("inner_lr", inner_lr, above=0)
        check_choice("curvature", curvature, CURVATURES)
        if curvature == "gauss_newton" and not isinstance(loss, TaskLoss):
            raise TypeError(f"loss must be a TaskLoss with curvature='gauss_newton', got {type(loss).__name__}")
        self.loss = loss
        self.lam = lam
        self.inner_steps = check_int("inner_steps", inner_steps, minimum=0)
        self.inner_lr = inner_lr
        self.inner_optimizer = check_choice("inner_optimizer", inner_optimizer, OPTIMIZERS)
        self.inner_momentum = check_number("inner_momentum", inner_momentum, at_least=0)
        self.cg_steps = check_int("cg_steps", cg_steps, minimum=1)
        self.cg_rtol = check_number("cg_rtol", cg_rtol, at_least=0)
        self.damping = check_number("damping", damping, at_least=0)
        self.curvature = curvature
        self.negative_curvature = check_choice("negative_curvature", negative_curvature, REACTIONS)

    def adapt(self, theta: Tensor, support: Data) -> Tensor:
        """phi [B, N]: theta [N] after the inner steps on each task's support set.

        Raises:
            TypeError, ValueError: theta or the data have a wrong dtype, shape or device.
        """
        return self._inner(_one_row(theta), support).phi

    def meta_gradient(self, theta: Tensor, episodes: Episodes) -> MetaGradient:
        """∂F/∂θ [N], the mean over the tasks that count, at theta [N].

        Metrics, means over tasks: query_loss and query_accuracy (classification) after adaptation; support_loss before
        and after (support_loss_before, support_loss); inner_gradient_norm ‖∇L + λ(φ − θ)‖; cg_residual, relative to
        ‖v‖; cg_iterations; and the fractions of tasks with negative_curvature, non_finite, and left out (skipped).

        Raises:
            TypeError, ValueError: theta or the episodes have a wrong dtype, shape or device.
            CGError: with `negative_curvature="raise"` only.
        """
        theta = _one_row(theta).detach()
        inner = self._inner(theta, episodes.support)
        phi = inner.phi  # [B, N]
        query_losses, query_accuracy, v = self._query(phi, episodes.query)  # [B], [B] or None, [B, N]

        # (H + Λ + δI) u = v, H linearised once at φ; ∂F/∂θ = mean Λu.
        operator = curvature_operator(self.curvature, self.loss, phi, episodes.support)
        solution = implicit_solve(
            operator,
            v,
            lam=self.lam,
            damping=self.damping,
            cg_steps=self.cg_steps,
            cg_rtol=self.cg_rtol,
            negative_curvature=self.negative_curvature,
        )
        lam = as_coefficient(self.lam, "lam", phi).detach()  # [1 or B, 1 or N]
        # All tasks left out: 0 / 0, a NaN that the outer loop must see.
        gradient = (lam * solution.u).sum(0) / solution.counts.sum()

        proximal = prox_gradient_(operator.gradient.clone(), phi, theta, lam)  # [B, N]
        metrics = {
            "query_loss": query_losses.mean(),
            "support_loss": operator.losses.mean(),
            "inner_gradient_norm": torch.linalg.vector_norm(proximal, dim=1).mean(),
            "cg_residual": _relative_residual(solution.cg.residual_norm, v).mean(),
            "cg_iterations": solution.cg.iterations.to(v.dtype).mean(),
            "negative_curvature": solution.negative_curvature.to(v.dtype).mean(),
            "non_finite": solution.non_finite.to(v.dtype).mean(),
            "skipped": 1 - solution.counts.to(v.dtype).mean(),
        }
        if query_accuracy is not None:
            metrics["query_accuracy"] = query_accuracy.mean()
        if self.inner_steps:
            metrics["support_loss_before"] = inner.losses[0].mean()
        return MetaGradient(gradient, metrics)

    def _inner(self, theta: Tensor, support: Data) -> InnerResult:
        return gradient_descent(
            self.loss,
            theta,
            support,
            lam=self.lam,
            steps=self.inner_steps,
            lr=self.inner_lr,
            optimizer=self.inner_optimizer,
            momentum=self.inner_momentum,
        )

    def _query(self, phi: Tensor, query: Data) -> tuple[Tensor, Tensor | None, Tensor]:
        """Query losses [B], accuracies [B] where there are such, and v = ∇Q(φ) [B, N]."""
        params = phi.detach().requires_grad_()
        accuracy = None
        with torch.enable_grad():
            if isinstance(self.loss, TaskLoss):
                outputs = self.loss.outputs(params, query.x)
                losses = self.loss.criterion(outputs, query.y)
                accuracy = self.loss.accuracy(outputs.detach(), query.y)
            else:
                losses = task_losses(self.loss, params, query)
            v = task_gradient(losses, params)
        return losses.detach(), accuracy, v


def _one_row(theta: Tensor) -> Tensor:
    if not isinstance(theta, Tensor):
        raise TypeError(f"theta must be a tensor, got {type(theta).__name__}")
    if theta.dim() != 1:
        raise ValueError(f"theta must have shape [N], got {list(theta.shape)}")
    return theta


def _relative_residual(residual_norm: Tensor, v: Tensor) -> Tensor:
    """‖v − A u‖ / ‖v‖, 0 for v = 0: [B]."""
    norm = torch.linalg.vector_norm(v, dim=1)
    return torch.where(norm == 0, 0.0, residual_norm.to(v.dtype) / norm)
