"""The options of `imaml train`: every setting of a training configuration."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from imaml_ext.cli.old_flags import renamed
from imaml_ext.cli.parser import parse
from imaml_ext.errors import ConfigError, RunError
from imaml_ext.train.config import TrainConfig
from imaml_ext.train.run_directory import RunDirectory, read_config


@dataclass(frozen=True)
class Options:
    """Train on few-shot tasks, as a recipe says; every setting of it can be changed."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]

    # Where everything is written; unset: runs/RECIPE or, with --resume, the run that is named in place of a recipe.
    run_dir: Path | None = None
    # Continue the run in the run directory, or begin it where there is none. A finished one takes more --outer.steps.
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    # With --resume: continue from this checkpoint of the run instead of the newest.
    from_checkpoint: Path | None = None


def training_options(name: str, config: TrainConfig, arguments: list[str], description: str = "") -> Options:
    """The options of `imaml train NAME …`, with `config` where the command line gives none."""
    paragraphs = re.sub(r"\n(?=(Time|Accuracy): )", "\n\n", description)
    options = parse(
        Options, renamed(arguments), prog=f"imaml train {name}", description=paragraphs, default=Options(config)
    )
    if options.from_checkpoint is not None and not options.resume:
        raise ConfigError("--from-checkpoint says where to continue from: it needs --resume")
    return options


def recorded_config(path: Path, name: str) -> TrainConfig | None:
    """The settings of the run of this recipe that is in a directory, None where there is no run yet."""
    directory = RunDirectory(path)
    if not directory.holds_run():
        return None
    recorded = read_config(directory)
    if recorded.recipe not in ("", name):  # "": a run that Python began
        raise RunError(f"{path} holds a run of the recipe {recorded.recipe!r}, not of {name!r}")
    return recorded.config
