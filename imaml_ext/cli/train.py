"""`imaml train`: meta-training as a recipe or an earlier run says, with any setting changed by an option."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from imaml_ext._renamed import recipe_of_today
from imaml_ext.cli import chosen_name
from imaml_ext.train.ranks import Ranks
from imaml_ext.train.recipe import config_of_run, load_recipe, recipe_summaries

_NOTE = """A recipe file of your own: `imaml train FILE.py`.
The settings of an earlier run: `imaml train RUN/config.json`.
"""


def run(arguments: list[str], ranks: Ranks) -> int:
    with contextlib.nullcontext() if ranks.first else _unheard():
        earlier = ranks.on_all(_earlier_run, arguments)
        # These need torch, which the list of the recipes does not wait for.
        from imaml_ext.cli.train_options import recorded_config, training_options
        from imaml_ext.train.config import differences
        from imaml_ext.train.stages import train_recipe

        recipe = ranks.on_all(load_recipe, arguments[0])
        options = ranks.on_all(training_options, recipe.name, recipe.config, arguments[1:], recipe.description)
    run_dir = options.run_dir or (earlier if options.resume else None) or Path("runs") / recipe.name
    if options.resume:  # a run keeps its own settings where the command line gives none
        recorded = ranks.on_first(recorded_config, run_dir, recipe.name)
        if recorded is not None:
            with _unheard():
                options = ranks.on_all(training_options, recipe.name, recorded, arguments[1:])
    train_recipe(
        recipe,
        run_dir,
        command=shlex.join(["imaml", "train", *arguments]),
        changes=differences(recipe.config, options.config),
        resume=options.resume,
        checkpoint=options.from_checkpoint,
    )
    return 0


def _earlier_run(arguments: list[str]) -> Path | None:
    """The directory of the run that the command line begins with, None where that is a recipe.

    Where it is neither, the recipes are shown and the process ends.
    """
    name = arguments[0] if arguments else ""
    if name.endswith(".py") or name in recipe_summaries() or recipe_of_today(name):
        return None
    recorded = config_of_run(Path(name)) if name else None
    if recorded is None and not name.endswith(".json"):
        chosen_name(arguments, recipe_summaries(), prog="imaml train", what="recipe", note=_NOTE)
    return recorded and recorded.parent


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Where another rank says the same."""
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield
