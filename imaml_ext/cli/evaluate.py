"""`imaml evaluate`: a run, or pretrained weights, on tasks that they were never trained on."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from imaml_ext.cli.parser import parse
from imaml_ext.errors import ConfigError
from imaml_ext.train.ranks import Ranks

# The settings that options change: those of a group that have the option's name, and another one.
_GROUPS = {"evaluation": ("tasks", "seed", "inner_steps", "meta_batch"), "tasks": ("ways", "shots"), "run": ("device",)}
_PATHS = {name: f"{group}.{name}" for group, names in _GROUPS.items() for name in names} | {"data_root": "data.root"}


@dataclass(frozen=True)
class Options:
    """Test the parameters of a run, or pretrained ones, on tasks that they were never trained on."""

    run: tyro.conf.Positional[Path | None] = None  # The run directory.
    # In place of a run: the name of weights that come with the package, or a file NAME.safetensors.
    pretrained: str | None = None
    checkpoint: Path | None = None  # A checkpoint file; unset: the run's newest.
    tasks: int | None = None  # Number of tasks; unset: as in the run.
    split: Literal["test", "val", "train"] = "test"  # The classes that the tasks are made of.
    seed: int | None = None  # Seed of the tasks; unset: evaluation.seed of the run.
    # Classes per task, by a last layer that they share (with --pretrained); unset: as in training.
    ways: int | None = None
    shots: int | None = None  # Examples per class that are adapted to; unset: as in the run.
    inner_steps: int | None = None  # Inner steps of the adaptation; unset: as in the run.
    meta_batch: int | None = None  # Tasks at a time; unset: as in the run.
    device: str | None = None  # Device; unset: as in the run.
    data_root: Path | None = None  # Folder of the data set's files; unset: as in the run.
    # Also train the network on each task alone, by this many steps of Adam, and test it on the same tasks.
    from_scratch: int | None = None
    scratch_lr: float = 0.003  # Learning rate of these steps.
    output: Path | None = None  # Write the result to this JSON file too.


def run(arguments: list[str], ranks: Ranks) -> int:
    options = parse(Options, arguments, prog="imaml evaluate")
    if (options.run is None) == (options.pretrained is None):
        raise ConfigError("evaluate needs a run directory or --pretrained NAME, and not both")
    if options.run is None and options.checkpoint is not None:
        raise ConfigError("--checkpoint is of a run directory: it cannot be given with --pretrained")
    changes = {path: getattr(options, name) for name, path in _PATHS.items() if getattr(options, name) is not None}
    if options.shots is not None:
        changes["tasks.train_shots"] = None
    from imaml_ext.files import atomic_write, json_bytes
    from imaml_ext.train.environment import environment
    from imaml_ext.train.evaluation import FromScratch, evaluate_pretrained, evaluate_run

    scratch = None if options.from_scratch is None else FromScratch(options.from_scratch, options.scratch_lr)
    if options.run is not None:
        result = evaluate_run(
            options.run, changes, checkpoint=options.checkpoint, split=options.split, from_scratch=scratch
        )
    else:
        result = evaluate_pretrained(str(options.pretrained), changes, split=options.split, from_scratch=scratch)
    if options.output is not None:
        command = shlex.join(["imaml", "evaluate", *arguments])
        stamp = {"command": command, "environment": environment(result.device)}
        atomic_write(options.output, json_bytes(result.to_json() | stamp))
    print(result)
    return 0
