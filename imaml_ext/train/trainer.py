"""Algorithm 1: the outer loop, from an empty run directory, or a checkpoint, to a tested set of meta-parameters."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imaml_ext._native import native
from imaml_ext._version import __version__
from imaml_ext.data import Sampler
from imaml_ext.errors import CheckpointError, ConfigError, Diverged, Interrupted, RunError
from imaml_ext.files import atomic_write, json_bytes
from imaml_ext.settings import leaves, to_json
from imaml_ext.train import reports
from imaml_ext.train.captured import CapturedStep
from imaml_ext.train.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, load_newest
from imaml_ext.train.config import TrainConfig
from imaml_ext.train.environment import environment
from imaml_ext.train.evaluation import Evaluation, evaluate
from imaml_ext.train.experiment import Experiment, build
from imaml_ext.train.job import joined
from imaml_ext.train.meta_step import EagerStep, MetaStep, State
from imaml_ext.train.metrics import MetricAccumulator
from imaml_ext.train.progress import ProgressBar, say
from imaml_ext.train.ranks import Ranks
from imaml_ext.train.run_directory import RunDirectory, check_directory
from imaml_ext.train.run_logger import RunLogger
from imaml_ext.train.schedule import learning_rate, load_optimizer_state, optimizer_state, outer_optimizer
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
_OF_THE_MACHINE = ("data.root", "data.cache_dir", "data.download", "run.threads", "theta.weights")


def train(
    config: TrainConfig,
    path: Path,
    *,
    recipe: str = "",
    command: str = "",
    stage: str = "",
    resume: bool = False,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Runs Algorithm 1 as configured, tests the result, and leaves everything in the run directory `path`.

    With `resume` the run that is there continues from its newest checkpoint, or from `checkpoint`; where there is no
    run yet, it begins. On a CPU, with the same number of threads and processes, the continued run ends with the same
    bits.

    Under torchrun every process calls this alike. Each takes its share of the tasks, rank 0 alone needs and writes the
    run directory, and all return the same.

    Args:
        recipe, command: what the run was started by, for the record. stage: of a recipe, for the user to see.

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
    directory = RunDirectory(path)
    with joined() as ranks, ExitStack() as run:
        ranks.on_first(check_directory, directory, config, resume=resume)
        ranks.first_of_machine(config.data.load)  # which may download it, or fill the cache
        begun = resume and ranks.on_first(list_checkpoints, directory.checkpoints)
        experiment, train_tasks = ranks.on_all(_prepare, config, ranks)
        start = {} if begun else ranks.on_first(_start, experiment)
        ranks.check_equal(_facts(experiment, recipe))
        here = environment(experiment.device, ranks.size)
        stamp = {"recipe": recipe, "config": to_json(config), "environment": here}
        ranks.on_first(run.enter_context, directory.opened())
        saved = ranks.on_first(_open, directory, stamp, config.run.seed, resume, checkpoint)
        state = ranks.on_all(_restore, experiment, saved, start)
        with StopRequest(patient=ranks.size > 1) as stop, RunLogger(directory) as logger:
            ranks.on_first(logger.open, step=state.step, tensorboard=config.run.tensorboard)
            take_step: MetaStep = EagerStep(experiment, train_tasks, state, ranks)
            if config.run.capture:
                take_step = CapturedStep(experiment, train_tasks, state)
            training = _Training(experiment, state, directory, logger, stop, ranks)
            training.loop(take_step, f"training, {stage}" if stage else "training")
            tested = training.test()
            return ranks.on_first(training.conclude, *tested, stamp, command)


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
    for split in ("val", "test") if config.evaluation.every else ("test",):
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


def _open(
    directory: RunDirectory, stamp: dict[str, Any], seed: int, resume: bool, path: Path | None
) -> Checkpoint | None:
    """Begins the run that is in the opened directory, or finds the checkpoint to continue it from."""
    saved = None
    if resume and path is None:
        saved = load_newest(directory.checkpoints)
    elif resume and path is not None:
        if path.resolve().parent != directory.checkpoints.resolve():
            raise RunError(f"--from-checkpoint must be one of {directory.checkpoints}, got {path}")
        saved = load_checkpoint(path)
    if not directory.holds_run():
        atomic_write(directory.config, json_bytes(stamp))
    elif saved is None:
        say(f"{directory.path} has no checkpoint yet: starting from the beginning")
    if saved is None:
        return None
    if saved.seed != seed:
        raise CheckpointError(f"the checkpoint of step {saved.step} is of seed {saved.seed}, not {seed}")
    for later in list_checkpoints(directory.checkpoints):  # dropped, as in metrics.jsonl
        if int(later.stem.removeprefix("step-")) > saved.step:
            later.unlink()
    say(f"continuing after step {saved.step}")
    return saved


@dataclass
class _Training:
    """Takes the steps of a run, validates on the way, and tests at the end."""

    experiment: Experiment
    state: State
    directory: RunDirectory
    logger: RunLogger
    stop: StopRequest
    ranks: Ranks

    def loop(self, take_step: MetaStep, title: str) -> None:
        """Takes the steps that are left, and reports and saves where it is due."""
        config, state, ranks = self.experiment.config, self.state, self.ranks
        outer, every = config.outer, config.evaluation.every
        clock = time.perf_counter()
        steps_timed, seconds_timed = 0, 0.0
        with ProgressBar(title, total=outer.steps, start=state.step, hidden=not ranks.first) as bar:
            while state.step < outer.steps:
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
                    ranks.on_first(self.logger.add, row)
                    state.metrics.clear()
                    steps_timed, seconds_timed = 0, 0.0
                bar.update(state.step, _shown(row) if report else None)
                if save:
                    ranks.on_first(self.logger.save, _checkpoint(config, state), keep=config.run.keep_checkpoints)
                if report or save:
                    clock = time.perf_counter()
                if signal:
                    message = f"stopped after step {state.step}; continue with --resume"
                    raise ranks.reported_once(Interrupted(signal, message))

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

    def _validation(self) -> dict[str, float | None]:
        """Evaluates on the same validation tasks each time; nothing of the run depends on the outcome."""
        settings = self.experiment.config.evaluation
        asked = {"split": "val", "tasks": settings.validation_tasks, "seed": settings.seed}
        result = evaluate(self.experiment, self.state.evaluated, **asked, ranks=self.ranks)  # type: ignore[arg-type]
        names = ("loss", "loss_interval") if result.accuracy is None else ("loss", "accuracy", "accuracy_interval")
        return {f"val_{name}": getattr(result, name) for name in names}

    def test(self) -> tuple[Evaluation, float]:
        """Tests on tasks of classes never seen; returns the result, and the seconds it took."""
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
                self.state.evaluated,
                split="test",
                tasks=settings.tasks,
                seed=settings.seed,
                progress=progress,
                ranks=self.ranks,
            )
        return tested, time.perf_counter() - began

    def conclude(self, tested: Evaluation, seconds: float, stamp: dict[str, Any], command: str) -> dict[str, Any]:
        """Draws the pictures, writes and tells the result."""
        experiment, state, directory = self.experiment, self.state, self.directory
        result = {
            "recipe": stamp["recipe"],
            "command": command,
            "steps": state.step,
            "parameters": state.params["theta"].numel(),
            "test": tested.to_json(),
            "train_seconds": state.seconds,
            "test_seconds": seconds,
            "environment": stamp["environment"],
        }
        title = stamp["recipe"] or experiment.config.data.kind_name
        reports.draw_learning_curve(directory, title=f"{title}: {tested}")
        reports.draw_episodes(directory, experiment, state.evaluated)
        atomic_write(directory.result, json_bytes(result))
        say(f"{tested}\nresults are in {directory.path}")
        return result


def _shown(row: dict[str, Any]) -> dict[str, str]:
    """Returns the figures of the progress bar."""
    return {label: form.format(scale * row[name]) for name, label, scale, form in _SHOWN if name in row}


def _checkpoint(config: TrainConfig, state: State) -> Checkpoint:
    return Checkpoint(
        step=state.step,
        seed=config.run.seed,
        config=to_json(config),
        params={name: value.detach() for name, value in state.params.items()},
        averages=state.averages,
        optimizer=optimizer_state(state.optimizer),
        metrics=state.metrics.state(),
        seconds=state.seconds,
    )


def _restore(experiment: Experiment, saved: Checkpoint | None, start: dict[str, Tensor]) -> State:
    """Returns the state at step 0, or that of a checkpoint."""
    config = experiment.config
    params = experiment.initial_params(start)
    if saved is not None:
        params = experiment.restored(saved.params, params)
    averages = {name: value.clone() for name, value in params.items()} if config.outer.average else {}
    optimizer = outer_optimizer(config.outer, params, static=config.run.capture)
    metrics = MetricAccumulator(experiment.device)
    if saved is None:
        return State(0, params, averages, optimizer, metrics, 0.0)
    # Older checkpoints average theta alone; such a run goes on with that.
    kept = {name: value for name, value in averages.items() if name in saved.averages}
    averages = experiment.restored(saved.averages, kept or averages)
    load_optimizer_state(optimizer, saved.optimizer)
    metrics.load_state(saved.metrics)
    return State(saved.step, params, averages, optimizer, metrics, saved.seconds)
