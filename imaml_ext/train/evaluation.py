"""Accuracy (or mean squared error) on tasks that were never trained on, with its 95 % interval."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from imaml_ext.batch import Data, ragged, shard_slice
from imaml_ext.data import DataSource, EpisodeSampler
from imaml_ext.errors import ConfigError, EvaluationStopped
from imaml_ext.inner import GradientDescent
from imaml_ext.pretrained.adapted import outputs_beside_support
from imaml_ext.pretrained.weights import Weights, read_weights
from imaml_ext.progress import ProgressBar
from imaml_ext.settings import COUNT, POSITIVE, Settings, changed, from_json
from imaml_ext.train.config import EvaluationSettings, RunSettings, Tasks, Theta, TrainConfig
from imaml_ext.train.experiment import Experiment, build
from imaml_ext.train.export import saved_parameters
from imaml_ext.train.ranks import Ranks
from imaml_ext.train.run_directory import RunDirectory, check_recorded_classes, read_config
from imaml_ext.train.signals import StopRequest

_FIRST = 1250  # query examples
_SECONDS = 1.0  # between two figures of an evaluation that is under way


@dataclass(frozen=True)
class FromScratch(Settings):
    """Configures the baseline without meta-learning: Adam on each task's support set alone."""

    steps: Annotated[int, COUNT]  # Steps of Adam per task.
    lr: Annotated[float, POSITIVE] = 0.003  # Learning rate of these steps.


@dataclass(frozen=True)
class Evaluation:
    """Holds means over tasks; an interval is 1.96 · std / √tasks. Accuracies are fractions, None for regression.

    Attributes:
        transductive: whether the queries of a task were judged together, which batch normalisation notices.
        first: the means over the first tasks, 1,250 query examples of them: enough to know the parameters again. A
            short evaluation of so many tasks, and of the same seed, has the same.
        per_class: {class: (accuracy, query examples)} of every class that was in a task, where that was asked for.
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
    transductive: bool = True
    per_class: dict[str, tuple[float, int]] | None = None
    from_scratch: Evaluation | None = None  # the same tasks without meta-learning, where that was asked for

    @property
    def figure(self) -> str:
        """The mean with its interval."""
        if self.accuracy is not None and self.accuracy_interval is not None:
            return f"accuracy {100 * self.accuracy:.2f} ± {100 * self.accuracy_interval:.2f} %"
        return f"mean squared error {self.loss:.4f} ± {self.loss_interval:.4f}"

    def __str__(self) -> str:
        alone = "" if self.transductive else ", each query alone beside the support set"
        line = f"{self.split} {self.figure} ({self.tasks} tasks, 95 % interval{alone})"
        if self.from_scratch is None:
            return line
        return f"{line}\nfrom scratch, {self.from_scratch.inner_steps} steps per task: {self.from_scratch}"

    def to_json(self) -> dict[str, Any]:
        left_out = {"device", "from_scratch", "per_class"} | ({"transductive"} if self.transductive else set())
        values = {name: value for name, value in vars(self).items() if name not in left_out}
        if self.per_class is not None:
            classes = self.per_class.items()
            values["per_class"] = {name: {"accuracy": right, "queries": count} for name, (right, count) in classes}
        return values | ({} if self.from_scratch is None else {"from_scratch": self.from_scratch.to_json()})


def evaluate(
    experiment: Experiment,
    params: Tensor | Mapping[str, Tensor] | FromScratch,
    *,
    split: str,
    tasks: int,
    seed: int,
    transductive: bool = True,
    per_class: bool = False,
    progress: Callable[[int], None] = lambda done: None,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Adapts meta-parameters to each task's support set, and judges the outcome on its query set.

    The tasks are a function of (seed, split) alone: neither evaluation.meta_batch nor the device changes them. Several
    ranks take turns at the batches, which leaves the result the same to the bit; `progress` is called on all of them.

    Args:
        params: all meta-parameters, or theta [N] alone; or `FromScratch`: task k is then learnt from the initial
            parameters of the seed `seed` + k.
        transductive: judge the queries of a task together, as the literature does; else each of them alone beside the
            support set. It matters to models whose outputs depend on their batch.
        per_class: measure the accuracy of every class too.

    Raises:
        ConfigError: the data set has no such split, or its classes do not allow such tasks.
    """
    ranks = ranks or Ranks()
    judging = _Judging(experiment, params, split, tasks, seed, transductive, per_class)
    for done in judging.batches(ranks):
        progress(done)
    return judging.result(tasks, ranks)


