"""Ctrl-C and SIGTERM end a run between two steps, after it was saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from imaml_ext.errors import Interrupted


class StopRequest:
    """In `with StopRequest() as stop`, a first SIGINT or SIGTERM sets `stop.signal`; a second one raises at once.

    `advice` says what can then be done.

    Not so with `patient`, for a job of several processes: one that leaves at once takes the others with it. There it is
    the launcher that loses patience.
    """

    def __init__(self, *, patient: bool = False, advice: str = "continue with --resume") -> None:
        self.signal: int | None = None
        self._patient, self._advice = patient, advice
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and not self._patient:
            raise Interrupted(number, f"stopped at once; {self._advice}")
        self.signal = number
