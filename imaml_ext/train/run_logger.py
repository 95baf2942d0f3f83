"""What a run writes while it trains: the lines of its metrics, TensorBoard events, checkpoints."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Mapping
from typing import Any

from imaml_ext.progress import say
from imaml_ext.train.checkpoint import Checkpoint, save_checkpoint
from imaml_ext.train.run_directory import MetricsLog, RunDirectory, explained

_GROUPS = {"val_": "validation", "query_": "query", "support_": "support", "solve_": "solver"}  # of TensorBoard


class RunLogger:
    """Writes the log and the checkpoints of a run, on rank 0, which alone calls `open` and what follows it.

    Its methods raise RunError where a file cannot be written, or is damaged.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._log: MetricsLog | None = None
        self._events: Any = None

    def open(self, *, step: int, tensorboard: bool) -> None:
        """Continues the files behind `step`; what they hold of later steps is dropped."""
        self._log = MetricsLog(self._directory.metrics, keep_until_step=step)
        if tensorboard and importlib.util.find_spec("tensorboard") is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:  # another thing of that name, such as a folder, or an old version
                say(f"no TensorBoard events are written: {error}")
                return
            with self._explained():
                # purge_step hides the events that a killed run wrote behind its last checkpoint.
                self._events = SummaryWriter(str(self._directory.tensorboard), purge_step=step + 1 if step else None)

    def add(self, row: Mapping[str, Any]) -> None:
        """Writes a line of metrics, and each of them as a TensorBoard scalar over the meta-step."""
        assert self._log is not None
        self._log.append(row)
        if self._events is None:
            return
        with self._explained():
            for name, value in row.items():
                if name != "step" and value is not None:
                    group = next((group for prefix, group in _GROUPS.items() if name.startswith(prefix)), "training")
                    self._events.add_scalar(f"{group}/{name}", value, row["step"])

    def save(self, checkpoint: Checkpoint, *, keep: int) -> None:
        """Writes a checkpoint, after the lines that a run continued from it would continue."""
        assert self._log is not None
        self._log.sync()
        save_checkpoint(self._directory.checkpoints, checkpoint, keep=keep)

    def _explained(self) -> contextlib.AbstractContextManager[None]:
        return explained(f"cannot write TensorBoard events to {self._directory.tensorboard}")

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, *error: object) -> None:
        if self._log is not None:
            self._log.close()
        if self._events is not None:
            # Where there is an error under way, it says what went wrong.
            with contextlib.suppress(OSError) if error[0] else self._explained():
                self._events.close()
