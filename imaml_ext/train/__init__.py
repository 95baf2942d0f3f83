"""Training and evaluation: configurations, recipes, Algorithm 1, run directories and their reports."""
# ruff: noqa: F401

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imaml_ext.errors import CheckpointError, ConfigError, Interrupted, RunError
    from imaml_ext.train.config import EvaluationSettings, Outer, RunSettings, Tasks, Theta, TrainConfig
    from imaml_ext.train.evaluation import Evaluation, FromScratch, evaluate, evaluate_pretrained, evaluate_run
    from imaml_ext.train.experiment import Experiment, build
    from imaml_ext.train.export import export_run
    from imaml_ext.train.recipe import Recipe, Stage, load_recipe, recipe_names
    from imaml_ext.train.stages import train_recipe
    from imaml_ext.train.trainer import train

# Where the public names live; loaded when first used, so that what needs no torch does not wait for it.
_HOMES = {
    "imaml_ext.errors": ("CheckpointError", "ConfigError", "Interrupted", "RunError"),
    "imaml_ext.train.config": ("EvaluationSettings", "Outer", "RunSettings", "Tasks", "Theta", "TrainConfig"),
    "imaml_ext.train.evaluation": ("Evaluation", "FromScratch", "evaluate", "evaluate_pretrained", "evaluate_run"),
    "imaml_ext.train.experiment": ("Experiment", "build"),
    "imaml_ext.train.export": ("export_run",),
    "imaml_ext.train.recipe": ("Recipe", "Stage", "load_recipe", "recipe_names"),
    "imaml_ext.train.stages": ("train_recipe",),
    "imaml_ext.train.trainer": ("train",),
}

__all__ = [name for names in _HOMES.values() for name in names]

if not TYPE_CHECKING:  # a type checker would believe that every name exists

    def __getattr__(name: str) -> Any:
        for home, names in _HOMES.items():
            if name in names:
                return getattr(importlib.import_module(home), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
