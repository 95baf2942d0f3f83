"""Configurations: what goes together, and their JSON form."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from imaml_ext.cli.parser import field_help
from imaml_ext.data import Augmentation, DataSource, Folder, Linear, Omniglot, Sinusoid
from imaml_ext.errors import ConfigError
from imaml_ext.inner import GradientDescent, InnerSolver, NewtonCG
from imaml_ext.meta import FOMAML, IMAML, MAML, MetaAlgorithm, Reptile
from imaml_ext.models import MLP, Conv4, TaskModel
from imaml_ext.pictures import Reading
from imaml_ext.settings import changed, from_json, leaves, to_json
from imaml_ext.solvers import FixedPoint, LinearSolver, Neumann
from imaml_ext.train import (
    EvaluationSettings,
    Outer,
    RunSettings,
    Tasks,
    Theta,
    TrainConfig,
    load_recipe,
    recipe_names,
)
from imaml_ext.train.config import differences


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_survive_json(name: str) -> None:
    config = load_recipe(name).config
    assert from_json(TrainConfig, json.loads(json.dumps(to_json(config)))) == config


def test_every_kind_of_setting_survives_json() -> None:
    config = TrainConfig(
        data=Omniglot(root=Path("somewhere/data"), download=True, split="vinyals"),
        model=MLP(hidden=()),
        algorithm=MAML(
            inner=GradientDescent(optimizer="adam", betas=(0.5, 0.9), lr_of={"linear.*": 0.3}), learn={"lr": "tensor"}
        ),
        outer=Outer(clip_norm=10.0),
        evaluation=EvaluationSettings(inner_steps=32),
        run=RunSettings(threads=2),
    )
    back = from_json(TrainConfig, json.loads(json.dumps(to_json(config))))
    assert back == config
    assert isinstance(back.data, Omniglot)
    assert isinstance(back.data.root, Path)
    assert isinstance(back.algorithm.inner, GradientDescent)
    assert isinstance(back.algorithm.inner.betas, tuple)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("outer.learning_rate", 1.0, "unknown setting outer.learning_rate"),
        ("extra", {}, "unknown setting extra"),
        ("outer.lr", "fast", "Outer.lr must be a number, got 'fast'"),
        ("outer.lr", True, "Outer.lr must be a number, got True"),
        ("outer.steps", 10.5, "Outer.steps must be an integer, got 10.5"),
        ("outer.schedule", "stairs", "Outer.schedule must be one of 'constant', 'linear', 'cosine', got 'stairs'"),
        ("run.capture", 1, "RunSettings.capture must be true or false, got 1"),
        ("data.cache_dir", 7, "Glyphs.cache_dir must be a path, got 7"),
        ("model.kind", "transformer", "task model must be one of 'conv4', 'mlp', got 'transformer'"),
        ("algorithm.inner.steps", -1, "GradientDescent.steps must be at least 0, got -1"),
        ("run", [], "run must be a JSON object"),
        ("outer.steps", 0, "Outer.steps must be at least 1, got 0"),
    ],
)
def test_json_is_read_strictly(path: str, value: object, message: str) -> None:
    values = to_json(TrainConfig())
    *groups, name = path.split(".")
    target = values
    for group in groups:
        target = target[group]
    target[name] = value
    with pytest.raises((ConfigError, TypeError)) as caught:
        from_json(TrainConfig, values)
    assert message in str(caught.value)


def test_settings_are_set_by_path() -> None:
    changes = {"outer.lr": 0.5, "outer.steps": 7, "algorithm": Reptile(), "algorithm.inner.steps": 3}
    config = changed(TrainConfig(), changes)
    assert config == dataclasses.replace(
        TrainConfig(), outer=Outer(lr=0.5, steps=7), algorithm=Reptile(inner=GradientDescent(steps=3))
    )
    for values, message in (
        ({"outer.learning_rate": 1.0}, r"there is no setting outer\.learning_rate"),
        ({"algorithm.lam": 0.0}, r"lam must be above 0"),  # of IMAML
    ):
        with pytest.raises(ConfigError, match=message):
            changed(TrainConfig(), values)


def test_differences_are_the_changes() -> None:
    before = TrainConfig()
    changes = {
        "outer.lr": 0.5,
        "algorithm.inner.lr": 0.3,
        "data": Omniglot(orientations="upright"),
        "theta.weights": "mine",
    }
    after = changed(before, changes)
    assert differences(before, after) == changes
    assert changed(before, differences(before, after)) == after
    assert differences(before, before) == {}
    assert differences(before, changed(before, {"algorithm": MAML()})) == {"algorithm": MAML()}


def test_json_must_have_every_setting() -> None:
    values = to_json(TrainConfig())
    del values["algorithm"]["lam"]
    with pytest.raises(ConfigError, match=r"setting algorithm\.lam is missing"):
        from_json(TrainConfig, values)


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        (Tasks, "ways", 1),
        (Tasks, "shots", 0),
        (Tasks, "train_shots", 0),
        (Tasks, "queries", 0),
        (Linear, "noise", -0.1),
        (Linear, "condition_number", 0.5),
        (Reading, "size", 0),
        (Folder, "val_fraction", 1.0),
        (Conv4, "filters", 0),
        (MLP, "hidden", (40, 0)),
        (IMAML, "lam", 0.0),
        (MAML, "lam", -0.1),
        (IMAML, "lam", float("nan")),
        (IMAML, "damping", -1.0),
        (GradientDescent, "steps", -1),
        (GradientDescent, "lr", -0.1),
        (GradientDescent, "momentum", 1.0),
        (GradientDescent, "betas", (1.0, 0.9)),
        (GradientDescent, "batch_size", 0),
        (NewtonCG, "damping", -1.0),
        (NewtonCG, "backtracks", -1),
        (Neumann, "max_iterations", 0),
        (FixedPoint, "lr", 0.0),
        (Theta, "feature_scale", 0.0),
        (Outer, "lr", float("inf")),
        (Outer, "learnt_lr", 0.0),
        (Outer, "warmup_steps", -1),
        (Outer, "clip_norm", 0.0),
        (Outer, "average", 1.0),
        (EvaluationSettings, "tasks", 1),
        (EvaluationSettings, "inner_steps", -1),
        (RunSettings, "seed", -1),
        (RunSettings, "device", ""),
        (RunSettings, "threads", 0),
        (RunSettings, "log_every", 0),
        (RunSettings, "keep_checkpoints", 0),
    ],
)
def test_a_bad_value_is_named(group: type, name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        group(**{name: value})
    message = str(caught.value)
    assert f"{group.__name__}.{name}" in message
    assert "got " in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": Sinusoid()}, "model must be 'mlp' for the data set 'sinusoid', which has no images, got 'conv4'"),
        (
            {"model": MLP(), "theta": Theta(shared_head=True), "data": Sinusoid()},
            "theta.shared_head must be false for the data set 'sinusoid', which has no classes, got True",
        ),
        (
            {"theta.shared_head": True, "algorithm": MAML(lam=1.0, learn={"lam": "parameter"})},
            "theta.shared_head must be false where something is learnt per 'parameter', which tells the classes apart",
        ),
        ({"model": MLP(), "theta": Theta(feature_scale=2.0)}, "theta.feature_scale must be 1 but for conv4, got 2.0"),
        (
            {"model": MLP(), "augment": Augmentation(flip=True), "data": Sinusoid()},
            "augment.flip must be left out for the data set 'sinusoid', which has no images, got True",
        ),
        (
            {"model": Conv4(precision="tf32"), "run.dtype": "float64"},
            "model.precision must be 'float32' with run.dtype 'float64', got 'tf32'",
        ),
        ({"algorithm": MAML(learn={"lam": "global"})}, "algorithm.lam must be positive to be learnt, got 0.0"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        changed(TrainConfig(), changes)
    assert message in str(caught.value)


def test_warm_up_ends_before_the_run() -> None:
    with pytest.raises(ConfigError, match=r"Outer.warmup_steps must be smaller than steps \(10\), got 10"):
        Outer(steps=10, warmup_steps=10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MAML(inner=NewtonCG()), "MAML.inner must be GradientDescent, whose steps are differentiated"),
        (lambda: IMAML(inner=NewtonCG(), linear_solver=FixedPoint()), "lr must be given"),
        (lambda: Reptile(learn={"lam": "tensor"}), "Reptile cannot learn lam"),
        (lambda: FOMAML(learn={"lam": "tensor"}), "FOMAML cannot learn lam"),
    ],
)
def test_algorithms_and_settings_that_do_not_go_together(make: Any, message: str) -> None:
    with pytest.raises((ConfigError, TypeError)) as caught:
        make()
    assert message in str(caught.value)


def test_every_setting_is_explained() -> None:
    """The comment beside or above a field is its help on the command line."""
    families = (DataSource, TaskModel, MetaAlgorithm, InnerSolver, LinearSolver)
    kinds = [family.kind(name) for family in families for name in family.kinds]
    groups = [Tasks, Augmentation, Theta, Outer, EvaluationSettings, RunSettings]
    for kind in (*kinds, *groups):
        shown = {
            field.name
            for field in dataclasses.fields(kind)
            if field.metadata.get("recorded", True) and not field.metadata.get("from_data", False)
        }
        assert shown <= field_help(kind).keys(), f"{kind.__name__}: {shown - field_help(kind).keys()} has no help"
        assert all(field_help(kind)[name].endswith(".") for name in shown), kind


def test_configurations_are_frozen_and_their_settings_are_listed() -> None:
    config = TrainConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.outer.lr = 1.0  # type: ignore[misc]
    names = [name for name, _ in leaves(config)]
    assert len(names) == len(set(names))
    assert {"data", "tasks.ways", "algorithm.inner.steps", "outer.lr", "run.seed"} <= set(names)
