"""Algorithm 1: the outer loop, from an empty run directory, or a checkpoint, to a tested set of meta-parameters."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from imaml_ext import __version__
from imaml_ext.data import Sampler
from imaml_ext.errors import CheckpointError, ConfigError, Diverged, Interrupted, RunError
from imaml_ext.files import atomic_write, json_bytes
from imaml_ext.training import reports
from imaml_ext.training.captured import CapturedStep
from imaml_ext.training.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, load_newest
from imaml_ext.training.config import TrainConfig, knobs, to_json
from imaml_ext.training.environment import environment
from imaml_ext.training.evaluation import Evaluation, evaluate
from imaml_ext.training.experiment import Experiment, build, open_dataset
from imaml_ext.training.meta_step import EagerStep, MetaStep, State
from imaml_ext.training.progress import ProgressBar, say
from imaml_ext.training.ranks import Ranks, joined
from imaml_ext.training.records import Records
from imaml_ext.training.run_directory import RunDirectory, read_config
from imaml_ext.training.schedule import learning_rate, load_optimizer_state, optimizer_state, outer_optimizer
from imaml_ext.training.signals import StopRequest
from imaml_ext.training.window import Window


def train(
    config: TrainConfig,
    path: Path,
    *,
    preset: str = "",
    command: str = "",
    resume: bool = False,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Run Algorithm 1 as configured, test the result, and leave everything in the run directory `path`.

    With `resume` the run that is there continues from its newest checkpoint, or from `checkpoint`; where there is no
    run yet, it begins. On a CPU, with the same number of threads and processes, the continued run ends with the same
    bits.

    Under torchrun every process calls this alike. Each takes its share of the tasks, rank 0 alone needs and writes the
    run directory, and all return the same.

    Returns:
        The content of result.json.

    Raises:
        ConfigError, DataError: what was asked for cannot be run; nothing has been written.
        RunError: the directory holds another run or cannot be written, or a checkpoint is damaged; the processes do not
            agree on what to run, or one of them has ended.
        Diverged: the meta-gradient or the parameters became non-finite.
        Interrupted: SIGINT or SIGTERM came, to any of the processes; the state is saved.
        ReportedElsewhere: one of these, which another process raises.
    """
    directory = RunDirectory(path)
    with joined() as ranks, ExitStack() as run:
        ranks.on_first(check_directory, directory, config, resume=resume)
        ranks.first_of_machine(open_dataset, config.data)  # which may download it, or fill the cache
        begun = resume and directory.holds_run()
        experiment, train_tasks = ranks.together(_prepare, config, ranks, begun=begun)
        ranks.agree(_facts(experiment, preset))
        stamp = {
            "preset": preset,
            "config": to_json(config),
            "environment": environment(experiment.device, ranks.size),
        }
        ranks.on_first(run.enter_context, directory.opened())
        saved = ranks.on_first(_open, directory, stamp, config, resume=resume, checkpoint=checkpoint)
        state = ranks.together(_restore, experiment, saved)
        with StopRequest(patient=ranks.size > 1) as stop, Records(directory) as records:
            ranks.on_first(records.open, step=state.step, tensorboard=config.run.tensorboard)
            take_step = ranks.together(_meta_step, experiment, train_tasks, state, ranks)
            _outer_loop(experiment, take_step, state, directory, records, stop, ranks)
            tested = _test(experiment, state, stop, ranks)
            return ranks.on_first(_conclude, experiment, state, directory, *tested, stamp=stamp, command=command)


def _prepare(config: TrainConfig, ranks: Ranks, *, begun: bool) -> tuple[Experiment, Sampler]:
    """The experiment and its training tasks; all that can be wrong with them is found before anything is written."""
    if config.outer.meta_batch < ranks.size:
        raise ConfigError(
            f"outer.meta-batch must be at least {ranks.size}, a task for every process, got {config.outer.meta_batch}"
        )
    ranks.use_device(config.run.device)
    experiment = build(config)
    if config.run.capture:
        if ranks.size > 1:
            raise ConfigError(f"run.capture must be left out with several processes, got {ranks.size}")
        if experiment.device.type != "cuda":
            raise ConfigError(f"run.device must be a CUDA device with run.capture, got {config.run.device!r}")
    train_tasks = experiment.sampler("train", tasks=config.outer.meta_batch, seed=config.run.seed, augmented=True)
    for split in ("val", "test") if config.evaluation.every else ("test",):
        experiment.sampler(split, tasks=config.evaluation.tasks, seed=config.evaluation.seed)
    if not begun:
        experiment.initial_theta()  # which may be read from a file
    return experiment, train_tasks


def _facts(experiment: Experiment, preset: str) -> dict[str, object]:
    """What the processes of a job must have in common; where the data lie is each machine's own affair."""
    return {
        "the version of imaml_ext": __version__,
        "the version of torch": str(torch.__version__),
        "the preset": preset,
        **{name: value for name, value in knobs(experiment.config) if name not in _OF_THE_MACHINE},
        "the kind of device": experiment.device.type,
    }


