"""Accuracy (or mean squared error) on tasks that were never trained on, with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imaml_ext.data.episodes import shard_slice
from imaml_ext.errors import CheckpointError, ConfigError, RunError
from imaml_ext.inner import GradientDescent
from imaml_ext.models import Data
from imaml_ext.training.checkpoint import load_checkpoint, load_newest
from imaml_ext.training.config import FromScratch, TrainConfig
from imaml_ext.training.experiment import Experiment, build
from imaml_ext.training.progress import ProgressBar
from imaml_ext.training.ranks import Ranks
from imaml_ext.training.run_directory import RunDirectory, read_config

_FIRST = 1250  # query examples


@dataclass(frozen=True)
class FirstTasks:
    """Means over the first of an evaluation's tasks, 1,250 query examples of them: enough to know the parameters again.

    A short evaluation of so many tasks, and of the same seed, has the same.
    """

    tasks: int
    loss: float
    accuracy: float | None


@dataclass(frozen=True)
class Evaluation:
    """Means over tasks; an interval is 1.96 · std / √tasks. Accuracies are fractions, None for regression."""

    split: str
    tasks: int
    seed: int
    shots: int
    inner_steps: int
    loss: float
    loss_interval: float
    accuracy: float | None
    accuracy_interval: float | None
    first: FirstTasks
    device: torch.device  # not in the JSON: the stamp beside it has it
    from_scratch: Evaluation | None = None  # the same tasks without meta-learning, where that was asked for

    def __str__(self) -> str:
        if self.accuracy is not None and self.accuracy_interval is not None:
            figure = f"accuracy {100 * self.accuracy:.2f} ± {100 * self.accuracy_interval:.2f} %"
        else:
            figure = f"mean squared error {self.loss:.4f} ± {self.loss_interval:.4f}"
        line = f"{self.split} {figure} ({self.tasks} tasks, 95 % interval)"
        if self.from_scratch is None:
            return line
        return f"{line}\nfrom scratch, {self.from_scratch.inner_steps} steps a task: {self.from_scratch}"

    def to_json(self) -> dict[str, Any]:
        values = dict(vars(self))
        del values["device"]
        values["first"] = dict(vars(self.first))
        baseline = values.pop("from_scratch")
        return values if baseline is None else values | {"from_scratch": baseline.to_json()}


def evaluate(
    experiment: Experiment,
    theta: Tensor,
    *,
    split: str,
    tasks: int,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Adapt theta [N] to each task's support set and judge it on the task's query set.

    The tasks are a function of (seed, split) alone: neither evaluation.meta_batch nor the device changes them. Several
    ranks take turns at the batches, which leaves the result the same to the bit; `progress` is called on all of them.

    Raises:
        ConfigError: the data set has no such split, or its classes do not allow such tasks.
    """
    return _judge(
        experiment,
        lambda _, support: experiment.test_algorithm.adapt(theta, support),
        inner_steps=experiment.config.test_inner_steps,
        split=split,
        tasks=tasks,
        seed=seed,
        progress=progress,
        ranks=ranks or Ranks(),
    )


def evaluate_from_scratch(
    experiment: Experiment,
    scratch: FromScratch,
    *,
    split: str,
    tasks: int,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """As `evaluate`, on the same tasks, of networks that know nothing but the support set; task k begins from the
    initial parameters of the seed `seed` + k.

    Raises:
        ConfigError: the data set has no such split, or its classes do not allow such tasks.
    """
    inner = GradientDescent(steps=scratch.steps, lr=scratch.lr, optimizer="adam")

    def train(first: int, support: Data) -> Tensor:
        seeds = range(seed + first, seed + first + len(support.x))
        rows = [experiment.model.init(seed=s, dtype=experiment.dtype, device=experiment.device) for s in seeds]
        return inner.solve(experiment.loss, torch.stack(rows), support, lam=0.0).phi

    return _judge(
        experiment,
        train,
        inner_steps=scratch.steps,
        split=split,
        tasks=tasks,
        seed=seed,
        progress=progress,
        ranks=Ranks(),
    )


def _judge(
    experiment: Experiment,
    learn: Callable[[int, Data], Tensor],
    *,
    inner_steps: int,
    split: str,
    tasks: int,
    seed: int,
    progress: Callable[[int], None],
    ranks: Ranks,
) -> Evaluation:
    """Losses and accuracies on the query sets of phi [B, N] = learn(number of the first task, support sets)."""
    if tasks < 2:
        raise ConfigError(f"tasks must be an integer >= 2, got {tasks}")
    sampler = experiment.sampler(split, tasks=tasks, seed=seed)
    batches = math.ceil(tasks / experiment.config.evaluation.meta_batch)
    losses = torch.zeros(tasks, dtype=torch.float64, device=experiment.device)
    accuracies = torch.zeros_like(losses)
    for turn in range(0, batches, ranks.size):
        batch = turn + ranks.rank
        if batch < batches:
            rows = shard_slice(tasks, (batch, batches))
            episodes = sampler.sample(0, shard=(batch, batches))  # a slice of the one batch of all tasks
            phi = learn(rows.start, episodes.support)  # [B, N]
            with torch.no_grad():
                outputs = experiment.loss.outputs(phi, episodes.query_x)  # [B, Q, …]
                losses[rows] = experiment.loss.criterion(outputs, episodes.query_y).double()
            if experiment.classification:
                accuracies[rows] = (outputs.argmax(-1) == episodes.query_y).double().mean(1)
        progress(shard_slice(tasks, (min(turn + ranks.size, batches) - 1, batches)).stop)
    losses = ranks.sum(losses)  # of zeros, but for the tasks of this rank
    loss, loss_interval = _mean_and_interval(losses)
    data = experiment.config.data
    first = min(tasks, math.ceil(_FIRST / (data.queries * (data.ways if experiment.classification else 1))))
    accuracy, accuracy_interval, first_accuracy = None, None, None
    if experiment.classification:
        accuracies = ranks.sum(accuracies)
        accuracy, accuracy_interval = _mean_and_interval(accuracies)
        first_accuracy = accuracies[:first].mean().item()
    return Evaluation(
        split=split,
        tasks=tasks,
        seed=seed,
        shots=experiment.shots(split),
        inner_steps=inner_steps,
        loss=loss,
        loss_interval=loss_interval,
        accuracy=accuracy,
        accuracy_interval=accuracy_interval,
        first=FirstTasks(first, losses[:first].mean().item(), first_accuracy),
        device=experiment.device,
    )


def _mean_and_interval(values: Tensor) -> tuple[float, float]:
    """Mean over the tasks and 1.96 · std / √n."""
    return values.mean().item(), 1.96 * values.std().item() / math.sqrt(values.numel())


@dataclass(frozen=True)
class EvaluationOverrides:
    """What an evaluation does otherwise than the run was configured; None: as it was.

    tasks, seed, inner_steps, meta_batch: of `EvaluationConfig`; ways, shots, data_root: of `DataConfig`; device: of
    `RunConfig`.
    """

    tasks: int | None = None
    seed: int | None = None
    ways: int | None = None
    shots: int | None = None
    inner_steps: int | None = None
    meta_batch: int | None = None
    device: str | None = None
    data_root: Path | None = None

    def applied(self, config: TrainConfig) -> TrainConfig:
        """The configuration with these settings in it."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        run = {"device": given.pop("device")} if "device" in given else {}
        data = {"root": given.pop("data_root")} if "data_root" in given else {}
        if "ways" in given:
            data |= {"ways": given.pop("ways")}
        if "shots" in given:
            data |= {"shots": given.pop("shots"), "train_shots": None}
        return replace(
            config,
            evaluation=replace(config.evaluation, **given),
            run=replace(config.run, **run),
            data=replace(config.data, **data),
        )


AS_CONFIGURED = EvaluationOverrides()


def evaluate_run(
    path: Path,
    overrides: EvaluationOverrides = AS_CONFIGURED,
    *,
    checkpoint: Path | None = None,
    split: str = "test",
    from_scratch: FromScratch | None = None,
) -> Evaluation:
    """Evaluate the newest parameters of a run, or those of `checkpoint`.

    Raises:
        RunError: the directory holds no run or no checkpoint, or the checkpoint is damaged.
        ConfigError, DataError: the tasks asked for cannot be made; those of another number of ways, by weights alone.
    """
    if overrides.ways is not None:
        raise ConfigError("ways are of weights: export the run, and evaluate what was exported")
    directory = RunDirectory(path)
    experiment, theta = open_run(directory, overrides.applied(read_config(directory).config), checkpoint=checkpoint)
    return evaluate_as_configured(experiment, theta, split=split, from_scratch=from_scratch)


def evaluate_as_configured(
    experiment: Experiment, theta: Tensor, *, split: str, from_scratch: FromScratch | None = None
) -> Evaluation:
    """As `evaluate`, with the number and the seed of the tasks that the configuration says, and a progress bar.

    With `from_scratch`, networks trained on each task alone are judged beside it.
    """
    tasks, seed = experiment.config.evaluation.tasks, experiment.config.evaluation.seed
    with ProgressBar("evaluating", total=tasks) as bar:
        result = evaluate(experiment, theta, split=split, tasks=tasks, seed=seed, progress=bar.update)
    if from_scratch is None:
        return result
    with ProgressBar("from scratch", total=tasks) as bar:
        baseline = evaluate_from_scratch(
            experiment, from_scratch, split=split, tasks=tasks, seed=seed, progress=bar.update
        )
    return replace(result, from_scratch=baseline)


def open_run(
    directory: RunDirectory, config: TrainConfig, *, checkpoint: Path | None = None
) -> tuple[Experiment, Tensor]:
    """What a run has learnt, its newest parameters theta [N] or those of `checkpoint`, to be judged as `config` says.

    Raises:
        RunError: the directory holds no checkpoint, or it is damaged or of another model.
        ConfigError, DataError: the tasks asked for cannot be made.
    """
    saved = load_newest(directory.checkpoints) if checkpoint is None else load_checkpoint(checkpoint)
    if saved is None:
        raise RunError(f"{directory.path} has no checkpoint yet: nothing to evaluate")
    experiment = build(config)
    theta = saved.theta if saved.average is None else saved.average  # [N]
    if theta.numel() != experiment.model.num_parameters:
        raise CheckpointError(
            f"the checkpoint holds {theta.numel()} parameters, the model of {directory.config} has "
            f"{experiment.model.num_parameters}"
        )
    experiment.restore_lam(saved.log_lam)
    return experiment, theta.to(experiment.device, experiment.dtype)
