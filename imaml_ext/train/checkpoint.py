"""Checkpoints: `torch.save` files that load with `weights_only=True`, written atomically, verified when read."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imaml_ext.errors import CheckpointError
from imaml_ext.files import atomic_write
from imaml_ext.train import legacy
from imaml_ext.train.run_directory import RunDirectory, read_config

FORMAT = 3
_NAME = re.compile(r"step-(\d{8,})\.pt")


@dataclass(frozen=True)
class Checkpoint:
    """Holds all that a run needs to continue; tasks need no generator state, they are a function of (seed, step).

    `step` counts finished meta-steps. The learning rate is a function of it, so the schedule needs no state of its own.
    """

    step: int
    seed: int
    config: dict[str, Any]  # JSON form
    params: dict[str, Tensor]  # the meta-parameters: theta [N], and what is learnt beside it
    averages: dict[str, Tensor]  # exponential averages of the meta-parameters, where they are kept
    optimizer: dict[str, Any]
    metrics: dict[str, Tensor] = field(default_factory=dict)  # their sums since the last line of the log
    seconds: float = 0.0  # training time until here
    # The best validation so far, {"step": …, "val_accuracy": …} or of "val_loss"; its checkpoint is kept.
    best: dict[str, Any] = field(default_factory=dict)
    misses: int = 0  # validations since then
    format: int = FORMAT

    @property
    def evaluated(self) -> dict[str, Tensor]:
        """The meta-parameters to be judged: averages in place of what they are averages of."""
        return self.params | self.averages


def list_checkpoints(directory: Path) -> list[Path]:
    """Returns the checkpoints of a run, oldest first."""
    found = [(int(match[1]), path) for path in directory.glob("step-*.pt") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def save_checkpoint(directory: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Writes `step-….pt` whole or not at all, then removes all but the newest `keep` and the best."""
    buffer = io.BytesIO()
    torch.save(vars(checkpoint), buffer)
    path = checkpoint_path(directory, checkpoint.step)
    atomic_write(path, buffer.getvalue())
    best = checkpoint_path(directory, checkpoint.best["step"]) if checkpoint.best else path
    for old in list_checkpoints(directory)[:-keep]:
        if old != best:
            old.unlink(missing_ok=True)
    return path


def checkpoint_path(directory: Path, step: int) -> Path:
    """Returns where the checkpoint of a step lies, if it is kept."""
    return directory / f"step-{step:08d}.pt"


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint onto the CPU; CheckpointError where it is missing, or differs from its checksums."""
    try:
        # torch.load does not look at the checksums of its own zip format.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"checkpoint {path} is damaged: wrong checksum in {damaged}")
        values = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {path} does not exist") from error
    except CheckpointError:
        raise
    except Exception as error:  # zipfile, pickle and torch each have their own words for a broken file
        raise CheckpointError(f"checkpoint {path} is damaged: {_first_sentence(error)}") from error
    if isinstance(values, Mapping) and values.get("format") == legacy.CHECKPOINT_FORMAT:
        values = legacy.checkpoint_from_old(values) | {"format": FORMAT}
    if isinstance(values, Mapping):
        values = {"best": {}, "misses": 0, **values}  # older ones know of no best
    names = {item.name for item in fields(Checkpoint)}
    if not isinstance(values, Mapping) or set(values) != names or values["format"] != FORMAT:
        raise CheckpointError(f"{path} is not a training checkpoint of format {FORMAT}")
    return Checkpoint(**values)


def load_newest(directory: Path) -> Checkpoint | None:
    """Returns the newest checkpoint of a run, None where there is none yet.

    Nothing is chosen in place of a damaged one; the error says which older one could be continued from.
    """
    paths = list_checkpoints(directory)
    try:
        return load_checkpoint(paths[-1]) if paths else None
    except CheckpointError as error:
        usable = next((path for path in reversed(paths[:-1]) if _is_usable(path)), None)
        from_older = f"continue from the older {usable} with --from-checkpoint"
        raise CheckpointError(f"{error}; {from_older if usable else 'no older checkpoint is usable'}") from error


def step_of(path: Path) -> int:
    """Returns the step of a checkpoint by its name."""
    return int(path.stem.removeprefix("step-"))


def chosen_checkpoint(directory: RunDirectory) -> Checkpoint:
    """Returns the checkpoint of a run that is judged: the best where `evaluation.keep_best` is set, else the newest.

    Raises:
        CheckpointError: there is none yet, or it is damaged. RunError: there is no run.
    """
    keep_best = read_config(directory).config.evaluation.keep_best
    newest = load_newest(directory.checkpoints)
    if newest is None:
        raise CheckpointError(f"{directory.path} has no checkpoint yet")
    if not (keep_best and newest.best):
        return newest
    return load_checkpoint(checkpoint_path(directory.checkpoints, newest.best["step"]))


def _is_usable(path: Path) -> bool:
    try:
        load_checkpoint(path)
    except CheckpointError:
        return False
    return True


def _first_sentence(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
