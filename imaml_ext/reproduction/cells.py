"""Experiments that train: a cell is a configuration with a run directory, begun, continued, or finished already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure

from imaml_ext.errors import ConfigError, Diverged, RunError
from imaml_ext.files import atomic_write, json_bytes
from imaml_ext.progress import say
from imaml_ext.reproduction.options import ImageOptions, TrainedOptions
from imaml_ext.reproduction.results import data_source, output_folder, read_json, write_results
from imaml_ext.settings import changed, to_json
from imaml_ext.train.config import TrainConfig
from imaml_ext.train.experiment import resolve_device
from imaml_ext.train.reports import write_figure
from imaml_ext.train.run_directory import RunDirectory, read_config
from imaml_ext.train.trainer import check_directory, train

_DIVERGED = "diverged.json"
TRIAL = {"outer.meta_batch": 2, "evaluation.tasks": 10, "evaluation.every": 0, "run.log_every": 1}  # a budget
REPTILE: dict[str, Any] = {
    "outer.optimizer": "sgd",
    "outer.lr": 1.0,
    "outer.schedule": "linear",
}  # Nichol et al. (2018)
# The name of a cell, such as "5w1s/maml", is that of its run directory under runs/BUDGET too.
Cells = Mapping[str, TrainConfig]
Outcomes = Mapping[str, "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """Holds what a finished cell has left; `result` is the content of result.json, or of diverged.json."""

    directory: RunDirectory
    config: TrainConfig
    result: Mapping[str, Any]

    @property
    def test(self) -> Mapping[str, Any] | None:
        """The test of the trained parameters, None of a run that diverged."""
        return self.result.get("test")

    def percent(self) -> tuple[float, float]:
        """Returns accuracy and 95 % interval, NaN of a run that diverged."""
        test = self.test or {}
        return 100 * test.get("accuracy", float("nan")), 100 * test.get("accuracy_interval", float("nan"))

    @property
    def accuracy(self) -> str:
        return "diverged" if self.test is None else "{:.2f} ± {:.2f}".format(*self.percent())


@dataclass(frozen=True)
class Report:
    """Holds the table in Markdown, the figures by file name, and what NAME.json has beside the cells."""

    table: str
    figures: Mapping[str, Figure]
    content: Mapping[str, Any] = field(default_factory=dict)


def cell(base: TrainConfig, options: TrainedOptions, *layers: Mapping[str, Any]) -> TrainConfig:
    """Returns `base` with layers of changes, {path: value}, and with what all cells take from the options."""
    common: dict[str, Any] = {"run.device": options.device, "run.threads": options.threads, "run.seed": options.seed}
    if isinstance(options, ImageOptions):
        common["data"] = data_source(options)
    for layer in ({"run.tensorboard": False}, *layers, common):
        base = changed(base, layer)
    return base


def run_cells(options: TrainedOptions, cells: Cells, report: Callable[[Outcomes], Report], *, command: str) -> None:
    """Trains the cells chosen that are not finished, and draws what is finished after each of them.

    An interrupted cell continues from its newest checkpoint. One whose meta-gradient became non-finite is finished.

    Raises:
        ConfigError: no cell has a name asked for, or a run directory holds a run with other settings.
        RunError: no cell is finished in the end, or as `imaml_ext.train.train`; as do DataError, Interrupted.
    """
    chosen = [] if options.draw_only else chosen_cells(cells, options.cells)
    folder = output_folder(options)
    runs = folder / "runs" / options.budget
    directories = {name: RunDirectory(runs / name) for name in cells}

    def draw() -> int:
        """Writes NAME.json, NAME.md and the figures; returns the number of finished cells."""
        results = {name: result for name in cells if (result := _result(directories[name])) is not None}
        configs = {name: read_config(directories[name]).config for name in results}
        found = {name: Outcome(directories[name], configs[name], result) for name, result in results.items()}
        if not found:
            raise RunError(f"{runs} holds no finished run of this experiment: there is nothing to draw")
        drawn = report(found)
        content = {name: {**outcome.result, "config": to_json(outcome.config)} for name, outcome in found.items()}
        write_results(options, resolve_device(options.device), command=command, **drawn.content, cells=content)
        atomic_write(folder / f"{options.name}.md", drawn.table.encode())
        for name, figure in drawn.figures.items():
            write_figure(figure, folder / name)
        return len(found)

    for number, name in enumerate(chosen, 1):
        directory, title = directories[name], f"{options.name} {number}/{len(chosen)}: {name}"
        check_directory(directory, cells[name], resume=True)
        if _result(directory) is not None:
            say(f"{title} is finished")
            continue
        say(title)
        try:
            train(cells[name], directory.path, recipe=name, command=command, resume=True)
        except Diverged as error:
            say(str(error))
            atomic_write(directory.path / _DIVERGED, json_bytes({"diverged": str(error)}))
        draw()
    say(f"{draw()} of {len(cells)} cells are finished; results are in {folder}")


def _result(directory: RunDirectory) -> dict[str, Any] | None:
    """The result of a run, None where there is none yet."""
    advice = "remove it, and its cell is tested again"
    return read_json(directory.result, advice) or read_json(directory.path / _DIVERGED, advice)


def chosen_cells(cells: Iterable[str], names: Sequence[str]) -> list[str]:
    """The cells that are named, each by its whole name or by a beginning of it that ends before a "/"."""
    cells = list(cells)
    of_name = {name: {cell for cell in cells if f"{cell}/".startswith(f"{name.rstrip('/')}/")} for name in names}
    for name in (name for name in names if not of_name[name]):
        raise ConfigError(f"--cells: no cell is called {name!r}; there are: {', '.join(cells)}")
    return [cell for cell in cells if not names or any(cell in found for found in of_name.values())]
