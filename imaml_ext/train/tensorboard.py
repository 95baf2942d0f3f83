"""TensorBoard events beside metrics.jsonl, where tensorboard is installed."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from imaml_ext.errors import RunError

_GROUPS = {"val_": "validation", "query_": "query", "support_": "support", "solve_": "solver"}


class TensorBoard:
    """Writes each metric as a scalar over the meta-step; does nothing where disabled or not installed."""

    def __init__(self, path: Path, *, enabled: bool, step: int) -> None:
        self._path = path
        self._writer: Any = None
        if enabled and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            with _explained(path):
                # purge_step hides the events that a killed run wrote behind its last checkpoint.
                self._writer = SummaryWriter(str(path), purge_step=step + 1 if step else None)

    def add(self, row: Mapping[str, Any]) -> None:
        if self._writer is None:
            return
        with _explained(self._path):
            for name, value in row.items():
                if name != "step" and value is not None:
                    group = next((group for prefix, group in _GROUPS.items() if name.startswith(prefix)), "training")
                    self._writer.add_scalar(f"{group}/{name}", value, row["step"])

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._writer is None:
            return
        if error is None:
            with _explained(self._path):
                self._writer.close()
            return
        with contextlib.suppress(OSError):  # the error under way says what went wrong
            self._writer.close()


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write TensorBoard events to {path}: {error.strerror or error}") from error
