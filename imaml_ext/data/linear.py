"""Synthetic linear regression: tasks whose inner solution and meta-gradient have a closed form, those of the paper's
exactness experiment.

Task b: y = x·w_b + noise, with support inputs whose second-moment matrix XᵀX/S has the condition number asked for.
With the loss L(φ) = (scale/S) Σ_s (x_s·φ − y_s)² everything is quadratic:

    H = 2·scale·XᵀX/S        φ* = (H + Λ)⁻¹ (2·scale·Xᵀy/S + Λθ)        dF/dθ = mean_b Λ (H_b + Λ)⁻¹ ∇Q_b(φ_b*)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from imaml_ext.batch import Data, EpisodeBatch
from imaml_ext.checks import check_int, check_number
from imaml_ext.data.datasets import Dataset, RegressionDataset
from imaml_ext.data.episodes import TaskSampler
from imaml_ext.data.source import DataSource
from imaml_ext.rng import normal, random_words
from imaml_ext.settings import COUNT, NOT_NEGATIVE, Bounds


@dataclass(frozen=True, kw_only=True)
class Linear(DataSource):
    """Linear regression whose meta-gradient has a closed form."""

    kind_of_task: ClassVar[Literal["classification", "regression"]] = "regression"

    features: Annotated[int, COUNT] = 20  # Inputs of a regression task.
    condition_number: Annotated[float, Bounds(at_least=1)] = 10.0  # Condition number of the regression problems.
    noise: Annotated[float, NOT_NEGATIVE] = 0.1  # Standard deviation of the noise on the targets.

    def load(self) -> Dataset:
        matrix = f"XᵀX of condition number {self.condition_number:g}"
        description = f"linear regression on {self.features} features, {matrix}"
        return RegressionDataset("linear", description, self.features, functools.partial(LinearSampler, **vars(self)))


@dataclass(kw_only=True, eq=False, repr=False)
class LinearSampler(TaskSampler):
    """Linear regression tasks of chosen conditioning; `sample(step)` is a function of (seed, stream, step) alone.

    Support and query inputs have XᵀX/S = R diag(s) Rᵀ with s spaced logarithmically from 1/condition_number to 1, in as
    many distinct values as asked for, and a random rotation R for each task and side; the true weights w_b are standard
    normal around a centre common to all tasks of the seed.

    Shots and queries are points per task, each at least `features` (or XᵀX would be singular). The others: see
    `TaskSampler`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range.
    """

    features: int  # inputs per task, at least 1
    condition_number: float = 10.0  # largest over smallest eigenvalue of XᵀX/S, at least 1
    # Distinct eigenvalues of XᵀX/S, 2 to `features` (the default); conjugate gradients end after as many steps.
    eigenvalues: int | None = None
    noise: float = 0.1  # standard deviation of what is added to y
    dtype: torch.dtype = torch.float64  # for comparisons with closed forms

    def __post_init__(self) -> None:
        super().__post_init__()
        self.features = check_int("features", self.features, minimum=1)
        for name in ("shots", "queries"):
            if getattr(self, name) < self.features:
                raise ValueError(f"{name} must be at least features = {self.features}, got {getattr(self, name)}")
        self.condition_number = check_number("condition_number", self.condition_number, at_least=1)
        self.noise = check_number("noise", self.noise, at_least=0)
        if self.features == 1 and self.condition_number != 1:
            raise ValueError(f"condition_number must be 1 where features = 1, got {self.condition_number}")
        if self.eigenvalues is not None and check_int("eigenvalues", self.eigenvalues, minimum=2) > self.features:
            raise ValueError(f"eigenvalues must not exceed features = {self.features}, got {self.eigenvalues}")

    def sample(self, step: int, *, shard: tuple[int, int] | None = None) -> EpisodeBatch:
        """Makes episodes with x [B, points, features] and y [B, points, 1]."""
        weights = self._weights(step, shard)
        support = self._side("support", self.shots, weights, step, shard)
        query = self._side("query", self.queries, weights, step, shard)
        return EpisodeBatch(*map(self._tensor, (*support, *query)))

    def weights(self, step: int, *, shard: tuple[int, int] | None = None) -> Tensor:
        """Returns the true weights w of the tasks, [B, features]."""
        return self._tensor(self._weights(step, shard))

    def _weights(self, step: int, shard: tuple[int, int] | None) -> np.ndarray:
        d, stream = self.features, f"linear/{self.stream}/centre"
        # The centre is that of the seed, whatever the step and the task.
        words = d + d % 2
        centre = random_words(seed=self.seed, stream=stream, step=0, first_task=0, num_tasks=1, words_per_task=words)
        return normal(centre)[:, :d] + self._normal("weights", step, shard, (d,))  # [B, d]

    def _side(
        self, side: str, points: int, weights: np.ndarray, step: int, shard: tuple[int, int] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Makes x [B, points, d] and y [B, points, 1]."""
        d, distinct = self.features, self.eigenvalues or self.features
        columns, _ = np.linalg.qr(self._normal(f"{side}/x", step, shard, (points, d)))  # [B, points, d], orthonormal
        rotation, _ = np.linalg.qr(self._normal(f"{side}/turn", step, shard, (d, d)))  # [B, d, d]
        noise = self._normal(f"{side}/noise", step, shard, (points,))
        level = np.arange(d) * distinct // d  # 0 … distinct − 1
        spread = self.condition_number ** np.linspace(-0.5, 0.0, distinct)[level]  # singular values
        x = np.sqrt(points) * (columns * spread) @ rotation.transpose(0, 2, 1)
        return x, x @ weights[..., None] + self.noise * noise[..., None]

    def _normal(self, what: str, step: int, shard: tuple[int, int] | None, shape: tuple[int, ...]) -> np.ndarray:
        """Draws standard normal numbers for every task of the slice, [B, …]."""
        size = int(np.prod(shape))
        words = self._words(step, shard, size + size % 2, stream=f"linear/{self.stream}/{what}")
        return normal(words)[:, :size].reshape(-1, *shape)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, self.dtype)