class _Judging:
    """Judges the tasks of an evaluation batch by batch, and gives the result of those so far."""

    def __init__(
        self,
        experiment: Experiment,
        params: Tensor | Mapping[str, Tensor] | FromScratch,
        split: str,
        tasks: int,
        seed: int,
        transductive: bool,
        per_class: bool,
    ) -> None:
        if tasks < 2:
            raise ConfigError(f"tasks must be at least 2, got {tasks}")
        self.experiment, self.params, self.split, self.tasks, self.seed = experiment, params, split, tasks, seed
        self.transductive = transductive
        self.sampler = experiment.sampler(split, tasks=tasks, seed=seed)
        self.losses = torch.zeros(tasks, dtype=torch.float64, device=experiment.device)
        self.accuracies = torch.zeros_like(self.losses)
        self.per_class: Tensor | None = None  # [2, classes]: queries that were judged right, and all of them
        if per_class:
            if not isinstance(self.sampler, EpisodeSampler):
                raise ConfigError(
                    f"per_class must be false for {experiment.config.data.kind_name}, which is regression"
                )
            self.per_class = self.losses.new_zeros(2, self.sampler.images.num_classes)

    def batches(self, ranks: Ranks) -> Iterator[int]:
        """Judges the tasks in turns of one batch per rank; yields how many tasks are done after each."""
        batches = math.ceil(self.tasks / self.experiment.config.evaluation.meta_batch)
        for turn in range(0, batches, ranks.size):
            batch = turn + ranks.rank
            if batch < batches:
                self._judge((batch, batches))
            yield shard_slice(self.tasks, (min(turn + ranks.size, batches) - 1, batches)).stop

    def _judge(self, shard: tuple[int, int]) -> None:
        experiment, params, rows = self.experiment, self.params, shard_slice(self.tasks, shard)
        episodes = self.sampler.sample(0, shard=shard)  # a slice of the one batch of all tasks
        if isinstance(params, FromScratch):
            phi = _from_scratch(experiment, params, episodes.support, seed=self.seed + rows.start)  # [B, N]
        else:
            phi = experiment.test_algorithm.adapt(params, episodes.support)  # [B, N]
        query = experiment.loss.prepared(episodes.query)
        sizes = ragged(query)
        with torch.no_grad():
            if self.transductive:
                outputs = experiment.loss.outputs(phi, query.x, **sizes)  # [B, Q, …]
            else:
                outputs = outputs_beside_support(
                    experiment.loss, phi, episodes.support_x, query.x, **ragged(episodes.support)
                )
            self.losses[rows] = experiment.loss.criterion(outputs, query.y, **sizes).double()
        if not experiment.classification:
            return
        right = (outputs.argmax(-1) == query.y).double()  # [B, Q], ordered by class
        if "mask" in sizes:
            self.accuracies[rows] = (right * query.mask).sum(1) / query.mask.sum(1)
        else:
            self.accuracies[rows] = right.mean(1)
        if self.per_class is not None:
            assert isinstance(self.sampler, EpisodeSampler)
            classes = torch.from_numpy(self.sampler.indices(0, shard=shard).classes.reshape(-1)).to(right.device)
            right = right.view(classes.numel(), -1)
            self.per_class[0].index_add_(0, classes, right.sum(1))
            self.per_class[1].index_add_(0, classes, torch.ones_like(right).sum(1))

    def result(self, done: int, ranks: Ranks) -> Evaluation:
        """Returns the result of the first `done` tasks, at least two of them."""
        experiment, config = self.experiment, self.experiment.config
        losses, accuracies = ranks.sum(self.losses)[:done], ranks.sum(self.accuracies)[:done]  # of zeros, but for own
        first = min(done, math.ceil(_FIRST / (config.tasks.sizes(self.split)["queries"] * config.outputs)))
        loss, loss_interval = _mean_and_interval(losses)
        accuracy, accuracy_interval = _mean_and_interval(accuracies) if experiment.classification else (None, None)
        first_accuracy = accuracies[:first].mean().item() if experiment.classification else None
        steps = self.params.steps if isinstance(self.params, FromScratch) else config.test_inner_steps
        return Evaluation(
            split=self.split,
            tasks=done,
            seed=self.seed,
            shots=config.tasks.sizes(self.split)["shots"],
            inner_steps=steps,
            loss=loss,
            loss_interval=loss_interval,
            accuracy=accuracy,
            accuracy_interval=accuracy_interval,
            first={"tasks": first, "loss": losses[:first].mean().item(), "accuracy": first_accuracy},
            device=experiment.device,
            transductive=self.transductive,
            per_class=None if self.per_class is None else self._of_classes(ranks.sum(self.per_class)),
        )

    def _of_classes(self, sums: Tensor) -> dict[str, tuple[float, int]]:
        assert isinstance(self.sampler, EpisodeSampler)
        right, count = sums.tolist()
        judged = [each for each, queries in enumerate(count) if queries]
        return {self.sampler.images.name(each): (right[each] / count[each], int(count[each])) for each in judged}


