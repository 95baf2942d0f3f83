"""Recipes: a Python file each, with a configuration, or several stages of one, and the words that describe it.

    \"\"\"5-way 1-shot on the built-in glyphs: no download, made for two CPU cores.

    Command: imaml train glyphs-5w1s
    Time: 2 minutes on two CPU cores.
    Accuracy: 96.7 ± 0.3 % on 1,000 test tasks.
    \"\"\"
    recipe = Recipe(TrainConfig(...))

`glyphs_5w1s.py` is the recipe glyphs-5w1s. Time and accuracy are stated where they have been measured.
"""

from __future__ import annotations

import ast
import importlib
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imaml_ext import _renamed
from imaml_ext.errors import ConfigError
from imaml_ext.settings import changed

if TYPE_CHECKING:
    from imaml_ext.train.config import TrainConfig  # which needs torch; a list of the recipes does not wait for it

_PACKAGE = Path(__file__).parents[1]
_FOLDER = _PACKAGE / "recipes"
_OF_THE_FIRST_STAGE = ("theta.weights", "theta.feature_scale")  # the others begin with what the one before has learnt


@dataclass(frozen=True)
class Stage:
    """Describes a part of a training: the configuration of the part before, with changes.

    Attributes:
        name: of its run directory. changes: {path: value}, as `settings.changed` takes them.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """Holds a configuration to train with; or stages of one, each of which begins where the one before has ended.

    Attributes:
        description: the docstring of the file that it was loaded from. name: which its runs are recorded under.
    """

    config: TrainConfig
    stages: tuple[Stage, ...] = ()
    description: str = ""
    name: str = ""

    def staged(self, changes: Mapping[str, Any]) -> list[TrainConfig]:
        """Returns the configuration of every stage with `changes` in all of them, {path: value}.

        Raises:
            ConfigError, ConfigTypeError: a path that does not exist, or a value that does not fit; names the stage.
        """
        config, configs = self.config, []
        for number, stage in enumerate(self.stages):
            later = {name: value for name, value in changes.items() if name not in _OF_THE_FIRST_STAGE}
            try:
                if number:
                    config = changed(config, {"theta.weights": None, "theta.feature_scale": 1.0})
                config = changed(config, stage.changes)
                configs.append(changed(config, later if number else changes))
            except ConfigError as error:
                raise ConfigError(f"stage {stage.name}: {error}") from error
        return configs


def recipe_summaries(folders: Sequence[Path] = (_FOLDER,)) -> dict[str, str]:
    """Returns the first line of every recipe in some folders, by name; nothing is imported for it."""
    found = {}
    for path in (path for folder in folders for path in sorted(folder.glob("[!_]*.py"))):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        found[path.stem.replace("_", "-")] = text.partition("\n")[0]
    return found


def recipe_names(folders: Sequence[Path] = (_FOLDER,)) -> list[str]:
    """Returns the names of the recipes in some folders."""
    return list(recipe_summaries(folders))


def load_recipe(source: Path | str, folders: Sequence[Path] = (_FOLDER,)) -> Recipe:
    """Returns a recipe by its name, from one of some folders, or from a file *.py; or one with the settings of a run.

    Args:
        source: a name, a file *.py, or a run directory or its config.json (of one stage, where there are several).

    Raises:
        ConfigError: there is none of that name, or the file has no variable `recipe`.
        RunError: config.json is damaged, or no run's.
    """
    path = Path(source)
    if path.suffix != ".py":
        files = [folder / f"{str(source).replace('-', '_')}.py" for folder in folders]
        path = next((file for file in files if file.is_file()), path)
    recorded = config_of_run(path)
    if recorded is not None:
        from imaml_ext.train.run_directory import read_recorded  # which needs torch

        run = read_recorded(recorded)
        folder = recorded.resolve().parent
        return Recipe(run.config, description=f"The settings of the run {folder}.", name=run.recipe or folder.name)
    if path.suffix != ".py" or not path.is_file():
        today = _renamed.recipe_of_today(str(source))
        if today is not None:
            raise ConfigError(f"the recipe {source} is now {today}")
        known = f"{', '.join(recipe_names(folders))}, or a file *.py, or a run's config.json"
        raise ConfigError(f"there is no recipe {str(source)!r}; there are: {known}")
    if path.resolve().is_relative_to(_PACKAGE):  # one of ours, which others may import too
        parts = path.resolve().with_suffix("").relative_to(_PACKAGE.parent).parts
        values = vars(importlib.import_module(".".join(parts)))
    else:
        values = runpy.run_path(str(path))
    recipe = values.get("recipe")
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"{path} must have a variable `recipe`, a Recipe, got {type(recipe).__name__}")
    return replace(recipe, description=values.get("__doc__") or "", name=path.stem.replace("_", "-"))


def config_of_run(path: Path) -> Path | None:
    """Returns the config.json that a path names, itself or by the run directory; None where it names neither."""
    path = path if path.suffix == ".json" else path / "config.json"
    return path if path.is_file() else None
