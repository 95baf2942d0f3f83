"""One meta-step of Algorithm 1: as it comes, or as a function of buffers that a CUDA graph can replay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from imaml_ext.data import Sampler
from imaml_ext.meta import MetaGradient
from imaml_ext.train.experiment import Experiment
from imaml_ext.train.metrics import MetricAccumulator
from imaml_ext.train.ranks import Ranks
from imaml_ext.train.schedule import average_weight, learning_rate, set_learning_rate


@dataclass
class State:
    """Holds what changes from step to step; a checkpoint holds all of it."""

    step: int  # finished meta-steps
    params: dict[str, Tensor]  # theta [N], and what is learnt or carried beside it
    averages: dict[str, Tensor]  # of the meta-parameters, where they are kept
    optimizer: torch.optim.Optimizer
    metrics: MetricAccumulator
    seconds: float  # training time, validation and checkpoints left out
    best: dict[str, Any] = field(default_factory=dict)  # step and figure of the best validation, where it is remembered
    misses: int = 0  # validations since then

    @property
    def evaluated(self) -> dict[str, Tensor]:
        """The meta-parameters to be judged: averages in place of what they are averages of."""
        return self.params | self.averages

    def tensors(self) -> list[Tensor]:
        """Returns everything on the device that a meta-step changes in place."""
        moments = [value for values in self.optimizer.state.values() for value in values.values()]
        moments = [value for value in moments if isinstance(value, Tensor)]
        return [*self.params.values(), *self.averages.values(), *moments, *self.metrics.buffers()]


MetaStep = Callable[[], None]  # takes the meta-step that follows after `state.step` of them, and counts it


def update(
    experiment: Experiment, state: State, meta: MetaGradient, weight: float | Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Takes one step of every meta-parameter and average, at the rates of the optimiser's groups; nothing waits.

    Args:
        weight: 1 − d of θ̄ ← d θ̄ + (1 − d) θ.

    Returns:
        The metrics, 0-d, and whether the gradient of theta and all parameters are finite, 0-d bool.
    """
    clip = experiment.config.outer.clip_norm
    norms = {}
    for name, value in meta.carried.items():
        state.params[name].copy_(value)
    for name, value in state.params.items():
        if name in meta.carried:
            continue
        # g ← g · min(1, c / ‖g‖);  θ ← θ − η_t · Adam(g)
        gradient = experiment.shared_(meta.gradients[name]) if name == "theta" else meta.gradients[name]
        norms[name] = torch.linalg.vector_norm(gradient)
        value.grad = gradient if clip is None else gradient * (clip / norms[name]).clamp(max=1)
    state.optimizer.step()
    for name, average in state.averages.items():  # θ̄ ← d θ̄ + (1 − d) θ
        average.lerp_(state.params[name], weight)
    finite = norms["theta"].isfinite()
    for value in state.params.values():
        finite = finite & value.isfinite().all()
    learnt = experiment.algorithm.learnt_metrics(state.params)
    learnt = {f"inner_{name}" if name.startswith("lr") else name: value for name, value in learnt.items()}
    return {**meta.metrics, "gradient_norm": norms["theta"], **learnt}, finite  # "lr" is the outer rate


class EagerStep:
    """Samples this rank's share of B tasks, takes their meta-gradient (Algorithm 2), and steps by all ranks' mean."""

    def __init__(self, experiment: Experiment, tasks: Sampler, state: State, ranks: Ranks) -> None:
        self._experiment, self._tasks, self._state, self._ranks = experiment, tasks, state, ranks

    def __call__(self) -> None:
        state, outer = self._state, self._experiment.config.outer
        episodes = self._tasks.sample(state.step, shard=self._ranks.shard)
        meta = self._experiment.algorithm.meta_gradient(state.params, episodes)
        meta = self._ranks.mean_over_tasks(meta, tasks=episodes.num_tasks)
        set_learning_rate(state.optimizer, outer, learning_rate(outer, state.step))
        metrics, finite = update(self._experiment, state, meta, average_weight(outer, state.step))
        state.step += 1
        state.metrics.add(metrics, step=state.step, finite=finite)
        state.metrics.count()