def _from_scratch(experiment: Experiment, scratch: FromScratch, support: Data, *, seed: int) -> Tensor:
    """Returns phi [B, N] of networks that know nothing but their support sets."""
    model, seeds = experiment.model, range(seed, seed + len(support.x))
    rows = [model.init(seed=each, dtype=experiment.dtype, device=experiment.device) for each in seeds]
    inner = GradientDescent(steps=scratch.steps, lr=scratch.lr, optimizer="adam")
    return inner.solve(experiment.loss, torch.stack(rows), support, lam=0.0).phi


def _mean_and_interval(values: Tensor) -> tuple[float, float]:
    """Returns the mean over the tasks and 1.96 · std / √n."""
    return values.mean().item(), 1.96 * values.std().item() / math.sqrt(values.numel())


@dataclass(frozen=True)
class How:
    """Says how an evaluation is done.

    Attributes:
        split: the classes that the tasks are made of. from_scratch: judge networks that are trained on each task alone
            as well. transductive, per_class: as of `evaluate`.
    """

    split: str = "test"
    from_scratch: FromScratch | None = None
    transductive: bool = True
    per_class: bool = False


def evaluate_run(
    path: Path,
    changes: Mapping[str, Any] | None = None,
    *,
    checkpoint: Path | None = None,
    **how: Any,
) -> Evaluation:
    """Evaluates the meta-parameters of a run that `chosen_checkpoint` says, or those of `checkpoint`.

    Args:
        path: the run directory, or that of a recipe of several stages, of which the last is evaluated.
        changes: of the run's settings, {path: value}: {"evaluation.tasks": 1000}; `data` is another data set.
        how: the attributes of `How`.

    Raises:
        RunError: the directory holds no run or no checkpoint, or the checkpoint is damaged or of another model.
        ConfigError, DataError: the tasks asked for cannot be made; those of another number of ways, by weights alone.
        EvaluationStopped: SIGINT or SIGTERM came.
    """
    if changes and "tasks.ways" in changes:
        raise ConfigError("ways are of weights: export the run, and evaluate what was exported")
    return _as_configured(*open_run(path, changes, checkpoint=checkpoint), How(**how))


def open_run(
    path: Path, changes: Mapping[str, Any] | None = None, *, checkpoint: Path | None = None
) -> tuple[Experiment, dict[str, Tensor]]:
    """Returns the experiment of a run and its meta-parameters to be judged; errors as of `evaluate_run`."""
    directory = RunDirectory.of_last_stage(path)
    recorded = read_config(directory)
    config = changed(recorded.config, changes or {})
    saved = saved_parameters(directory, checkpoint)
    experiment = build(config)
    check_recorded_classes(directory, experiment.dataset)
    if recorded.dataset is not None:
        _check_shape(experiment, recorded.dataset["input_shape"], f"the run {directory.path}")
    like = experiment.algorithm.initial(experiment.model.init(seed=0, dtype=experiment.dtype))
    saved_params = {name: value.to(experiment.dtype) for name, value in saved.evaluated.items()}
    return experiment, experiment.restored(saved_params, like)


