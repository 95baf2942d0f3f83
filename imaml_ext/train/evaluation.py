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
from imaml_ext.errors import ConfigError
from imaml_ext.inner import GradientDescent
from imaml_ext.pretrained.weights import Weights, read_weights
from imaml_ext.progress import ProgressBar
from imaml_ext.settings import COUNT, POSITIVE, Settings, changed, from_json
from imaml_ext.train.checkpoint import chosen_checkpoint, load_checkpoint
from imaml_ext.train.config import EvaluationSettings, RunSettings, Tasks, Theta, TrainConfig
from imaml_ext.train.experiment import Experiment, build
from imaml_ext.train.ranks import Ranks
from imaml_ext.train.run_directory import RunDirectory, check_recorded_classes, read_config

_FIRST = 1250  # query examples


@dataclass(frozen=True)
class FromScratch(Settings):
    """Configures the baseline without meta-learning: Adam on each task's support set alone."""

    steps: Annotated[int, COUNT]  # Steps of Adam per task.
    lr: Annotated[float, POSITIVE] = 0.003  # Learning rate of these steps.


@dataclass(frozen=True)
class Evaluation:
    """Holds means over tasks; an interval is 1.96 · std / √tasks. Accuracies are fractions, None for regression.

    Attributes:
        first: the means over the first tasks, 1,250 query examples of them: enough to know the parameters again. A
            short evaluation of so many tasks, and of the same seed, has the same.
    """

    split: str
    tasks: int
    seed: int
    shots: int
    inner_steps: int
    loss: float
    loss_interval: float
    accuracy: float | None
    accuracy_interval: float | None
    first: dict[str, Any]  # tasks, loss, accuracy
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
        baseline = {} if self.from_scratch is None else {"from_scratch": self.from_scratch.to_json()}
        values = {name: value for name, value in vars(self).items() if name not in ("device", "from_scratch")}
        return values | baseline


