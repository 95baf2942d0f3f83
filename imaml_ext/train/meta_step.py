"""One meta-step of Algorithm 1: as it comes, or as a function of buffers that a CUDA graph can replay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from imaml_ext.data import Sampler
from imaml_ext.meta import LearnableLam, MetaGradient
from imaml_ext.training.experiment import Experiment
from imaml_ext.training.ranks import Ranks
from imaml_ext.training.schedule import average_weight, learning_rate, set_learning_rate
from imaml_ext.training.window import Window


@dataclass
class State:
    """What changes from step to step; a checkpoint holds all of it."""

    step: int  # finished meta-steps
    theta: Tensor  # [N]
    optimizer: torch.optim.Optimizer
    average: Tensor | None  # [N]
    lam: LearnableLam | None  # the one of the experiment's algorithms
    window: Window
    seconds: float  # training time, validation and checkpoints left out

    @property
    def evaluated(self) -> Tensor:
        """The parameters to be judged: theta, or its average where one is kept."""
        return self.theta if self.average is None else self.average

    def tensors(self) -> list[Tensor]:
        """Everything on the device that a meta-step changes in place."""
        own = [self.theta, self.average, None if self.lam is None else self.lam.log.detach()]
        moments = [value for values in self.optimizer.state.values() for value in values.values()]
        return [value for value in (*own, *moments, *self.window.buffers()) if isinstance(value, Tensor)]


class MetaStep(Protocol):
    """Takes the meta-step that follows after `state.step` of them, and counts it."""

    def __call__(self) -> None: ...


def update(
    experiment: Experiment, state: State, meta: MetaGradient, weight: float | Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """One step of θ, of λ where it is learnt, and of θ̄, at the learning rates that the optimiser's groups have; nothing
    waits for the device.

    Args:
        weight: 1 − d of θ̄ ← d θ̄ + (1 − d) θ.

    Returns:
        The metrics, 0-d, and whether gradient and parameters are finite, 0-d bool.
    """
    # g ← g · min(1, c / ‖g‖);  θ ← θ − η_t · Adam(g)
    gradient = experiment.shared_(meta.gradient)
    norm = torch.linalg.vector_norm(gradient)
    clip = experiment.config.outer.clip_norm
    state.theta.grad = gradient if clip is None else gradient * (clip / norm).clamp(max=1)
    if state.lam is not None:  # log λ ← log λ − η_t · Adam(λ ∂F/∂λ), the schedule of θ at its own rate
        assert meta.lam_gradient is not None
        state.lam.log.grad = state.lam.log_gradient(meta.lam_gradient)
    state.optimizer.step()
    if state.average is not None:  # θ̄ ← d θ̄ + (1 − d) θ
        state.average.lerp_(state.theta, weight)

    metrics = {**meta.metrics, "gradient_norm": norm}
    finite = norm.isfinite() & state.theta.isfinite().all()
    if state.lam is not None:
        metrics |= _lam_metrics(state.lam)
        finite = finite & state.lam.log.isfinite().all()
    return metrics, finite


class EagerStep:
    """Samples this rank's share of B tasks, a function of (seed, step) alone, takes their meta-gradient (Algorithm 2),
    and of all ranks' mean the step."""

    def __init__(self, experiment: Experiment, tasks: Sampler, state: State, ranks: Ranks) -> None:
        self._experiment, self._tasks, self._state, self._ranks = experiment, tasks, state, ranks

    def __call__(self) -> None:
        state, outer = self._state, self._experiment.config.outer
        episodes = self._tasks.sample(state.step, shard=self._ranks.shard)
        meta = self._experiment.algorithm.meta_gradient(state.theta, episodes)
        meta = self._ranks.mean_over_tasks(meta, tasks=episodes.num_tasks)
        set_learning_rate(state.optimizer, outer, learning_rate(outer, state.step))
        metrics, finite = update(self._experiment, state, meta, average_weight(outer, state.step))
        state.step += 1
        state.window.add(metrics, step=state.step, finite=finite)
        state.window.count()


def _lam_metrics(lam: LearnableLam) -> dict[str, Tensor]:
    """λ, or the spread of the λs."""
    values = lam.values
    if len(values) == 1:
        return {"lam": values[0]}
    return {"lam": values.mean(), "lam_min": values.min(), "lam_max": values.max()}
