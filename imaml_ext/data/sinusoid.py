"""Sinusoid regression: the smallest meta-learning problem (Finn et al., *Model-Agnostic Meta-Learning*, ICML 2017,
5.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from imaml_ext.batch import EpisodeBatch
from imaml_ext.data.datasets import Dataset, RegressionDataset
from imaml_ext.data.episodes import TaskSampler
from imaml_ext.data.source import DataSource
from imaml_ext.rng import uniform


@dataclass(frozen=True, kw_only=True)
class Sinusoid(DataSource):
    """Sinusoid regression."""

    kind_of_task: ClassVar[Literal["classification", "regression"]] = "regression"

    def load(self) -> Dataset:
        description = "regression of A·sin(x − p), A in [0.1, 5], p in [0, π], x in [−5, 5] (Finn et al. 2017)"
        return RegressionDataset("sinusoid", description, 1, SinusoidSampler)


class SinusoidSampler(TaskSampler):
    """Tasks y = A sin(x − p) with amplitude A ~ U[0.1, 5], phase p ~ U[0, π] (radians) and inputs x ~ U[−5, 5].

    `sample(step)` is a function of (seed, stream, step) alone. Support and query inputs are independent draws; shots
    and queries are points per task. Arguments and errors: see `TaskSampler`.
    """

    AMPLITUDE = (0.1, 5.0)
    PHASE = (0.0, np.pi)
    INPUT = (-5.0, 5.0)

    def _uniform(self, step: int, shard: tuple[int, int] | None) -> np.ndarray:
        each = 2 + self.shots + self.queries
        return uniform(self._words(step, shard, each, stream=f"sinusoid/{self.stream}"))

    def parameters(self, step: int, *, shard: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns amplitude [B] and phase [B] (radians) of the tasks of a meta-step, float64."""
        u = self._uniform(step, shard)
        return _scale(u[:, 0], self.AMPLITUDE), _scale(u[:, 1], self.PHASE)

    def sample(self, step: int, *, shard: tuple[int, int] | None = None) -> EpisodeBatch:
        """Makes episodes with x and y of shape [B, shots, 1] (support) and [B, queries, 1] (query)."""
        u = self._uniform(step, shard)
        amplitude, phase = _scale(u[:, 0:1], self.AMPLITUDE), _scale(u[:, 1:2], self.PHASE)  # [B, 1]
        x = _scale(u[:, 2:], self.INPUT)  # [B, shots + queries]
        y = amplitude * np.sin(x - phase)
        xs, ys = (torch.from_numpy(v).to(self.device, self.dtype).unsqueeze(-1) for v in (x, y))
        s = self.shots
        return EpisodeBatch(xs[:, :s], ys[:, :s], xs[:, s:], ys[:, s:])


def _scale(u: np.ndarray, interval: tuple[float, float]) -> np.ndarray:
    low, high = interval
    return low + (high - low) * u
