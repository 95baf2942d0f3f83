"""Reads runs that were begun before version 0.2. It leaves the package after one release."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from imaml_ext.data import Augmentation, DataSource
from imaml_ext.errors import ConfigError
from imaml_ext.inner import GradientDescent, InnerSolver, NewtonCG
from imaml_ext.meta import MetaAlgorithm
from imaml_ext.models import MLP, Conv4, TaskModel
from imaml_ext.settings import field_types
from imaml_ext.solvers import CG, LinearSolver
from imaml_ext.train.config import EvaluationSettings, Outer, RunSettings, Tasks, Theta, TrainConfig

CHECKPOINT_FORMAT = 2

# Knobs that runs recorded before there were such do not have, with what those runs did.
_ADDED = {
    "data.image_size": 84,
    "data.greyscale": False,
    "data.val_fraction": 0.16,
    "data.test_fraction": 0.2,
    "model.precision": "float32",
    "model.weights": None,
    "model.head": "own",
    "model.feature_scale": 1.0,
    "inner.betas": [0.9, 0.999],
    "inner.batch_size": None,
    "run.capture": False,
}

# Knobs that have gone, with the one value that they can have had.
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
    old = _ADDED | {f"{group}.{name}": value for group, knobs in values.items() for name, value in knobs.items()}
    for name, value in _REMOVED.items():
        if old.get(name, value) != value:
            raise ConfigError(f"{name} was {old[name]!r} in this run, and is no longer a setting")
    try:
        return TrainConfig(
            data=_taken(DataSource.kind(old["data.name"]), old, "data."),
            tasks=_taken(Tasks, old, "data."),
            augment=Augmentation(**values.get("augment", {})),
            model=_model(old),
            theta=Theta(old["model.weights"], old["model.head"] == "shared", old["model.feature_scale"]),
            algorithm=_algorithm(old),
            outer=_taken(Outer, old, "outer.", learnt_lr=old["outer.lam_lr"]),
            evaluation=_taken(EvaluationSettings, old, "evaluation."),
            run=_taken(RunSettings, old, "run."),
        )
    except KeyError as error:
        raise ConfigError(f"setting {error.args[0]} is missing") from error


def _taken(kind: type, old: Mapping[str, Any], prefix: str, **given: Any) -> Any:
    """An object whose fields have the names that the old knobs had."""
    return kind(
        **{name: old[prefix + name] for name in field_types(kind) if name not in given and prefix + name in old},
        **given,
    )


def _model(old: Mapping[str, Any]) -> TaskModel:
    if old["model.name"] == "mlp":
        return MLP(hidden=old["model.hidden"], activation=old["model.activation"], precision=old["model.precision"])
    return Conv4(filters=old["model.filters"], pooling=old["model.pooling"], precision=old["model.precision"])


def _inner(old: Mapping[str, Any]) -> InnerSolver:
    if old["inner.solver"] == "hessian_free":
        solver = CG(max_iterations=old["inner.cg_steps"], rtol=0.0)
        return _taken(NewtonCG, old, "inner.", linear_solver=solver)
    proximal = {"pullback": "after"}.get(old["inner.proximal"], old["inner.proximal"])
    return _taken(GradientDescent, old, "inner.", proximal=proximal)


def _algorithm(old: Mapping[str, Any]) -> MetaAlgorithm:
    name, settings = old["meta.algorithm"], {"lam": old["inner.lam"], "inner": _inner(old)}
    sharing = old["meta.learn_lam"]
    if sharing != "none":
        settings["learn"] = {"lam": "tensor" if sharing == "layer" else sharing}
    if name == "maml":
        settings["checkpoint"] = old["meta.checkpoint_steps"]
    elif name == "imaml":
        rate = {"lr": old["meta.solver_lr"]} if old["meta.solver"] == "fixed_point" else {}
        solver = LinearSolver.kind(old["meta.solver"])
        settings["linear_solver"] = solver(max_iterations=old["meta.cg_steps"], rtol=old["meta.cg_rtol"], **rate)
        settings |= {"damping": old["meta.damping"], "curvature": old["meta.curvature"]}
        settings["on_breakdown"] = old["meta.negative_curvature"]
    return MetaAlgorithm.kind(name)(**settings)


def checkpoint_from_old(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of an old checkpoint by the names of today, all but its format."""
    old = dict(values)
    log_lam, average = old.pop("log_lam"), old.pop("average")
    params = {"theta": old.pop("theta")} | ({} if log_lam is None else {"log_lam": log_lam})
    averages = {} if average is None else {"theta": average}
    return old | {"params": params, "averages": averages, "metrics": old.pop("window")}