def _open(
    directory: RunDirectory, stamp: dict[str, Any], config: TrainConfig, *, resume: bool, checkpoint: Path | None
) -> Checkpoint | None:
    """Begin the run that is in the opened directory, or find the checkpoint to continue it from."""
    saved = _load(directory, config, checkpoint) if resume else None
    if not directory.holds_run():
        atomic_write(directory.config, json_bytes(stamp))
    _drop_checkpoints_after(directory, saved)
    if saved is not None:
        say(f"continuing after step {saved.step}")
    return saved


def _meta_step(experiment: Experiment, tasks: Sampler, state: State, ranks: Ranks) -> MetaStep:
    if experiment.config.run.capture:
        return CapturedStep(experiment, tasks, state)
    return EagerStep(experiment, tasks, state, ranks)


def _outer_loop(
    experiment: Experiment,
    take_step: MetaStep,
    state: State,
    directory: RunDirectory,
    records: Records,
    stop: StopRequest,
    ranks: Ranks,
) -> None:
    config = experiment.config
    outer, every = config.outer, config.evaluation.every
    clock = time.perf_counter()
    steps_timed, seconds_timed = 0, 0.0
    with ProgressBar("training", total=outer.steps, start=state.step, hidden=not ranks.first) as bar:
        while state.step < outer.steps:
            lr = learning_rate(outer, state.step)
            take_step()

            # From here on the host; the device is waited for only where one of these is due.
            validate = bool(every) and (state.step % every == 0 or state.step == outer.steps)
            report = validate or state.step % config.run.log_every == 0 or state.step == outer.steps
            signal = ranks.greatest(stop.signal or 0)
            save = state.step % config.run.checkpoint_every == 0 or state.step == outer.steps or bool(signal)
            steps_timed += 1
            if report or save:
                bad_step = state.window.first_nonfinite_step()
                if bad_step is not None:
                    raise ranks.once(_diverged(bad_step, directory))
                now = time.perf_counter()
                seconds_timed += now - clock
                state.seconds += now - clock
            if report:
                row: dict[str, Any] = {"step": state.step, "lr": lr, **state.window.means()}
                if validate:
                    row |= _validation(experiment, state, ranks)
                row["tasks_per_second"] = steps_timed * outer.meta_batch / seconds_timed
                row["seconds"] = state.seconds
                ranks.on_first(records.add, row)
                bar.update(state.step, _shown(row))
                state.window.clear()
                steps_timed, seconds_timed = 0, 0.0
            else:
                bar.update(state.step)
            if save:
                ranks.on_first(records.save, _checkpoint(config, state), keep=config.run.keep_checkpoints)
            if report or save:
                clock = time.perf_counter()
            if signal:
                raise ranks.once(Interrupted(signal, f"stopped after step {state.step}; continue with --resume"))


def _validation(experiment: Experiment, state: State, ranks: Ranks) -> dict[str, float | None]:
    """The same validation tasks each time; nothing of the run depends on the outcome."""
    settings = experiment.config.evaluation
    result = evaluate(
        experiment, state.evaluated, split="val", tasks=settings.validation_tasks, seed=settings.seed, ranks=ranks
    )
    if result.accuracy is None:
        return {"val_loss": result.loss, "val_loss_interval": result.loss_interval}
    return {
        "val_loss": result.loss,
        "val_accuracy": result.accuracy,
        "val_accuracy_interval": result.accuracy_interval,
    }


def _test(experiment: Experiment, state: State, stop: StopRequest, ranks: Ranks) -> tuple[Evaluation, float]:
    """Test on tasks of classes never seen; the result, and the seconds it took."""
    settings = experiment.config.evaluation
    began = time.perf_counter()
    with ProgressBar("testing", total=settings.tasks, hidden=not ranks.first) as bar:

        def progress(done: int) -> None:
            bar.update(done)
            signal = ranks.greatest(stop.signal or 0)
            if signal:
                message = "stopped while testing; the parameters are saved, --resume tests them"
                raise ranks.once(Interrupted(signal, message))

        tested = evaluate(
            experiment,
            state.evaluated,
            split="test",
            tasks=settings.tasks,
            seed=settings.seed,
            progress=progress,
            ranks=ranks,
        )
    return tested, time.perf_counter() - began


def _conclude(
    experiment: Experiment,
    state: State,
    directory: RunDirectory,
    tested: Evaluation,
    test_seconds: float,
    *,
    stamp: dict[str, Any],
    command: str,
) -> dict[str, Any]:
    """Draw the pictures, write and tell the result."""
    result = {
        "preset": stamp["preset"],
        "command": command,
        "steps": state.step,
        "parameters": state.theta.numel(),
        "test": tested.to_json(),
        "train_seconds": state.seconds,
        "test_seconds": test_seconds,
        "environment": stamp["environment"],
    }
    title = stamp["preset"] or experiment.config.data.name
    reports.draw_learning_curve(directory, title=f"{title}: {tested}")
    reports.draw_episodes(directory, experiment, state.evaluated)
    atomic_write(directory.result, json_bytes(result))
    say(str(tested))
    say(f"results are in {directory.path}")
    return result


