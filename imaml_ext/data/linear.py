"""Synthetic linear regression: tasks whose inner solution and meta-gradient have a closed form, those of the paper's
exactness experiment.

Task b: y = x·w_b + noise, with support inputs whose second-moment matrix XᵀX/S has the condition number asked for.
With the loss L(φ) = (scale/S) Σ_s (x_s·φ − y_s)² everything is quadratic:

    H = 2·scale·XᵀX/S        φ* = (H + Λ)⁻¹ (2·scale·Xᵀy/S + Λθ)        dF/dθ = mean_b Λ (H_b + Λ)⁻¹ ∇Q_b(φ_b*)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from imaml_ext.batch import Data
from imaml_ext.checks import check_int
from imaml_ext.rng import normal, random_words

from .episodes import EpisodeBatch, TaskSampler


class LinearSampler(TaskSampler):
    """Linear regression tasks of chosen conditioning; ``sample(step)`` is a function of (seed, stream, step) alone.

    Support and query inputs have XᵀX/S = R diag(s) Rᵀ with s spaced logarithmically from 1/condition_number to 1, in as
    many distinct values as asked for, and a random rotation R for each task and side; the true weights w_b are standard
    normal around a centre common to all tasks of the seed.

    Args:
        features: inputs of a task, at least 1.
        shots, queries: points a task, each at least ``features`` (or XᵀX would be singular).
        meta_batch: tasks a step.
        condition_number: largest over smallest eigenvalue of XᵀX/S, at least 1.
        eigenvalues: distinct eigenvalues of XᵀX/S, at least 2 and at most ``features``, whose number is the default;
            conjugate gradients end after as many steps.
        noise: standard deviation of what is added to y.
        device, dtype: of the tensors returned; float64, as closed forms are compared to.

    Raises ValueError that names the argument.
    """

    def __init__(
        self,
        *,
        features: int,
        shots: int,
        queries: int,
        meta_batch: int,
        seed: int,
        condition_number: float = 10.0,
        eigenvalues: int | None = None,
        noise: float = 0.1,
        stream: str = "train",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(shots=shots, queries=queries, meta_batch=meta_batch, seed=seed, stream=stream, dtype=dtype)
        self.features = check_int("features", features, minimum=1)
        for name, points in (("shots", self.shots), ("queries", self.queries)):
            if points < self.features:
                raise ValueError(f"{name} must be at least features = {self.features}, got {points}")
        if not (np.isfinite(condition_number) and condition_number >= 1):
            raise ValueError(f"condition_number must be a finite number of at least 1, got {condition_number}")
        if self.features == 1 and condition_number != 1:
            raise ValueError(f"condition_number must be 1 where features = 1, got {condition_number}")
        if eigenvalues is not None and check_int("eigenvalues", eigenvalues, minimum=2) > self.features:
            raise ValueError(f"eigenvalues must not exceed features = {self.features}, got {eigenvalues}")
        if not (np.isfinite(noise) and noise >= 0):
            raise ValueError(f"noise must be a finite number of at least 0, got {noise}")
        self.condition_number = float(condition_number)
        self.eigenvalues = self.features if eigenvalues is None else eigenvalues
        self.noise = float(noise)
        self.device = torch.device(device) if device is not None else torch.device("cpu")

    def sample(self, step: int, *, shard: tuple[int, int] | None = None) -> EpisodeBatch:
        """Episodes with x [B, points, features] and y [B, points, 1]."""
        support_x, support_y, query_x, query_y, _ = self._arrays(step, shard)
        return EpisodeBatch(*(self._tensor(a) for a in (support_x, support_y, query_x, query_y)))

    def weights(self, step: int, *, shard: tuple[int, int] | None = None) -> Tensor:
        """The true weights w of the tasks, [B, features]."""
        return self._tensor(self._arrays(step, shard)[4])

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, self.dtype)

    def _arrays(self, step: int, shard: tuple[int, int] | None) -> tuple[np.ndarray, ...]:
        d = self.features
        # The centre is that of the seed, whatever the step and the task.
        words = random_words(
            seed=self.seed, stream=self._stream("centre"), step=0, first_task=0, num_tasks=1, words_per_task=d + d % 2
        )
        weights = normal(words)[:, :d] + self._normal("weights", step, shard, (d,))  # [B, d]
        sides = []
        for side, points in (("support", self.shots), ("query", self.queries)):
            gaussian = self._normal(f"{side}/x", step, shard, (points, d))
            turn = self._normal(f"{side}/turn", step, shard, (d, d))
            noise = self._normal(f"{side}/noise", step, shard, (points,))
            columns, _ = np.linalg.qr(gaussian)  # [B, points, d], orthonormal columns
            rotation, _ = np.linalg.qr(turn)  # [B, d, d]
            level = np.arange(d) * self.eigenvalues // d  # 0 … eigenvalues − 1
            spread = self.condition_number ** np.linspace(-0.5, 0.0, self.eigenvalues)[level]  # singular values
            x = np.sqrt(points) * (columns * spread) @ rotation.transpose(0, 2, 1)
            y = x @ weights[..., None] + self.noise * noise[..., None]
            sides += [x, y]
        return (*sides, weights)

    def _normal(self, what: str, step: int, shard: tuple[int, int] | None, shape: tuple[int, ...]) -> np.ndarray:
        """Standard normal numbers of every task of the slice, [B, …]."""
        size = int(np.prod(shape))
        words = self._words(step, shard, size + size % 2, stream=self._stream(what))
        return normal(words)[:, :size].reshape(-1, *shape)

    def _stream(self, what: str) -> str:
        return f"linear/{self.stream}/{what}"


@dataclass(frozen=True)
class LinearClosedForm:
    """Exact inner solutions and meta-gradients of a batch of linear regression tasks.

    ``scale`` fixes the loss, L(φ) = (scale/S) Σ_s (x_s·φ − y_s)²: 1 for the mean squared error, ½ for half of it.
    """

    batch: EpisodeBatch
    scale: float = 1.0

    def hessian(self, side: Data) -> Tensor:
        """H = 2·scale·XᵀX/S, [B, d, d]."""
        return 2 * self.scale * side.x.mT @ side.x / side.x.shape[1]

    def moment(self, side: Data) -> Tensor:
        """2·scale·Xᵀy/S, [B, d]: the gradient of the loss is H φ − moment."""
        return 2 * self.scale * (side.x.mT @ side.y).squeeze(-1) / side.x.shape[1]

    def solution(self, theta: Tensor, lam: float | Tensor) -> Tensor:
        """φ* [B, d] of the proximal problem. theta [d]; lam > 0: a number or [d]."""
        prox = torch.as_tensor(lam, dtype=theta.dtype, device=theta.device).expand_as(theta)
        system = self.hessian(self.batch.support) + torch.diag(prox)
        return torch.linalg.solve(system, self.moment(self.batch.support) + prox * theta)

    def meta_gradient(self, theta: Tensor, lam: float | Tensor) -> tuple[Tensor, Tensor]:
        """∂F/∂θ [d] and ∂F/∂λ [d] (one entry a parameter; their sum is the derivative by a scalar λ)."""
        prox = torch.as_tensor(lam, dtype=theta.dtype, device=theta.device).expand_as(theta)
        phi = self.solution(theta, lam)
        query = self.batch.query
        v = (self.hessian(query) @ phi.unsqueeze(-1)).squeeze(-1) - self.moment(query)  # ∇Q(φ*) [B, d]
        u = torch.linalg.solve(self.hessian(self.batch.support) + torch.diag(prox), v)
        return (prox * u).mean(0), -(u * (phi - theta)).mean(0)
