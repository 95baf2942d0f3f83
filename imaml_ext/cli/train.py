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
RECIPES, CHAINS = _PACKAGE / "recipes", _PACKAGE / "reproduction" / "chains"
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
        options = ranks.on_all(training_options, name, recipe, arguments[1:])
    run_dir = options.run_dir or Path("runs") / name
    if options.resume:  # a run keeps its own settings where the command line gives none
        recorded = ranks.on_first(_recorded, run_dir, name)
        if recorded is not None:
            with _unheard():
                options = ranks.on_all(training_options, name, replace(recipe, config=recorded.config), arguments[1:])
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


def _recipe(arguments: list[str]) -> tuple[str, Recipe]:
    """The recipe that the command line begins with, and its name: one of the package's, or a file of the user's."""
    given = arguments[0] if arguments else ""
    if given.endswith(".py"):
        return Path(given).stem.replace("_", "-"), load_recipe(Path(given))
    name = chosen_name(arguments, recipe_summaries(RECIPES), others=CHAINS, prog="imaml train", what="recipe")
    return name, load_recipe(name)


def training_options(name: str, recipe: Recipe, arguments: list[str]) -> Options:
    default = Options(recipe.config)
    options = parse(
        Options, renamed(arguments), prog=f"imaml train {name}", description=recipe.description, default=default
    )
    if options.from_checkpoint is not None and not options.resume:
        raise ConfigError("--from-checkpoint says where to continue from: it needs --resume")
    return options


def _recorded(path: Path, name: str) -> RecordedRun | None:
    """The run of this recipe that is in a directory, None where there is no run yet."""
    directory = RunDirectory(path)
    if not directory.holds_run():
        return None
    recorded = read_config(directory)
    if recorded.recipe != name:
        raise RunError(f"{path} holds a run of the recipe {recorded.recipe!r}, not of {name!r}")
    return recorded


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Where another rank says the same."""
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield
