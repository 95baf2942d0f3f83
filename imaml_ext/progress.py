"""Progress on stderr: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class ProgressBar:
    """Shows progress: `with ProgressBar("training", total=1000) as bar: bar.update(20, {"loss": 0.5})`."""

    def __init__(self, title: str, *, total: int, start: int = 0, hidden: bool = False) -> None:
        self._title, self._total, self._start, self._hidden = title, total, start, hidden
        self._bar: Progress | None = None
        self._last_line = float("-inf")

    def __enter__(self) -> ProgressBar:
        if sys.stderr.isatty() and not self._hidden:
            text, shown = TextColumn("{task.description}"), TextColumn("{task.fields[shown]}")
            columns = (text, BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(), shown)
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total, completed=self._start, shown="")
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, values: Mapping[str, Any] | None = None) -> None:
        """Shows that `done` of the total is done; `values` stay shown until others come."""
        shown = None if values is None else "  ".join(f"{name} {value}" for name, value in values.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
            if shown is not None:
                self._bar.update(self._task, shown=shown)
            return
        now = time.monotonic()
        due = done == self._total or now - self._last_line >= _SECONDS_BETWEEN_LINES
        if due and shown is not None and not self._hidden:
            self._last_line = now
            print(f"{self._title} {done}/{self._total}  {shown}", file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Writes a line for the user, beside the bar rather than into the results on stdout."""
    print(text, file=sys.stderr, flush=True)


def first_process() -> bool:
    """Tells whether this is the process that speaks for a job of several."""
    return os.environ.get("RANK", "0") == "0"


@functools.cache
def say_once(text: str) -> None:
    """Writes a line for the user the first time it is said, and on the first process of a job alone."""
    if first_process():
        say(text)
