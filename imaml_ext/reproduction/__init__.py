"""The paper's experiments, one per file: `imaml reproduce NAME` writes their numbers (JSON) and figures (PNG)."""

from __future__ import annotations

import importlib

from imaml_ext.reproduction.options import EXPERIMENTS, ExperimentOptions

__all__ = ["EXPERIMENTS", "ExperimentOptions", "reproduce"]


def reproduce(options: ExperimentOptions, *, command: str = "") -> None:
    """Runs the experiment that the options are of, and leaves its numbers and figures in `options.folder`.

    Raises:
        ConfigError, DataError: what was asked for cannot be run.
        RunError: the folder cannot be written, or holds results that do not belong to these options.
        Interrupted: SIGINT or SIGTERM came; what is finished is kept, and the same command goes on from there.
    """
    module = importlib.import_module(f"imaml_ext.reproduction.{options.name.replace('-', '_')}")
    module.run(options, command=command)