@dataclass(frozen=True)
class LinearClosedForm:
    """Exact inner solutions and meta-gradients of a batch of linear regression tasks.

    `scale` fixes the loss, L(φ) = (scale/S) Σ_s (x_s·φ − y_s)²: 1 for the mean squared error, ½ for half of it.
    """

    batch: EpisodeBatch
    scale: float = 1.0

    def hessian(self, side: Data) -> Tensor:
        """Returns H = 2·scale·XᵀX/S, [B, d, d]."""
        return 2 * self.scale * side.x.mT @ side.x / side.x.shape[1]

    def moment(self, side: Data) -> Tensor:
        """Returns 2·scale·Xᵀy/S, [B, d]: the gradient of the loss is H φ − moment."""
        return 2 * self.scale * (side.x.mT @ side.y).squeeze(-1) / side.x.shape[1]

    def solution(self, theta: Tensor, lam: float | Tensor) -> Tensor:
        """Returns φ* [B, d] of the proximal problem. theta [d]; lam > 0: a number or [d]."""
        prox = torch.as_tensor(lam, dtype=theta.dtype, device=theta.device).expand_as(theta)
        system = self.hessian(self.batch.support) + torch.diag(prox)
        return torch.linalg.solve(system, self.moment(self.batch.support) + prox * theta)

    def meta_gradient(self, theta: Tensor, lam: float | Tensor) -> tuple[Tensor, Tensor]:
        """Returns ∂F/∂θ [d] and ∂F/∂λ [d] (one entry per parameter; their sum is the derivative by a scalar λ)."""
        prox = torch.as_tensor(lam, dtype=theta.dtype, device=theta.device).expand_as(theta)
        phi = self.solution(theta, lam)
        query = self.batch.query
        v = (self.hessian(query) @ phi.unsqueeze(-1)).squeeze(-1) - self.moment(query)  # ∇Q(φ*) [B, d]
        u = torch.linalg.solve(self.hessian(self.batch.support) + torch.diag(prox), v)
        return (prox * u).mean(0), -(u * (phi - theta)).mean(0)
