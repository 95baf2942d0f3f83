"""What a run writes while it trains: the lines of its metrics, TensorBoard events, checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from types import TracebackType
from typing import Any

from imaml_ext.train.checkpoint import Checkpoint, save_checkpoint
from imaml_ext.train.run_directory import MetricsLog, RunDirectory
from imaml_ext.train.tensorboard import TensorBoard


class RunLogger:
    """Writes the log and the checkpoints of a run, on rank 0, which alone calls `open` and what follows it."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._files = ExitStack()

    def open(self, *, step: int, tensorboard: bool) -> None:
        """Continues the files behind `step`; what they hold of later steps is dropped.

        Raises:
            RunError: a file cannot be written, or is damaged.
        """
        log = MetricsLog(self._directory.metrics, keep_until_step=step)
        self._log = self._files.enter_context(closing(log))
        self._events = self._files.enter_context(
            TensorBoard(self._directory.tensorboard, enabled=tensorboard, step=step)
        )

    def add(self, row: Mapping[str, Any]) -> None:
        """Writes a line of metrics.

        Raises:
            RunError: it cannot be written.
        """
        self._log.append(row)
        self._events.add(row)

    def save(self, checkpoint: Checkpoint, *, keep: int) -> None:
        """Writes a checkpoint, after the lines that a run continued from it would continue.

        Raises:
            RunError: it cannot be written; the earlier ones are untouched.
        """
        self._log.sync()
        save_checkpoint(self._directory.checkpoints, checkpoint, keep=keep)

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, traceback)
