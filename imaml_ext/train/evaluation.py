"""Accuracy (or mean squared error) on tasks that were never trained on, with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from imaml_ext.batch import Data, shard_slice
from imaml_ext.data import DataSource
from imaml_ext.errors import ConfigError, RunError
from imaml_ext.inner import GradientDescent
from imaml_ext.pretrained.weights import Weights, read_weights
from imaml_ext.settings import COUNT, POSITIVE, Settings, changed, from_json
from imaml_ext.train.checkpoint import load_checkpoint, load_newest
from imaml_ext.train.config import EvaluationSettings, RunSettings, Tasks, Theta, TrainConfig
from imaml_ext.train.experiment import Experiment, build
from imaml_ext.train.progress import ProgressBar
from imaml_ext.train.ranks import Ranks
from imaml_ext.train.run_directory import RunDirectory, read_config

_FIRST = 1250  # query examples


@dataclass(frozen=True)
class FromScratch(Settings):
    """The baseline without meta-learning: each task's network is trained on its support set alone, with Adam."""

    steps: Annotated[int, COUNT]
    """Steps of Adam per task."""

    lr: Annotated[float, POSITIVE] = 0.003
    """Learning rate of these steps."""


@dataclass(frozen=True)
class FirstTasks:
    """Holds means over the first of an evaluation's tasks, 1,250 query examples of them: enough to know the parameters again.

    A short evaluation of so many tasks, and of the same seed, has the same.
    """

    tasks: int
    loss: float
    accuracy: float | None


@dataclass(frozen=True)
class Evaluation:
    """Holds means over tasks; an interval is 1.96 · std / √tasks. Accuracies are fractions, None for regression."""

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
        return f"{line}\nfrom scratch, {self.from_scratch.inner_steps} steps per task: {self.from_scratch}"

    def to_json(self) -> dict[str, Any]:
        values = dict(vars(self))
        del values["device"]
        values["first"] = dict(vars(self.first))
        baseline = values.pop("from_scratch")
        return values if baseline is None else values | {"from_scratch": baseline.to_json()}


def evaluate(
    experiment: Experiment,
    params: Tensor | Mapping[str, Tensor],
    *,
    split: str,
    tasks: int,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Adapts meta-parameters, all of them or theta [N] alone, to each task's support set; judges them on its query set.

    The tasks are a function of (seed, split) alone: neither evaluation.meta_batch nor the device changes them. Several
    ranks take turns at the batches, which leaves the result the same to the bit; `progress` is called on all of them.

    Raises:
        ConfigError: the data set has no such split, or its classes do not allow such tasks.
    """
    return _judge(
        experiment,
        lambda _, support: experiment.test_algorithm.adapt(params, support),
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
    """Judges networks that are trained on the support set alone, on the same tasks as `evaluate`.

    Task k begins with the initial parameters of the seed `seed` + k.

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
    """Returns losses and accuracies on the query sets of phi [B, N] = learn(number of the first task, support sets)."""
    if tasks < 2:
        raise ConfigError(f"tasks must be at least 2, got {tasks}")
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
    per_task = experiment.config.tasks.queries * (experiment.config.tasks.ways if experiment.classification else 1)
    first = min(tasks, math.ceil(_FIRST / per_task))
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
    """Returns the mean over the tasks and 1.96 · std / √n."""
    return values.mean().item(), 1.96 * values.std().item() / math.sqrt(values.numel())


def evaluate_run(
    path: Path,
    changes: Mapping[str, Any] | None = None,
    *,
    checkpoint: Path | None = None,
    split: str = "test",
    from_scratch: FromScratch | None = None,
) -> Evaluation:
    """Evaluates the newest meta-parameters of a run, or those of `checkpoint`.

    Args:
        path: the run directory, or that of a recipe of several stages, of which the last is evaluated.
        changes: of the run's settings, {path: value}: {"evaluation.tasks": 1000}.

    Raises:
        RunError: the directory holds no run or no checkpoint, or the checkpoint is damaged or of another model.
        ConfigError, DataError: the tasks asked for cannot be made; those of another number of ways, by weights alone.
    """
    if changes and "tasks.ways" in changes:
        raise ConfigError("ways are of weights: export the run, and evaluate what was exported")
    directory = RunDirectory.of_last_stage(path)
    config = changed(read_config(directory).config, changes or {})
    saved = load_newest(directory.checkpoints) if checkpoint is None else load_checkpoint(checkpoint)
    if saved is None:
        raise RunError(f"{directory.path} has no checkpoint yet: nothing to evaluate")
    experiment = build(config)
    like = experiment.algorithm.initial(experiment.model.init(seed=0, dtype=experiment.dtype))
    params = experiment.restored({name: value.to(experiment.dtype) for name, value in saved.evaluated.items()}, like)
    return evaluate_as_configured(experiment, params, split=split, from_scratch=from_scratch)


def evaluate_pretrained(
    source: Path | str,
    changes: Mapping[str, Any] | None = None,
    *,
    split: str = "test",
    from_scratch: FromScratch | None = None,
) -> Evaluation:
    """Evaluates weights, by name or from a file, on tasks of their own data set.

    Args:
        changes: of the settings, {path: value}; "tasks.ways" needs weights of classification.

    Raises:
        WeightsError: there are no such weights, or the file is damaged.
        ConfigError, DataError: the tasks asked for cannot be made.
    """
    changes = changes or {}
    weights = read_weights(source).for_ways(changes.get("tasks.ways"))
    experiment = build(changed(_config_of(weights), changes))
    params = {name: value.to(experiment.device, experiment.dtype) for name, value in weights.params.items()}
    return evaluate_as_configured(experiment, params, split=split, from_scratch=from_scratch)


def _config_of(weights: Weights) -> TrainConfig:
    """The configuration in which weights are evaluated as they were when they were exported."""
    card, dtype = weights.card, weights.params["theta"].dtype
    return TrainConfig(
        data=from_json(DataSource, card.data, "data"),
        tasks=from_json(Tasks, card.tasks, "tasks"),
        model=weights.model,
        theta=Theta(shared_head=weights.shared_head),
        algorithm=weights.algorithm,
        evaluation=EvaluationSettings(tasks=card.test["tasks"], seed=card.test["seed"]),
        run=RunSettings(dtype="float64" if dtype == torch.float64 else "float32"),
    )


def evaluate_as_configured(
    experiment: Experiment,
    params: Tensor | Mapping[str, Tensor],
    *,
    split: str,
    from_scratch: FromScratch | None = None,
) -> Evaluation:
    """Evaluates as `evaluate` does, with the tasks and the seed that the configuration says, and a progress bar.

    With `from_scratch`, networks trained on each task alone are judged on the same tasks.
    """
    asked = {
        "split": split,
        "tasks": experiment.config.evaluation.tasks,
        "seed": experiment.config.evaluation.seed,
    }
    with ProgressBar("evaluating", total=asked["tasks"]) as bar:
        result = evaluate(experiment, params, **asked, progress=bar.update)
    if from_scratch is None:
        return result
    with ProgressBar("from scratch", total=asked["tasks"]) as bar:
        return replace(
            result, from_scratch=evaluate_from_scratch(experiment, from_scratch, **asked, progress=bar.update)
        )
