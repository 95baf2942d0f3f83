"""Sinusoid regression: the smallest meta-learning problem (Finn et al., *Model-Agnostic Meta-Learning*, ICML 2017,
5.1)."""

from __future__ import annotations

import numpy as np
import torch

from imaml_ext.rng import uniform

from .episodes import EpisodeBatch, TaskSampler


class SinusoidSampler(TaskSampler):
    """Tasks y = A sin(x − p) with amplitude A ~ U[0.1, 5], phase p ~ U[0, π] (radians) and inputs x ~ U[−5, 5].

    ``sample(step)`` is a function of (seed, stream, step) alone. Support and query inputs are independent draws.

    Args: shots, queries: points a task; meta_batch: tasks a step; device, dtype: of the tensors returned.
    Raises ValueError where a number is not positive.
    """

    AMPLITUDE = (0.1, 5.0)
    PHASE = (0.0, np.pi)
    INPUT = (-5.0, 5.0)

    def __init__(
        self,
        *,
        shots: int,
        queries: int,
        meta_batch: int,
        seed: int,
        stream: str = "train",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(shots=shots, queries=queries, meta_batch=meta_batch, seed=seed, stream=stream, dtype=dtype)
        self.device = torch.device(device) if device is not None else torch.device("cpu")

    def _uniform(self, step: int, shard: tuple[int, int] | None) -> np.ndarray:
        each = 2 + self.shots + self.queries
        return uniform(self._words(step, shard, each, stream=f"sinusoid/{self.stream}"))

    def parameters(self, step: int, *, shard: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Amplitude [B] and phase [B] (radians) of the tasks of a meta-step, float64."""
        u = self._uniform(step, shard)
        return _scale(u[:, 0], self.AMPLITUDE), _scale(u[:, 1], self.PHASE)

    def sample(self, step: int, *, shard: tuple[int, int] | None = None) -> EpisodeBatch:
        """Episodes with x and y of shape [B, shots, 1] (support) and [B, queries, 1] (query)."""
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
