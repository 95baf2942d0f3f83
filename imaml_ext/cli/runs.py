"""`imaml runs`: what runs have reached, as a table; where several differ; their learning curves in one picture."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console
from rich.table import Column, Table

from imaml_ext.cli.parser import parse
from imaml_ext.errors import ConfigError, RunError
from imaml_ext.train.ranks import Ranks

if TYPE_CHECKING:
    from imaml_ext.train.overview import Overview  # which needs torch

_Flag = tyro.conf.FlagCreatePairsOff[bool]


@dataclass(frozen=True)
class Options:
    """List the runs below some folders, with what they have reached; `imaml runs compare RUN RUN …` shows where some
    differ, and `imaml runs plot RUN RUN … --output FILE.png` draws their learning curves.
    """

    folders: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),)  # Folders, or run directories.
    json: _Flag = False  # As JSON.


@dataclass(frozen=True)
class Compare:
    """Show the settings in which runs differ, and what they have reached, side by side."""

    runs: tyro.conf.Positional[tuple[Path, ...]]  # The run directories.
    json: _Flag = False  # As JSON.


@dataclass(frozen=True)
class Plot:
    """Draw the learning curves of runs into one picture."""

    runs: tyro.conf.Positional[tuple[Path, ...]]  # The run directories.
    output: Path = Path("curves.png")  # The picture, NAME.png.


def run(arguments: list[str], ranks: Ranks) -> int:
    action = {"compare": _compare, "plot": _plot}.get(arguments[0] if arguments else "")
    if action is None:
        _list(parse(Options, arguments, prog="imaml runs"))
    else:
        action(arguments[1:])
    return 0


def _list(options: Options) -> None:
    from imaml_ext.train.overview import find_runs, overview

    runs, unreadable = [], {}

    def note(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            unreadable[Path(error.filename)] = f"{error.filename} cannot be read: {error.strerror}"

    for folder in options.folders:
        if not folder.is_dir() and options.folders != Options.folders:
            raise RunError(f"folders must exist, got {folder}")
    for path in dict.fromkeys(path for folder in options.folders for path in find_runs(folder, note)):
        try:
            runs.append(overview(path))
        except RunError as error:
            unreadable[path] = str(error)
    if options.json:
        damaged = [{"path": str(path), "state": "unreadable", "error": text} for path, text in unreadable.items()]
        _print_json([*(run.to_json() for run in runs), *damaged])
    elif runs:
        table = _table("run", "recipe", *_reached(runs[0]))
        for each in runs:
            table.add_row(str(each.path), each.recipe, *_reached(each).values())
        _print(table)
    for text in unreadable.values():
        print(f"not listed: {text}", file=sys.stderr)
    if not runs and not unreadable:
        print(f"there are no runs below {', '.join(map(str, options.folders))}", file=sys.stderr)


def _compare(arguments: list[str]) -> None:
    options = parse(Compare, arguments, prog="imaml runs compare")
    if len(options.runs) < 2:
        raise ConfigError(f"runs must be two or more directories to be compared, got {len(options.runs)}")
    from imaml_ext.train.overview import differing, overview

    runs = [overview(path) for path in options.runs]
    settings = differing(runs)
    if options.json:
        found = [
            {name: values[i] for name, values in settings.items() if values[i] is not ...} for i in range(len(runs))
        ]
        _print_json([each.to_json() | {"settings": own} for each, own in zip(runs, found, strict=True)])
        return
    table = _table("", *(str(each.path) for each in runs))
    for name, values in settings.items():
        table.add_row(name, *("–" if value is ... else "unset" if value is None else str(value) for value in values))
    table.add_section()
    reached = [_reached(each) for each in runs]
    for name in reached[0]:
        table.add_row(name, *(each[name] for each in reached))
    _print(table)


def _plot(arguments: list[str]) -> None:
    options = parse(Plot, arguments, prog="imaml runs plot")
    if not options.runs:
        raise ConfigError("runs must be one or more directories to be drawn, got none")
    if options.output.suffix != ".png":
        raise ConfigError(f"output must be a file NAME.png, got {options.output}")
    from imaml_ext.train.overview import overview
    from imaml_ext.train.reports import draw_curves
    from imaml_ext.train.run_directory import RunDirectory

    draw_curves({str(path): RunDirectory(overview(path).path) for path in options.runs}, options.output)
    print(options.output)


def _reached(run: Overview) -> dict[str, str]:
    """What a run has reached, by the name of its column."""
    return {
        "state": run.state,
        "step": f"{run.step:,}/{run.config.outer.steps:,}",
        "validation": str(run.validation or ""),
        "test": str(run.test or ""),
        "time": "" if run.seconds is None else str(timedelta(seconds=round(run.seconds))),
    }


def _table(*names: str) -> Table:
    return Table(*(Column(name, overflow="fold") for name in names), box=None)


def _print(table: Table) -> None:
    """Prints a table: a row is one line where no terminal limits it."""
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 10_000).print(table)


def _print_json(content: list[dict[str, Any]]) -> None:
    from imaml_ext.files import json_bytes

    print(json_bytes(content).decode(), end="")