def _check_shape(experiment: Experiment, wanted: Sequence[int], whose: str) -> None:
    """Refuses examples of another shape than those of the training; some networks would take them."""
    found = experiment.dataset.input_shape
    if tuple(found) != tuple(wanted):
        theirs, ours = (" × ".join(map(str, shape)) for shape in (found, wanted))
        name = experiment.config.data.kind_name
        raise ConfigError(f"an example of {name} must be of shape {ours} for {whose}, got {theirs}")


def evaluate_pretrained(source: Path | str, changes: Mapping[str, Any] | None = None, **how: Any) -> Evaluation:
    """Evaluates weights, by name or from a file, on tasks of their own data set, or of another one.

    Args:
        changes, how: as of `evaluate_run`. Pictures of another data set are read as that data set says; the command
            `imaml evaluate` has them read as those of the training.

    Raises:
        WeightsError: there are no such weights, or the file is damaged.
        ConfigError, DataError: the tasks asked for cannot be made, or their examples have another shape than those
            of the training.
        EvaluationStopped: SIGINT or SIGTERM came.
    """
    changes = changes or {}
    weights = read_weights(source).for_ways(changes.get("tasks.ways"))
    experiment = build(changed(config_of(weights), changes))
    weights.card.recorded_classes.check(experiment.dataset, what=f"the weights {weights.name}")
    _check_shape(experiment, weights.card.input_shape, f"the weights {weights.name}")
    params = {name: value.to(experiment.device, experiment.dtype) for name, value in weights.params.items()}
    return _as_configured(experiment, params, How(**how))


def config_of(weights: Weights) -> TrainConfig:
    """Returns the configuration in which weights are evaluated as they were when they were exported."""
    card, double = weights.card, weights.params["theta"].dtype == torch.float64
    tested = {} if card.test is None or card.test.get("split") == "val" else card.test
    return TrainConfig(
        data=from_json(DataSource, card.data, "data"),  # type: ignore[type-abstract]
        tasks=from_json(Tasks, card.tasks, "tasks"),
        model=weights.model,
        theta=Theta(shared_head=weights.shared_head),
        algorithm=weights.algorithm,
        evaluation=EvaluationSettings(**{name: tested[name] for name in ("tasks", "seed") if name in tested}),
        run=RunSettings(dtype="float64" if double else "float32"),
    )


def _as_configured(experiment: Experiment, params: Mapping[str, Tensor], how: How) -> Evaluation:
    """Evaluates with the tasks and the seed that the configuration says, and a progress bar, until a signal comes."""
    settings, alone = experiment.config.evaluation, Ranks()

    def judged(title: str, params: Mapping[str, Tensor] | FromScratch) -> Evaluation:
        judging = _Judging(
            experiment, params, how.split, settings.tasks, settings.seed, how.transductive, how.per_class
        )
        so_far, last = None, -math.inf
        with StopRequest(advice="nothing is reported") as stop, ProgressBar(title, total=settings.tasks) as bar:
            for done in judging.batches(alone):
                end, now = done == settings.tasks or stop.signal is not None, time.monotonic()
                if done > 1 and (end or now - last >= _SECONDS):
                    so_far, last = judging.result(done, alone), now
                    bar.update(done, {"": so_far.figure})
                if end and done < settings.tasks:
                    raise EvaluationStopped(stop.signal, f"stopped after {done} of {settings.tasks} tasks", so_far)
        assert so_far is not None
        return so_far

    result = judged("evaluating", params)
    if how.from_scratch is None:
        return result
    try:
        return replace(result, from_scratch=judged("from scratch", how.from_scratch))
    except EvaluationStopped as stopped:
        stopped.so_far = replace(result, from_scratch=stopped.so_far)
        raise
