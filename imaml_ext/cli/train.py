"""`imaml train`: meta-training as a recipe says, with any setting changed by an option."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from imaml_ext.cli.old_flags import renamed
from imaml_ext.cli.parser import chosen_name, parse
from imaml_ext.errors import ConfigError, RunError
from imaml_ext.train.config import TrainConfig
from imaml_ext.train.ranks import Ranks
from imaml_ext.train.recipe import Recipe, load_recipe, recipe_summaries
from imaml_ext.train.run_directory import RecordedRun, RunDirectory, read_config

_PACKAGE = Path(__file__).parents[1]
_RECIPES, _CHAINS = _PACKAGE / "recipes", _PACKAGE / "reproduction" / "chains"
_NOTE = "A recipe file of your own: imaml train FILE.py. Recipes of the published weights: reproduction/chains/."


@dataclass(frozen=True)
class Options:
    """Train on few-shot tasks, as a recipe says; every setting of it can be changed."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]

    run_dir: Path | None = None
    """Where everything is written; unset: runs/RECIPE."""

    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Continue the run in the run directory, or begin it where there is none."""

    from_checkpoint: Path | None = None
    """With --resume: continue from this checkpoint of the run instead of the newest."""


def run(arguments: list[str], ranks: Ranks) -> int:
    with contextlib.nullcontext() if ranks.first else _unheard():
        name, recipe = ranks.on_all(_recipe, arguments)
        options = ranks.on_all(_parse, name, recipe, arguments[1:])
    run_dir = options.run_dir or Path("runs") / name
    if options.resume:  # a run keeps its own settings where the command line gives none
        recorded = ranks.on_first(_recorded, run_dir, name)
        if recorded is not None:
            with _unheard():
                options = ranks.on_all(_parse, name, replace(recipe, config=recorded.config), arguments[1:])
    from imaml_ext.train.trainer import train

    train(
        replace(recipe, config=options.config),
        run_dir,
        name=name,
        command=shlex.join(["imaml", "train", *arguments]),
        resume=options.resume,
        checkpoint=options.from_checkpoint,
    )
    return 0
