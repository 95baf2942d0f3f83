"""Reads runs that were begun before version 0.2. It leaves the package after one release."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from imaml_ext.data import Augmentation
from imaml_ext.errors import ConfigError
from imaml_ext.pretrained.old_format import algorithm_from_old, data_from_old, model_from_old, old_knobs, taken
from imaml_ext.train.config import EvaluationSettings, Outer, RunSettings, Tasks, Theta, TrainConfig

CHECKPOINT_FORMAT = 2

# Knobs that have gone, with the value that nearly all runs had.
_REMOVED = {
    "outer.betas": [0.9, 0.999],
    "outer.eps": 1e-8,
    "outer.momentum": 0.0,
    "outer.weight_decay": 0.0,
    "outer.final_lr_fraction": 0.0,
}


def config_from_old(values: Mapping[str, Any]) -> TrainConfig:
    """Returns the configuration that an old one, in its JSON form, stands for.

    Raises:
        ConfigError: a knob is missing, or one that has gone was set.
    """
    knobs = old_knobs(values)
    for name, value in _REMOVED.items():
        if knobs.get(name, value) != value:
            raise ConfigError(f"{name} was {knobs[name]!r} in this run, and is no longer a setting")
    try:
        return TrainConfig(
            data=data_from_old(knobs),
            tasks=taken(Tasks, knobs, "data."),
            augment=Augmentation(**values.get("augment", {})),
            model=model_from_old(knobs),
            theta=Theta(knobs["model.weights"], knobs["model.head"] == "shared", knobs["model.feature_scale"]),
            algorithm=algorithm_from_old(knobs),
            outer=taken(Outer, knobs, "outer.", learnt_lr=knobs["outer.lam_lr"]),
            evaluation=taken(EvaluationSettings, knobs, "evaluation."),
            run=taken(RunSettings, knobs, "run."),
        )
    except KeyError as error:
        raise ConfigError(f"setting {error.args[0]} is missing") from error


def checkpoint_from_old(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of an old checkpoint by the names of today, all but its format."""
    old = dict(values)
    params = {name: old.pop(name, None) for name in ("theta", "log_lam")}
    params = {name: value for name, value in params.items() if value is not None}
    average = old.pop("average", None)
    averages = {} if average is None else {"theta": average}
    return old | {"params": params, "averages": averages, "metrics": old.pop("window", {})}
