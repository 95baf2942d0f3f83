"""Sinusoid regression: the smallest meta-learning problem (Finn et al., *Model-Agnostic Meta-Learning*, ICML 2017,
5.1)."""

from __future__ import annotations

import numpy as np
import torch

from .episodes import EpisodeBatch, shard_slice
from .rng import check_int, random_words, uniform


class SinusoidSampler:
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
        self.shots = check_int("shots", shots, minimum=1)
        self.queries = check_int("queries", queries, minimum=1)
        self.meta_batch = check_int("meta_batch", meta_batch, minimum=1)
        self.seed = check_int("seed", seed, minimum=0)
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point type, got {dtype}")
        self.stream = stream
        self.device = torch.device(device) if device is not None else torch.device("cpu")
        self.dtype = dtype

    def _uniform(self, step: int, shard: tuple[int, int] | None) -> np.ndarray:
        step = check_int("step", step, minimum=0)
        tasks = shard_slice(self.meta_batch, shard)
        words = random_words(
            seed=self.seed,
            stream=f"sinusoid/{self.stream}",
            step=step,
            first_task=tasks.start,
            num_tasks=tasks.stop - tasks.start,
            words_per_task=2 + self.shots + self.queries,
        )
        return uniform(words)

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
