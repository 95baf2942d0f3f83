"""Reads what was written before version 0.2: weights files, and configurations. It leaves after one release."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from imaml_ext import _renamed
from imaml_ext.data import DataSource
from imaml_ext.inner import GradientDescent, InnerSolver, NewtonCG
from imaml_ext.meta import MetaAlgorithm
from imaml_ext.models import MLP, Conv4, TaskModel
from imaml_ext.pictures import Reading
from imaml_ext.settings import to_json
from imaml_ext.solvers import CG, LinearSolver

FORMAT = "imaml_ext 1"

# Knobs newer than some of these files, with what was done before there were such.
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

_NEW_WORDS = {"pullback": "after", "layer": "tensor"}


def old_weights(config: Mapping[str, Any], card: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the metadata of an old weights file as a file of today has them."""
    knobs, classes = old_knobs(config), card["kind"] == "classification"
    algorithm, steps = algorithm_from_old(knobs), knobs["evaluation.inner_steps"]
    if steps is not None:
        algorithm = replace(algorithm, inner=replace(algorithm.inner, steps=steps))  # type: ignore[type-var]
    model = model_from_old(knobs).fitted(tuple(card["input_shape"]), knobs["data.ways"] if classes else 1)
    weights = knobs["model.weights"]
    new = {
        "recipe": card["preset"],
        "description": card["data"],
        "data": to_json(data_from_old(knobs)),
        "tasks": {name: knobs[f"data.{name}"] for name in ("ways", "shots", "train_shots", "queries")},
        "trained_from": None if weights is None else Path(weights).name,
    }
    return {
        "model": to_json(model),
        "criterion": "cross_entropy" if classes else "mse",
        "algorithm": to_json(algorithm),
        "shared_head": knobs["model.head"] == "shared",
        "card": {name: value for name, value in card.items() if name != "preset"} | new,
    }


def old_knobs(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an old configuration, in its JSON form, as {"inner.steps": value, …}."""
    groups = {name: knobs for name, knobs in config.items() if isinstance(knobs, Mapping)}
    knobs = _ADDED | {f"{group}.{name}": value for group, knobs in groups.items() for name, value in knobs.items()}
    data = {"split_protocol": knobs["data.split_protocol"], "rotations": knobs["data.rotations"]}
    _renamed.omniglot_keywords(data)
    return knobs | {f"data.{name}": value for name, value in data.items()}


def taken(kind: type, knobs: Mapping[str, Any], prefix: str, **given: Any) -> Any:
    """Returns an object whose fields have the names that the old knobs had."""
    names = [field.name for field in fields(kind) if field.name not in given and prefix + field.name in knobs]
    return kind(**{name: knobs[prefix + name] for name in names}, **given)


def data_from_old(knobs: Mapping[str, Any]) -> DataSource:
    given = {}
    if knobs["data.name"] == "folder":
        colours = "grey" if knobs["data.greyscale"] else "rgb"
        given = {"pictures": Reading(size=knobs["data.image_size"], colours=colours)}  # type: ignore[arg-type]
    return taken(DataSource.kind(knobs["data.name"]), knobs, "data.", **given)


def model_from_old(knobs: Mapping[str, Any]) -> TaskModel:
    return taken(MLP if knobs["model.name"] == "mlp" else Conv4, knobs, "model.")


def algorithm_from_old(knobs: Mapping[str, Any]) -> MetaAlgorithm:
    name, settings = knobs["meta.algorithm"], {"lam": knobs["inner.lam"], "inner": _inner(knobs)}
    if knobs["meta.learn_lam"] != "none":
        settings["learn"] = {"lam": _NEW_WORDS.get(knobs["meta.learn_lam"], knobs["meta.learn_lam"])}
    if name == "maml":
        settings["checkpoint"] = knobs["meta.checkpoint_steps"]
    elif name == "imaml":
        rate = {"lr": knobs["meta.solver_lr"]} if knobs["meta.solver"] == "fixed_point" else {}
        solver = LinearSolver.kind(knobs["meta.solver"])
        settings["linear_solver"] = solver(max_iterations=knobs["meta.cg_steps"], rtol=knobs["meta.cg_rtol"], **rate)
        settings |= {"damping": knobs["meta.damping"], "curvature": knobs["meta.curvature"]}
        settings["on_breakdown"] = knobs["meta.negative_curvature"]
        settings["lam_preconditioner"] = knobs["meta.learn_lam"] in ("none", "global")
    return MetaAlgorithm.kind(name)(**settings)


def _inner(knobs: Mapping[str, Any]) -> InnerSolver:
    if knobs["inner.solver"] == "hessian_free":
        return taken(NewtonCG, knobs, "inner.", linear_solver=CG(max_iterations=knobs["inner.cg_steps"], rtol=0.0))
    return taken(
        GradientDescent, knobs, "inner.", proximal=_NEW_WORDS.get(knobs["inner.proximal"], knobs["inner.proximal"])
    )
