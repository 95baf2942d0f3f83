"""Experiments that train: a cell is a configuration with a run directory, begun, continued, or finished already."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from imaml_ext.errors import ConfigError, Diverged, RunError
from imaml_ext.files import atomic_write, json_bytes
from imaml_ext.reproduce.options import ImageOptions, TrainedOptions
from imaml_ext.reproduce.results import output_folder, write_results
from imaml_ext.training import reports
from imaml_ext.training.config import TrainConfig, to_json, with_knobs
from imaml_ext.training.experiment import resolve_device
from imaml_ext.training.progress import say
from imaml_ext.training.run_directory import RunDirectory, read_config, read_metrics
from imaml_ext.training.trainer import check_directory, train


@dataclass(frozen=True)
class Cell:
    """A name, such as "5w1s/maml", which is also the run directory's, and what is trained in it."""

    name: str
    config: TrainConfig


@dataclass(frozen=True)
class Outcome:
    """What a finished cell has left."""

    directory: RunDirectory
    config: TrainConfig
    result: Mapping[str, Any]  # of result.json, or of diverged.json

    @property
    def test(self) -> Mapping[str, Any] | None:
        """The test of the trained parameters, None of a run that diverged."""
        return self.result.get("test")

    @property
    def accuracy(self) -> str:
        """In percent, with its 95 % interval."""
        if self.test is None:
            return "diverged"
        return f"{100 * self.test['accuracy']:.2f} ± {100 * self.test['accuracy_interval']:.2f}"

    def to_json(self) -> dict[str, Any]:
        return {**self.result, "config": to_json(self.config)}


def runs_folder(options: TrainedOptions) -> Path:
    return options.output_dir / "runs" / options.budget


def train_cells(
    cells: Sequence[Cell],
    options: TrainedOptions,
    *,
    command: str,
    draw: Callable[[Mapping[str, Outcome]], None],
) -> None:
    """Train the cells chosen that are not finished, and draw what is finished after each of them.

    A cell that was interrupted continues from its newest checkpoint. One whose meta-gradient became non-finite is
    finished too: that is its result.

    Args:
        cells: all cells of the experiment. draw: called with the outcomes of those that are finished.

    Raises:
        ConfigError: no cell has a name asked for, or a run directory holds a run with other settings.
        RunError, DataError, Interrupted: as `imaml_ext.training.train`.
    """
    chosen = [] if options.draw_only else _choose(cells, options.cells)
    output_folder(options.output_dir)
    for number, cell in enumerate(chosen, 1):
        directory = RunDirectory(runs_folder(options) / cell.name)
        title = f"{options.name} {number}/{len(chosen)}: {cell.name}"
        check_directory(directory, cell.config, resume=True)
        if _finished(directory) is not None:
            say(f"{title} is finished")
            continue
        say(title)
        try:
            train(cell.config, directory.path, preset=cell.name, command=command, resume=True)
        except Diverged as error:
            say(str(error))
            atomic_write(_diverged(directory), json_bytes({"diverged": str(error)}))
        draw(outcomes(cells, options))
    found = outcomes(cells, options)
    if not found:
        raise RunError(f"{runs_folder(options)} holds no finished run of this experiment: there is nothing to draw")
    draw(found)
    say(f"{len(found)} of {len(cells)} cells are finished; results are in {options.output_dir}")


def outcomes(cells: Sequence[Cell], options: TrainedOptions) -> dict[str, Outcome]:
    """The finished cells by name, in the order of `cells`.

    Raises:
        RunError: a file of theirs is damaged.
    """
    found = {}
    for cell in cells:
        directory = RunDirectory(runs_folder(options) / cell.name)
        result = _finished(directory)
        if result is not None:
            found[cell.name] = Outcome(directory, read_config(directory).config, result)
    return found


def write_outcomes(options: TrainedOptions, found: Mapping[str, Outcome], **content: Any) -> None:
    """NAME.json with every finished cell: its test, durations, configuration, versions and hardware."""
    path = options.output_dir / f"{options.name}.json"
    cells = {name: outcome.to_json() for name, outcome in found.items()}
    write_results(path, options, resolve_device(options.device), **content, cells=cells)


def common_knobs(options: TrainedOptions) -> dict[str, Any]:
    """Knobs that every cell takes from the options of the experiment."""
    knobs: dict[str, Any] = {"run.device": options.device, "run.threads": options.threads, "run.seed": options.seed}
    if isinstance(options, ImageOptions):
        knobs |= {"data.name": options.data, "data.root": options.data_root}
    return knobs


def cell(name: str, base: TrainConfig, *layers: Mapping[str, Any]) -> Cell:
    """A cell whose configuration is `base` with layers of knobs over it, the later ones on top."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= layer
    return Cell(name, with_knobs(base, merged))


def _choose(cells: Sequence[Cell], names: Sequence[str]) -> list[Cell]:
    """The cells that are named, each by its whole name or by a beginning of it that ends before a "/"."""
    for name in names:
        if not any(_is_of(cell.name, name) for cell in cells):
            known = ", ".join(cell.name for cell in cells)
            raise ConfigError(f"--cells: no cell is called {name!r}; there are: {known}")
    return [cell for cell in cells if not names or any(_is_of(cell.name, name) for name in names)]


def _is_of(cell: str, name: str) -> bool:
    return cell == name or cell.startswith(name.rstrip("/") + "/")


def _diverged(directory: RunDirectory) -> Path:
    return directory.path / "diverged.json"


def _finished(directory: RunDirectory) -> Mapping[str, Any] | None:
    """The result of a run, None where there is none yet.

    Raises:
        RunError: the file is damaged.
    """
    for path in (directory.result, _diverged(directory)):
        try:
            result = json.loads(path.read_text())
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be read ({error}): remove it, and its cell is tested again") from error
        if isinstance(result, dict):
            return result
        raise RunError(f"{path} holds no result: remove it, and its cell is tested again")
    return None


def draw_learning_curve(axis: Axes, outcome: Outcome, metric: str, **style: Any) -> None:
    """The running mean of a metric over training, from metrics.jsonl; of an accuracy, the error in percent."""
    steps, values = reports.column(read_metrics(outcome.directory.metrics), metric)
    if len(values):
        mean = reports.running_mean(values, max(1, len(values) // 25))
        axis.plot(steps, 100 * (1 - mean) if metric.endswith("accuracy") else mean, **style)


def error_axis(axis: Axes) -> None:
    """Errors in percent, where 2 and 1 are as far apart as 20 and 10."""
    ticks = (0.5, 1, 2, 5, 10, 20, 50)
    axis.set_yscale("log")
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def accuracy_bars(found: Sequence[Outcome]) -> tuple[np.ndarray, np.ndarray]:
    """Accuracies and intervals in percent; NaN where a run diverged."""
    values = [(o.test["accuracy"], o.test["accuracy_interval"]) if o.test else (np.nan, np.nan) for o in found]
    return 100 * np.array(values)[:, 0], 100 * np.array(values)[:, 1]
