"""The paper's experiments, one per file: `imaml reproduce NAME` writes their numbers (JSON) and figures (PNG)."""

import importlib

from imaml_ext.reproduction.options import EXPERIMENTS, ExperimentOptions

__all__ = ["EXPERIMENTS", "ExperimentOptions", "reproduce"]


def reproduce(options: ExperimentOptions, *, command: str = "") -> None:
    """Runs the experiment that the options are of, and leaves its numbers and figures in `options.folder`.

    Raises:
        ConfigError, DataError: what was asked for cannot be run. RunError: the folder cannot be written, or holds other
            results. Interrupted: SIGINT or SIGTERM came; the same command goes on from what is finished.
    """
    module = importlib.import_module(f"imaml_ext.reproduction.{options.name.replace('-', '_')}")
    module.run(options, command=command)
