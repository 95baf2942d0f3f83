"""`imaml evaluate`: a run, or pretrained weights, on tasks that they were never trained on."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from imaml_ext.cli.old_flags import renamed
from imaml_ext.cli.parser import last_value, parse
from imaml_ext.cli.table import table
from imaml_ext.data import DataSource, Glyphs
from imaml_ext.errors import ConfigError, EvaluationStopped, RunError
from imaml_ext.settings import Settings
from imaml_ext.train.ranks import Ranks

if TYPE_CHECKING:
    from imaml_ext.train.evaluation import Evaluation

# The settings that options change: those of a group that have the option's name.
_GROUPS = {
    "evaluation": ("tasks", "seed", "inner_steps", "meta_batch"),
    "tasks": ("ways", "shots", "queries"),
    "run": ("device",),
}
_PATHS = {name: f"{group}.{name}" for group, names in _GROUPS.items() for name in names}
_LINES = 40  # most lines of the table of classes


@dataclass(frozen=True)
class Data(Settings):
    """Says what the tasks are made of."""

    # Data set; unset: the one of the training. A folder of pictures is read as those of the training were.
    data: DataSource = field(default_factory=Glyphs)


@dataclass(frozen=True)
class Options:
    """Test the parameters of a run, or pretrained ones, on tasks that they were never trained on."""

    run: tyro.conf.Positional[Path | None] = None  # The run directory.
    # In place of a run: the name of weights that come with the package, or a file NAME.safetensors.
    pretrained: str | None = None
    on: Annotated[Data, tyro.conf.arg(name="")] = field(default_factory=Data)
    checkpoint: Path | None = None  # A checkpoint file; unset: the run's newest.
    tasks: int | None = None  # Number of tasks; unset: as in the run.
    split: Literal["test", "val", "train"] = "test"  # The classes that the tasks are made of.
    seed: int | None = None  # Seed of the tasks; unset: evaluation.seed of the run.
    ways: int | None = None  # Classes per task (with --pretrained); unset: as in training.
    shots: int | None = None  # Examples per class that are adapted to; unset: as in the run.
    queries: int | None = None  # Query examples per class; unset: as in the run.
    # Judge the queries of a task together, as the literature does; else each alone beside the support set.
    transductive: bool = True
    # Show the accuracy of every class too, the lowest first.
    per_class: tyro.conf.FlagCreatePairsOff[bool] = False
    inner_steps: int | None = None  # Inner steps of the adaptation; unset: as in the run.
    meta_batch: int | None = None  # Tasks at a time; unset: as in the run.
    device: str | None = None  # Device; unset: as in the run.
    # Also train the network on each task alone, by this many steps of Adam, and test it on the same tasks.
    from_scratch: int | None = None
    scratch_lr: float = 0.003  # Learning rate of these steps.
    output: Path | None = None  # Write the result to this JSON file too.


def run(arguments: list[str], ranks: Ranks) -> int:
    words = renamed(arguments, command="evaluate")
    run_read, known, default = _data(words)
    options = parse(Options, words, prog="imaml evaluate", default=Options(on=Data(default)))
    if (options.run is None) == (options.pretrained is None):
        raise ConfigError("evaluate needs a run directory or --pretrained NAME, and not both")
    if options.run is not None and run_read not in (None, options.run):
        raise ConfigError(f"{run_read} and {options.run} are both runs: give the one to evaluate first")
    if options.run is None and options.checkpoint is not None:
        raise ConfigError("--checkpoint is of a run directory: it cannot be given with --pretrained")
    changes = {path: getattr(options, name) for name, path in _PATHS.items() if getattr(options, name) is not None}
    if options.on.data != known:
        changes["data"] = options.on.data
    if options.shots is not None:
        changes["tasks.train_shots"] = None
    from imaml_ext.train.evaluation import FromScratch, evaluate_pretrained, evaluate_run

    how: dict[str, Any] = {name: getattr(options, name) for name in ("split", "transductive", "per_class")}
    if options.from_scratch is not None:
        how["from_scratch"] = FromScratch(options.from_scratch, options.scratch_lr)
    try:
        if options.run is not None:
            result = evaluate_run(options.run, changes, checkpoint=options.checkpoint, **how)
        else:
            result = evaluate_pretrained(str(options.pretrained), changes, **how)
    except EvaluationStopped as stopped:
        if stopped.so_far is None:
            raise
        print(f"imaml: {stopped}", file=sys.stderr, flush=True)
        _show(stopped.so_far, options.output, arguments)
        return stopped.exit_code
    _show(result, options.output, arguments)
    return 0


def _show(result: Evaluation, output: Path | None, arguments: list[str]) -> None:
    """Prints a result, and writes it to a file where that is asked for."""
    from imaml_ext.files import atomic_write, json_bytes
    from imaml_ext.train.environment import environment

    print(result)
    if result.per_class is not None:
        rows = sorted((accuracy, name, queries) for name, (accuracy, queries) in result.per_class.items())
        print(f"\n{len(rows):,} classes, the lowest accuracy first:" if len(rows) > _LINES else "")
        columns = [(name, f"{100 * accuracy:.1f} %", f"{queries:,}") for accuracy, name, queries in rows[:_LINES]]
        print(table(("class", "accuracy", "queries"), columns, right=(1, 2)))
    if output is not None:  # last, so that a file that cannot be written costs no result
        command = shlex.join(["imaml", "evaluate", *arguments])
        stamp = {"command": command, "environment": environment(result.device)}
        atomic_write(output, json_bytes(result.to_json() | stamp))


def _data(words: Sequence[str]) -> tuple[Path | None, DataSource | None, DataSource]:
    """The run that a command line names, the data set that it or the weights were trained on, and the data set whose
    settings are the defaults of the options.

    The second is None where there is nothing to evaluate: the command line is read as a whole, and then refused.
    """
    from imaml_ext.pretrained import read_weights
    from imaml_ext.train.evaluation import config_of
    from imaml_ext.train.export import run_weights
    from imaml_ext.train.run_directory import RunDirectory, read_config

    pretrained = last_value(words, "--pretrained")
    named = (Path(word) for word in words if not word.startswith("-"))
    run = next((path for path in named if RunDirectory.of_last_stage(path).holds_run()), None)
    try:
        if pretrained is not None:
            run, known = None, config_of(read_weights(pretrained)).data
        elif run is not None:
            known = read_config(RunDirectory.of_last_stage(run)).config.data
        else:
            return None, None, Glyphs()
    except RunError:
        return None, None, Glyphs()
    name = last_value(words, "--data")
    if name is None or name == known.kind_name or name not in DataSource.kinds:
        return run, known, known
    chosen = DataSource.kind(name)()
    if hasattr(chosen, "pictures"):
        weights = read_weights(str(pretrained)) if run is None else run_weights(run)
        if weights.card.reading is not None:
            chosen = dataclasses.replace(chosen, pictures=weights.card.reading)
    return run, known, chosen
