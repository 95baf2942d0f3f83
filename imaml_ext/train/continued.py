"""How a run is continued: what a checkpoint holds of its state, which one it goes on from, and the state again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from imaml_ext.errors import CheckpointError, RunError
from imaml_ext.progress import say
from imaml_ext.settings import to_json
from imaml_ext.train.checkpoint import (
    Checkpoint,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    step_of,
)
from imaml_ext.train.config import TrainConfig
from imaml_ext.train.experiment import Experiment
from imaml_ext.train.meta_step import State
from imaml_ext.train.metrics import MetricAccumulator
from imaml_ext.train.run_directory import RunDirectory, read_config, record_config
from imaml_ext.train.schedule import load_optimizer_state, optimizer_state, outer_optimizer


def opened(
    directory: RunDirectory, config: TrainConfig, stamp: dict[str, Any], resume: bool, path: Path | None
) -> Checkpoint | None:
    """Begins the run that is in the opened directory, or finds the checkpoint to continue it from."""
    saved, seed = None, config.run.seed
    if resume and path is None:
        saved = load_newest(directory.checkpoints)
    elif resume and path is not None:
        if path.resolve().parent != directory.checkpoints.resolve():
            raise RunError(f"--from-checkpoint must be one of {directory.checkpoints}, got {path}")
        saved = load_checkpoint(path)
    if saved is not None and saved.seed != seed:
        raise CheckpointError(f"the checkpoint of step {saved.step} is of seed {saved.seed}, not {seed}")
    begun = directory.holds_run()
    if not begun or read_config(directory).config != config:  # some settings may be set anew on the way
        record_config(directory, stamp)
    if saved is None:
        if begun:
            say(f"{directory.path} has no checkpoint yet: starting from the beginning")
        return None
    for later in list_checkpoints(directory.checkpoints):  # dropped, as in metrics.jsonl
        if step_of(later) > saved.step:
            later.unlink()
    say(f"continuing after step {saved.step}")
    if saved.best and not checkpoint_path(directory.checkpoints, saved.best["step"]).is_file():
        say(
            f"the best checkpoint until then, of step {saved.best['step']}, is not kept any more: the best is one since"
        )
        saved = replace(saved, best={}, misses=0)
    return saved


def checkpoint_of(config: TrainConfig, state: State) -> Checkpoint:
    """Returns all of a state that a run needs to continue."""
    return Checkpoint(
        step=state.step,
        seed=config.run.seed,
        config=to_json(config),
        params={name: value.detach() for name, value in state.params.items()},
        averages=state.averages,
        optimizer=optimizer_state(state.optimizer),
        metrics=state.metrics.state(),
        seconds=state.seconds,
        best=state.best,
        misses=state.misses,
    )


def restored(experiment: Experiment, saved: Checkpoint | None, start: dict[str, Tensor]) -> State:
    """Returns the state at step 0, or that of a checkpoint."""
    config = experiment.config
    params = experiment.initial_params(start)
    if saved is not None:
        params = experiment.restored(saved.params, params)
    moved = {name: value for name, value in params.items() if name not in experiment.algorithm.carried}
    averages = {name: value.clone() for name, value in moved.items()} if config.outer.average else {}
    optimizer = outer_optimizer(config.outer, moved, static=config.run.capture)
    metrics = MetricAccumulator(experiment.device)
    if saved is None:
        return State(0, params, averages, optimizer, metrics, 0.0)
    # Older checkpoints average theta alone; such a run goes on with that.
    kept = {name: value for name, value in averages.items() if name in saved.averages}
    averages = experiment.restored(saved.averages, kept or averages)
    load_optimizer_state(optimizer, saved.optimizer)
    metrics.load_state(saved.metrics)
    best, misses = (saved.best, saved.misses) if config.evaluation.tracks_best else ({}, 0)
    return State(saved.step, params, averages, optimizer, metrics, saved.seconds, best, misses)