def evaluate(
    experiment: Experiment,
    params: Tensor | Mapping[str, Tensor] | FromScratch,
    *,
    split: str,
    tasks: int,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Adapts meta-parameters to each task's support set, and judges the outcome on its query set.

    The tasks are a function of (seed, split) alone: neither evaluation.meta_batch nor the device changes them. Several
    ranks take turns at the batches, which leaves the result the same to the bit; `progress` is called on all of them.

    Args:
        params: all meta-parameters, or theta [N] alone; or `FromScratch`: task k is then learnt from the initial
            parameters of the seed `seed` + k.

    Raises:
        ConfigError: the data set has no such split, or its classes do not allow such tasks.
    """
    if tasks < 2:
        raise ConfigError(f"tasks must be at least 2, got {tasks}")
    config, ranks = experiment.config, ranks or Ranks()
    sampler = experiment.sampler(split, tasks=tasks, seed=seed)
    batches = math.ceil(tasks / config.evaluation.meta_batch)
    losses = torch.zeros(tasks, dtype=torch.float64, device=experiment.device)
    accuracies = torch.zeros_like(losses)
    for turn in range(0, batches, ranks.size):
        batch = turn + ranks.rank
        if batch < batches:
            rows = shard_slice(tasks, (batch, batches))
            episodes = sampler.sample(0, shard=(batch, batches))  # a slice of the one batch of all tasks
            if isinstance(params, FromScratch):
                phi = _from_scratch(experiment, params, episodes.support, seed=seed + rows.start)  # [B, N]
            else:
                phi = experiment.test_algorithm.adapt(params, episodes.support)  # [B, N]
            with torch.no_grad():
                outputs = experiment.loss.outputs(phi, episodes.query_x)  # [B, Q, …]
                losses[rows] = experiment.loss.criterion(outputs, episodes.query_y).double()
            if experiment.classification:
                accuracies[rows] = (outputs.argmax(-1) == episodes.query_y).double().mean(1)
        progress(shard_slice(tasks, (min(turn + ranks.size, batches) - 1, batches)).stop)
    losses, accuracies = ranks.sum(losses), ranks.sum(accuracies)  # of zeros, but for the tasks of this rank
    first = min(tasks, math.ceil(_FIRST / (config.tasks.queries * config.outputs)))
    loss, loss_interval = _mean_and_interval(losses)
    accuracy, accuracy_interval = _mean_and_interval(accuracies) if experiment.classification else (None, None)
    first_accuracy = accuracies[:first].mean().item() if experiment.classification else None
    return Evaluation(
        split=split,
        tasks=tasks,
        seed=seed,
        shots=experiment.shots(split),
        inner_steps=params.steps if isinstance(params, FromScratch) else config.test_inner_steps,
        loss=loss,
        loss_interval=loss_interval,
        accuracy=accuracy,
        accuracy_interval=accuracy_interval,
        first={"tasks": first, "loss": losses[:first].mean().item(), "accuracy": first_accuracy},
        device=experiment.device,
    )


def _from_scratch(experiment: Experiment, scratch: FromScratch, support: Data, *, seed: int) -> Tensor:
    """Returns phi [B, N] of networks that know nothing but their support sets."""
    model, seeds = experiment.model, range(seed, seed + len(support.x))
    rows = [model.init(seed=each, dtype=experiment.dtype, device=experiment.device) for each in seeds]
    inner = GradientDescent(steps=scratch.steps, lr=scratch.lr, optimizer="adam")
    return inner.solve(experiment.loss, torch.stack(rows), support, lam=0.0).phi


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
    """Evaluates the meta-parameters of a run that `chosen_checkpoint` says, or those of `checkpoint`.

    Args:
        path: the run directory, or that of a recipe of several stages, of which the last is evaluated.
        changes: of the run's settings, {path: value}: {"evaluation.tasks": 1000}.
        from_scratch: judge networks that are trained on each task alone as well.

    Raises:
        RunError: the directory holds no run or no checkpoint, or the checkpoint is damaged or of another model.
        ConfigError, DataError: the tasks asked for cannot be made; those of another number of ways, by weights alone.
    """
    if changes and "tasks.ways" in changes:
        raise ConfigError("ways are of weights: export the run, and evaluate what was exported")
    experiment, params = open_run(path, changes, checkpoint=checkpoint)
    return _as_configured(experiment, params, split, from_scratch)


def open_run(
    path: Path, changes: Mapping[str, Any] | None = None, *, checkpoint: Path | None = None
) -> tuple[Experiment, dict[str, Tensor]]:
    """Returns the experiment of a run and its meta-parameters to be judged; errors as of `evaluate_run`."""
    directory = RunDirectory.of_last_stage(path)
    config = changed(read_config(directory).config, changes or {})
    saved = chosen_checkpoint(directory) if checkpoint is None else load_checkpoint(checkpoint)
    experiment = build(config)
    check_recorded_classes(directory, experiment.dataset)
    like = experiment.algorithm.initial(experiment.model.init(seed=0, dtype=experiment.dtype))
    saved_params = {name: value.to(experiment.dtype) for name, value in saved.evaluated.items()}
    return experiment, experiment.restored(saved_params, like)


def evaluate_pretrained(
    source: Path | str,
    changes: Mapping[str, Any] | None = None,
    *,
    split: str = "test",
    from_scratch: FromScratch | None = None,
) -> Evaluation:
    """Evaluates weights, by name or from a file, on tasks of their own data set; arguments as of `evaluate_run`.

    Raises:
        WeightsError: there are no such weights, or the file is damaged.
        ConfigError, DataError: the tasks asked for cannot be made.
    """
    changes = changes or {}
    weights = read_weights(source).for_ways(changes.get("tasks.ways"))
    experiment = build(changed(_config_of(weights), changes))
    weights.card.recorded_classes.check(experiment.dataset, what=f"the weights {weights.name}")
    params = {name: value.to(experiment.device, experiment.dtype) for name, value in weights.params.items()}
    return _as_configured(experiment, params, split, from_scratch)


def _config_of(weights: Weights) -> TrainConfig:
    """Returns the configuration in which weights are evaluated as they were when they were exported."""
    card, double = weights.card, weights.params["theta"].dtype == torch.float64
    return TrainConfig(
        data=from_json(DataSource, card.data, "data"),  # type: ignore[type-abstract]
        tasks=from_json(Tasks, card.tasks, "tasks"),
        model=weights.model,
        theta=Theta(shared_head=weights.shared_head),
        algorithm=weights.algorithm,
        evaluation=EvaluationSettings(tasks=card.test["tasks"], seed=card.test["seed"]),
        run=RunSettings(dtype="float64" if double else "float32"),
    )


def _as_configured(
    experiment: Experiment, params: Mapping[str, Tensor], split: str, from_scratch: FromScratch | None
) -> Evaluation:
    """Evaluates with the tasks and the seed that the configuration says, and a progress bar."""
    settings = experiment.config.evaluation

    def judged(title: str, params: Mapping[str, Tensor] | FromScratch) -> Evaluation:
        with ProgressBar(title, total=settings.tasks) as bar:
            return evaluate(
                experiment, params, split=split, tasks=settings.tasks, seed=settings.seed, progress=bar.update
            )

    result = judged("evaluating", params)
    return result if from_scratch is None else replace(result, from_scratch=judged("from scratch", from_scratch))
