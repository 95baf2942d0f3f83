"""Algorithm 1: the outer loop, from an empty run directory, or a checkpoint, to a tested set of meta-parameters."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imaml_ext._native import native
from imaml_ext._version import __version__
from imaml_ext.data import Sampler
from imaml_ext.errors import ConfigError, Diverged, Interrupted
from imaml_ext.files import atomic_write, json_bytes
from imaml_ext.progress import ProgressBar, say
from imaml_ext.settings import leaves, to_json
from imaml_ext.train import reports
from imaml_ext.train.captured import CapturedStep
from imaml_ext.train.checkpoint import chosen_checkpoint, list_checkpoints
from imaml_ext.train.config import TrainConfig
from imaml_ext.train.continued import checkpoint_of, opened, restored
from imaml_ext.train.environment import environment
from imaml_ext.train.evaluation import Evaluation, evaluate
from imaml_ext.train.experiment import Experiment, build
from imaml_ext.train.export import dataset_record
from imaml_ext.train.job import joined
from imaml_ext.train.meta_step import EagerStep, MetaStep, State
from imaml_ext.train.ranks import Ranks
from imaml_ext.train.run_directory import (
    RunDirectory,
    absolute,
    check_directory,
    check_recorded_classes,
    record_classes,
)
from imaml_ext.train.run_logger import RunLogger
from imaml_ext.train.schedule import learning_rate
from imaml_ext.train.signals import StopRequest

_SHOWN = (  # metric, name and scale on the progress bar
    ("query_loss", "loss", 1, "{:.3f}"),
    ("query_accuracy", "accuracy", 100, "{:.1f} %"),
    ("val_accuracy", "validation", 100, "{:.1f} %"),
    ("solve_residual", "residual", 1, "{:.1e}"),
    ("lam", "lambda", 1, "{:.3g}"),
    ("tasks_per_second", "speed", 1, "{:.1f} tasks/s"),
)

# Settings in which the processes of a job may differ; weights are read by the first alone.
_OF_THE_MACHINE = ("data.root", "data.cache_dir", "data.download", "data.splits", "run.threads", "theta.weights")

OnLog = Callable[[dict[str, Any]], object]  # takes a row of metrics.jsonl; true: stop here


def train(
    config: TrainConfig,
    path: Path,
    *,
    recipe: str = "",
    command: str = "",
    stage: str = "",
    resume: bool = False,
    checkpoint: Path | None = None,
    on_log: OnLog | None = None,
) -> dict[str, Any]:
    """Runs Algorithm 1 as configured, tests the result, and leaves everything in the run directory `path`.

    With `resume` the run that is there continues from its newest checkpoint, or from `checkpoint`; where there is no
    run yet, it begins. On a CPU, with the same number of threads and processes, the continued run ends with the same
    bits. Where the schedule is constant, `outer.steps` may have grown: the run ends as if it had them from the start.

    Under torchrun every process calls this alike. Each takes its share of the tasks, rank 0 alone needs and writes the
    run directory, and all return the same.

    Args:
        recipe, command: what the run was started by, for the record. stage: of a recipe, for the user to see.
        on_log: called on rank 0 with each row, after it was written to metrics.jsonl. Where it returns True, the run
            ends after that step, saved and tested. What it raises ends the run at once; `resume` continues it.

    Returns:
        The content of result.json.

    Raises:
        ConfigError, DataError, NativeUnavailableError: what was asked for cannot be run; nothing has been written.
        RunError: the directory holds another run or cannot be written, or a checkpoint is damaged; the processes do not
            agree on what to run, or one of them has ended.
        Diverged: the meta-gradient or the parameters became non-finite.
        Interrupted: SIGINT or SIGTERM came, to any of the processes; the state is saved.
        ReportedElsewhere: one of these, which another process raises.
    """
    directory, config = RunDirectory(path), absolute(config)
    with joined() as ranks, ExitStack() as run:
        ranks.on_all(native)  # before data are prepared; `_prepare` asks again, for the device
        ranks.on_first(check_directory, directory, config, resume=resume, more_steps=True)
        ranks.first_of_machine(config.data.load)  # which may download it, or fill the cache
        begun = resume and ranks.on_first(list_checkpoints, directory.checkpoints)
        experiment, train_tasks = ranks.on_all(_prepare, config, ranks)
        start = {} if begun else ranks.on_first(_start, experiment)
        ranks.check_equal(_facts(experiment, recipe))
        ranks.on_first(check_recorded_classes, directory, experiment.dataset)
        here = environment(experiment.device, ranks.size)
        record = {"command": command, "dataset": dataset_record(experiment.dataset, config)}
        stamp = {"recipe": recipe, **record, "config": to_json(config), "environment": here}
        ranks.on_first(run.enter_context, directory.opened())
        saved = ranks.on_first(opened, directory, config, stamp, resume, checkpoint)
        ranks.on_first(record_classes, directory, experiment.dataset)
        state = ranks.on_all(restored, experiment, saved, start)
        with StopRequest(patient=ranks.size > 1) as stop, RunLogger(directory) as logger:
            ranks.on_first(logger.open, step=state.step, tensorboard=config.run.tensorboard)
            take_step: MetaStep = EagerStep(experiment, train_tasks, state, ranks)
            if config.run.capture:
                take_step = CapturedStep(experiment, train_tasks, state)
            training = _Training(experiment, state, directory, logger, stop, ranks, on_log)
            training.loop(take_step, f"training, {stage}" if stage else "training")
            saved = ranks.on_first(chosen_checkpoint, directory)
            judged = experiment.restored(saved.evaluated, state.evaluated)
            tested = training.test(judged)
            return ranks.on_first(training.conclude, judged, *tested, stamp, command)


def _prepare(config: TrainConfig, ranks: Ranks) -> tuple[Experiment, Sampler]:
    """Makes the experiment and its training tasks; finds what is wrong with them before anything is written."""
    needed, tasks = f"at least {ranks.size}, a task for every process", config.outer.meta_batch
    if tasks < ranks.size:
        raise ConfigError(f"outer.meta_batch must be {needed}, got {tasks}")
    ranks.use_device(config.run.device)
    experiment = build(config)
    native(experiment.device)
    if config.run.capture:
        if ranks.size > 1:
            raise ConfigError(f"run.capture must be left out with several processes, got {ranks.size}")
        if experiment.device.type != "cuda":
            raise ConfigError(f"run.device must be a CUDA device with run.capture, got {config.run.device!r}")
    train_tasks = experiment.sampler("train", tasks=tasks, seed=config.run.seed, augmented=True)
    for split in {config.evaluation.split, *(["val"] if config.evaluation.every else [])}:
        experiment.sampler(split, tasks=config.evaluation.tasks, seed=config.evaluation.seed)
    return experiment, train_tasks


def _start(experiment: Experiment) -> dict[str, Tensor]:
    """Reads the meta-parameters that `theta.weights` names, and checks that the run can begin with them."""
    start = experiment.starting_params()
    experiment.initial_params(start)
    return start


def _facts(experiment: Experiment, recipe: str) -> dict[str, object]:
    """Lists what the processes of a job must have in common; where the data lie is each machine's own affair."""
    return {
        "the version of imaml_ext": __version__,
        "the version of torch": str(torch.__version__),
        "the recipe": recipe,
        **{name: value for name, value in leaves(experiment.config) if name not in _OF_THE_MACHINE},
        "the kind of device": experiment.device.type,
    }


