"""What the runs in some folders have reached, and where they differ: for a list, a comparison, a plot of several."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imaml_ext.errors import RunError
from imaml_ext.settings import leaves
from imaml_ext.train.checkpoint import list_checkpoints, step_of
from imaml_ext.train.config import TrainConfig
from imaml_ext.train.run_directory import RunDirectory, read_config, read_metrics, read_result, tested_step


@dataclass(frozen=True)
class Figure:
    """Holds a mean over tasks with its 95 % interval: of the accuracy, a fraction, or of the loss in regression."""

    quantity: str
    value: float
    interval: float
    step: int  # after which the parameters were judged

    def __str__(self) -> str:
        if self.quantity == "accuracy":
            return f"{100 * self.value:.2f} ± {100 * self.interval:.2f} %"
        return f"MSE {self.value:.4f} ± {self.interval:.4f}"


@dataclass(frozen=True)
class Overview:
    """Holds what is known of a run without its data or its parameters.

    Attributes:
        state: "running", where a process is training in its directory; "finished", where it was tested; "stopped".
        step: finished meta-steps. seconds: of training until then; None where no line is logged yet.
        validation: of the best step where the run keeps the best, else the last one.
    """

    path: Path
    recipe: str
    config: TrainConfig
    state: str
    step: int
    validation: Figure | None
    test: Figure | None
    seconds: float | None

    def to_json(self) -> dict[str, Any]:
        figures = {
            name: figure and vars(figure) for name, figure in (("validation", self.validation), ("test", self.test))
        }
        known = {"path": str(self.path), "recipe": self.recipe, "state": self.state, "step": self.step}
        return {**known, "steps": self.config.outer.steps, **figures, "seconds": self.seconds}


def overview(path: Path) -> Overview:
    """Reads what a run has reached, or the last stage so far of a recipe of several.

    Raises:
        RunError: there is no run, or one of its files is damaged.
    """
    directory = RunDirectory.of_last_stage(path)
    recorded, result, rows = read_config(directory), read_result(directory), read_metrics(directory.metrics)
    config, quantity = recorded.config, "accuracy" if recorded.config.classification else "loss"
    try:
        found = [_figure(row, row["step"], f"val_{quantity}") for row in rows if row.get(f"val_{quantity}") is not None]
        test = None if result is None else _figure(result["test"], tested_step(result), quantity)
        seconds = rows[-1]["seconds"] if rows else None
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{directory.path} is damaged: its figures cannot be read ({error!r})") from error
    validation = found[-1] if found else None
    if found and config.evaluation.keep_best:
        validation = max(found, key=lambda figure: figure.value if quantity == "accuracy" else -figure.value)
    reached = [row["step"] for row in rows] + [step_of(path) for path in list_checkpoints(directory.checkpoints)]
    state = "running" if directory.is_held() else "finished" if test else "stopped"
    step = max(reached, default=0)
    return Overview(directory.path, recorded.recipe, config, state, step, validation, test, seconds)


def _figure(values: Mapping[str, Any], step: int, name: str) -> Figure:
    value, interval = (values[key] if values[key] is not None else math.nan for key in (name, f"{name}_interval"))
    return Figure(name.removeprefix("val_"), value, interval, step)


def find_runs(folder: Path, on_error: Callable[[OSError], None]) -> Iterator[Path]:
    """Finds the directories below a folder, itself included, that hold a config.json; in the order of their names.

    Args:
        on_error: is told of a folder that cannot be read; those beside it are searched all the same.
    """
    for place, folders, files in os.walk(folder, onerror=on_error):
        folders.sort(key=_in_order)
        if "config.json" in files:
            folders[:] = [name for name in folders if name not in ("checkpoints", "tensorboard")]
            yield Path(place)


def _in_order(name: str) -> list[tuple[int, str]]:
    """Puts 10-last behind 9-first."""
    return [(int(digits or 0), rest) for digits, rest in re.findall(r"(\d*)(\D*)", name)]


def differing(runs: Sequence[Overview]) -> dict[str, list[Any]]:
    """Returns the settings that are not the same in all runs, {path: values}; `...` where a run has no such setting."""
    paths = [{name: str(value) for name, value in leaves(run.config) if isinstance(value, Path)} for run in runs]
    settings = [dict(leaves(run.config)) | own for run, own in zip(runs, paths, strict=True)]
    names = dict.fromkeys(name for each in settings for name in each)
    values = {name: [each.get(name, ...) for each in settings] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}