def _shown(row: dict[str, Any]) -> dict[str, str]:
    """The figures of the progress bar."""
    shown = {"loss": f"{row['query_loss']:.3f}"}
    if "query_accuracy" in row:
        shown["accuracy"] = f"{100 * row['query_accuracy']:.1f} %"
    if "val_accuracy" in row:
        shown["validation"] = f"{100 * row['val_accuracy']:.1f} %"
    if "solve_residual" in row:
        shown["residual"] = f"{row['solve_residual']:.1e}"
    if "lam" in row:
        shown["lambda"] = f"{row['lam']:.3g}"
    shown["speed"] = f"{row['tasks_per_second']:.1f} tasks/s"
    return shown


def _diverged(bad_step: int, directory: RunDirectory) -> Diverged:
    """A meta-gradient that is not finite ends the run before it reaches a file."""
    kept = list_checkpoints(directory.checkpoints)
    where = f"the newest checkpoint, {kept[-1]}, is from before" if kept else "no checkpoint was due before"
    return Diverged(
        f"the meta-gradient or the parameters became non-finite at step {bad_step}; {where}; "
        "a smaller outer.lr or inner.lr, a larger meta.damping or an outer.clip-norm may help"
    )


def _checkpoint(config: TrainConfig, state: State) -> Checkpoint:
    return Checkpoint(
        step=state.step,
        seed=config.run.seed,
        config=to_json(config),
        theta=state.theta.detach(),
        average=state.average,
        log_lam=None if state.lam is None else state.lam.log.detach(),
        optimizer=optimizer_state(state.optimizer),
        window=state.window.state(),
        seconds=state.seconds,
    )


def _restore(experiment: Experiment, saved: Checkpoint | None) -> State:
    """The state at step 0, or that of a checkpoint."""
    outer = experiment.config.outer
    theta = experiment.initial_theta() if saved is None else experiment.empty_theta()  # [N]
    average = theta.clone() if outer.average else None
    lam = experiment.lam
    log_lam = None if lam is None else lam.log
    optimizer = outer_optimizer(outer, theta, log_lam, static=experiment.config.run.capture)
    window = Window(experiment.device)
    if saved is None:
        return State(0, theta, optimizer, average, lam, window, 0.0)
    if saved.theta.shape != theta.shape or saved.theta.dtype != theta.dtype:
        raise CheckpointError(
            f"the checkpoint of step {saved.step} holds {saved.theta.numel()} parameters of {saved.theta.dtype}, "
            f"the model has {theta.numel()} of {theta.dtype}"
        )
    theta.copy_(saved.theta)
    if average is not None and saved.average is not None:
        average.copy_(saved.average)
    experiment.restore_lam(saved.log_lam)
    load_optimizer_state(optimizer, saved.optimizer)
    window.load_state(saved.window)
    return State(saved.step, theta, optimizer, average, lam, window, saved.seconds)


def _load(directory: RunDirectory, config: TrainConfig, path: Path | None) -> Checkpoint | None:
    if path is None:
        saved = load_newest(directory.checkpoints)
    elif path.resolve().parent == directory.checkpoints.resolve():
        saved = load_checkpoint(path)
    else:
        raise RunError(f"--checkpoint must be one of {directory.checkpoints}, got {path}")
    if saved is None and directory.holds_run():
        say(f"{directory.path} has no checkpoint yet: starting from the beginning")
    if saved is not None and saved.seed != config.run.seed:
        raise CheckpointError(f"the checkpoint of step {saved.step} is of seed {saved.seed}, not {config.run.seed}")
    return saved


def _drop_checkpoints_after(directory: RunDirectory, saved: Checkpoint | None) -> None:
    """Continuing from an older checkpoint, what was recorded behind it is dropped, as in metrics.jsonl."""
    for path in list_checkpoints(directory.checkpoints):
        if saved is not None and int(path.stem.removeprefix("step-")) > saved.step:
            path.unlink()


# Knobs that a resumed run may set anew: they change where and how it runs, not what comes out.
_FREE_ON_RESUME = ("data.root", "data.cache_dir", "data.download", "evaluation.", "run.")
_FIXED_OF_RUN = ("run.seed", "run.dtype")

# Knobs in which the processes of a job may differ.
_OF_THE_MACHINE = ("data.root", "data.cache_dir", "data.download", "run.threads")


def check_directory(directory: RunDirectory, config: TrainConfig, *, resume: bool) -> None:
    """A run never writes over another one, and never continues one under other settings.

    Raises:
        RunError: the directory is not empty, or with `resume` holds something other than a run.
        ConfigError: with `resume`, its run has other settings.
    """
    if directory.is_empty():
        return
    if not resume:
        raise RunError(f"{directory.path} is not empty: continue its run with --resume, or give another --run-dir")
    if not directory.holds_run():
        raise RunError(f"{directory.path} holds no run to resume (it has no config.json); give another --run-dir")
    recorded = dict(knobs(read_config(directory).config))
    for name, value in knobs(config):
        free = name.startswith(_FREE_ON_RESUME) and name not in _FIXED_OF_RUN
        if value != recorded[name] and not free:
            raise ConfigError(
                f"a resumed run keeps its settings: {name} was {recorded[name]!r} in {directory.path}, now {value!r}"
            )