@dataclass
class _Training:
    """Takes the steps of a run, validates on the way, and tests at the end."""

    experiment: Experiment
    state: State
    directory: RunDirectory
    logger: RunLogger
    stop: StopRequest
    ranks: Ranks
    on_log: OnLog | None = None
    asked_to_stop: bool = False  # by on_log

    @property
    def ended(self) -> bool:
        """Whether no step is left, or none is wanted."""
        patience = self.experiment.config.evaluation.patience
        out_of_patience = patience is not None and self.state.misses >= patience
        return self.state.step >= self.experiment.config.outer.steps or out_of_patience or self.asked_to_stop

    def loop(self, take_step: MetaStep, title: str) -> None:
        """Takes the steps that are left, and reports and saves where it is due."""
        config, state, ranks = self.experiment.config, self.state, self.ranks
        outer, every = config.outer, config.evaluation.every
        clock = time.perf_counter()
        steps_timed, seconds_timed = 0, 0.0
        if not self.ended:
            ranks.on_first(self.directory.forget_result)
        with ProgressBar(title, total=outer.steps, start=state.step, hidden=not ranks.first) as bar:
            while not self.ended:
                lr = learning_rate(outer, state.step)
                take_step()

                # From here on the host; the device is waited for only where one of these is due.
                last = state.step == outer.steps
                validate = bool(every) and (state.step % every == 0 or last)
                report = validate or state.step % config.run.log_every == 0 or last
                signal = ranks.maximum(self.stop.signal or 0)
                save = state.step % config.run.checkpoint_every == 0 or last or bool(signal)
                steps_timed += 1
                if report or save:
                    self._check_finite()
                    now = time.perf_counter()
                    seconds_timed += now - clock
                    state.seconds += now - clock
                if report:
                    row: dict[str, Any] = {"step": state.step, "lr": lr, **state.metrics.means()}
                    if validate:
                        row |= self._validation()
                    row["tasks_per_second"] = steps_timed * outer.meta_batch / seconds_timed
                    row["seconds"] = state.seconds
                    self.asked_to_stop = ranks.on_first(self._log, row)
                    state.metrics.clear()
                    steps_timed, seconds_timed = 0, 0.0
                bar.update(state.step, _shown(row) if report else None)
                save = save or self.ended or (validate and state.best.get("step") == state.step)
                if save:
                    ranks.on_first(self.logger.save, checkpoint_of(config, state), keep=config.run.keep_checkpoints)
                if report or save:
                    clock = time.perf_counter()
                if signal:
                    message = f"stopped after step {state.step}; continue with --resume"
                    raise ranks.reported_once(Interrupted(signal, message))
        if state.step < outer.steps and ranks.first:
            why = "as asked" if self.asked_to_stop else f"{state.misses} validations were not better than the best"
            say(f"training ended after step {state.step} of {outer.steps}: {why}")

    def _log(self, row: dict[str, Any]) -> bool:
        """Writes a row, and returns whether the user's own function wants no further step."""
        self.logger.add(row)
        return bool(self.on_log and self.on_log(dict(row)))

    def _check_finite(self) -> None:
        """Ends the run before a meta-gradient that is not finite reaches a file."""
        bad_step = self.state.metrics.first_nonfinite_step()
        if bad_step is None:
            return
        kept = list_checkpoints(self.directory.checkpoints)
        where = f"the newest checkpoint, {kept[-1]}, is from before" if kept else "no checkpoint was due before"
        message = (
            f"the meta-gradient or the parameters became non-finite at step {bad_step}; {where}; "
            "a smaller outer.lr or inner.lr, a larger damping or an outer.clip-norm may help"
        )
        raise self.ranks.reported_once(Diverged(message))

    def _validation(self) -> dict[str, float]:
        """Evaluates on the same validation tasks each time, and remembers the best; no step depends on the outcome."""
        settings = self.experiment.config.evaluation
        asked = {"split": "val", "tasks": settings.validation_tasks, "seed": settings.seed}
        result = evaluate(self.experiment, self.state.evaluated, **asked, ranks=self.ranks)  # type: ignore[arg-type]
        names = ("loss", "loss_interval") if result.accuracy is None else ("loss", "accuracy", "accuracy_interval")
        row = {f"val_{name}": getattr(result, name) for name in names}
        if settings.tracks_best:
            self._compare(row)
        return row

    def _compare(self, row: dict[str, float]) -> None:
        """Remembers a validation that is better than all before it, and counts one that is not.

        A validation that is due only because the run ends is not counted: a run of more steps would not have it.
        """
        state = self.state
        name, sign = ("val_accuracy", 1) if self.experiment.classification else ("val_loss", -1)
        if math.isfinite(row[name]) and (not state.best or sign * row[name] > sign * state.best[name]):
            state.best, state.misses = {"step": state.step, name: row[name]}, 0
        elif state.step % self.experiment.config.evaluation.every == 0:
            state.misses += 1

    def test(self, judged: Mapping[str, Tensor]) -> tuple[Evaluation, float]:
        """Judges meta-parameters on tasks of classes never trained on; returns the result, and the seconds it took."""
        settings, began = self.experiment.config.evaluation, time.perf_counter()
        with ProgressBar("testing", total=settings.tasks, hidden=not self.ranks.first) as bar:

            def progress(done: int) -> None:
                bar.update(done)
                signal = self.ranks.maximum(self.stop.signal or 0)
                if signal:
                    message = "stopped while testing; the parameters are saved, --resume tests them"
                    raise self.ranks.reported_once(Interrupted(signal, message))

            tested = evaluate(
                self.experiment,
                judged,
                split=settings.split,
                tasks=settings.tasks,
                seed=settings.seed,
                progress=progress,
                ranks=self.ranks,
            )
        return tested, time.perf_counter() - began

    def conclude(
        self,
        judged: Mapping[str, Tensor],
        tested: Evaluation,
        seconds: float,
        stamp: dict[str, Any],
        command: str,
    ) -> dict[str, Any]:
        """Draws the pictures, writes and tells the result."""
        experiment, state, directory = self.experiment, self.state, self.directory
        best = state.best if experiment.config.evaluation.keep_best else {}
        result = {
            "recipe": stamp["recipe"],
            "command": command,
            "steps": state.step,
            **({"best": best} if best else {}),  # what was tested
            "parameters": state.params["theta"].numel(),
            "test": tested.to_json(),
            "train_seconds": state.seconds,
            "test_seconds": seconds,
            "environment": stamp["environment"],
        }
        title = stamp["recipe"] or experiment.config.data.kind_name
        reports.draw_learning_curve(directory, title=f"{title}: {tested}")
        reports.draw_episodes(directory, experiment, judged)
        atomic_write(directory.result, json_bytes(result))
        chosen = f"of step {best['step']}, the best of the validations: " if best else ""
        say(f"{chosen}{tested}\nresults are in {directory.path}")
        return result


def _shown(row: dict[str, Any]) -> dict[str, str]:
    """Returns the figures of the progress bar."""
    return {label: form.format(scale * row[name]) for name, label, scale, form in _SHOWN if name in row}
