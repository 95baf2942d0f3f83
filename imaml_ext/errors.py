"""Every exception of imaml_ext. Each explains itself in one sentence, so that the command line shows no traceback."""

from __future__ import annotations

import signal
from contextvars import ContextVar
from typing import Any

# What options of the data begin with on the command line that is under way; None in Python.
option_prefix: ContextVar[str | None] = ContextVar("option_prefix", default=None)


def argument(name: str, value: object = None) -> str:
    """How a message calls an argument of a data set: `name=value`, or `--data.name value` on a command line."""
    prefix = option_prefix.get()
    if prefix is None:
        return name if value is None else f"{name}={value}"
    option = prefix + name.replace("_", "-")
    return option if value in (None, True) else f"{option} {value}"


class ImamlError(Exception):
    """The base of all errors that explain themselves; `exit_code` is that of the command `imaml`."""

    exit_code = 1


class ConfigError(ImamlError, ValueError):
    """A setting outside its range, or settings that do not fit together: names the setting and what came."""


class ConfigTypeError(ImamlError, TypeError):
    """A setting of the wrong type: names the setting, the type that was expected and what came."""


class DataError(ImamlError, RuntimeError):
    """Data that is missing, damaged or not of the expected format; says which, and what to do."""


class NativeUnavailableError(ImamlError, ImportError):
    """The compiled part of imaml_ext is missing or does not load."""


class SolveError(ImamlError, RuntimeError):
    """Rows of a linear solve that failed: says which, how, and what to do."""


class SolveWarning(UserWarning):
    """A linear solve that ended short of its tolerance, so that what follows from it is inexact."""


class RunError(ImamlError, RuntimeError):
    """A run that cannot start or continue: says why, and what can be done."""


class WeightsError(RunError):
    """A weights file that is missing, damaged or not one of ours."""


class WriteError(RunError):
    """A file that cannot be written; what was there before is unchanged."""


class CheckpointError(RunError):
    """A checkpoint that is damaged, missing, or of another run."""


class Diverged(RunError):
    """The meta-gradient or the meta-parameters of a run became non-finite."""


class LostRank(RunError):
    """Another process of the job has ended, or does not answer."""


class ReportedElsewhere(RunError):
    """An error that another process raises and reports; this process ends with the same exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = code


class Interrupted(ImamlError, RuntimeError):
    """A signal asked the run to stop, and the run has been saved."""

    def __init__(self, number: int | None, message: str) -> None:
        super().__init__(message)
        self.signal = int(number or signal.SIGINT)
        self.exit_code = 128 + self.signal


class EvaluationStopped(Interrupted):
    """A signal asked an evaluation to stop; `so_far` is its result for the tasks that were judged, None for too few."""

    def __init__(self, number: int | None, message: str, so_far: Any) -> None:
        super().__init__(number, message)
        self.so_far = so_far
