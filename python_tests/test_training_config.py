"""Configurations: validation, JSON round trip, presets."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from imaml_ext.errors import ConfigError
from imaml_ext.training import (
    PRESETS,
    DataConfig,
    EvaluationConfig,
    InnerConfig,
    MetaConfig,
    ModelConfig,
    OuterConfig,
    RunConfig,
    TrainConfig,
)
from imaml_ext.training.config import from_json, knobs, to_json, with_knobs


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str) -> None:
    config = PRESETS[name].config
    assert from_json(TrainConfig, json.loads(json.dumps(to_json(config)))) == config


def test_every_kind_of_knob_survives_json() -> None:
    config = TrainConfig(
        data=DataConfig(root=Path("somewhere/data"), download=True, split_protocol="vinyals"),
        model=ModelConfig(hidden=()),
        outer=OuterConfig(clip_norm=10.0, betas=(0.5, 0.9)),
        evaluation=EvaluationConfig(inner_steps=32),
        run=RunConfig(threads=2),
    )
    back = from_json(TrainConfig, json.loads(json.dumps(to_json(config))))
    assert back == config
    assert isinstance(back.data.root, Path)
    assert isinstance(back.outer.betas, tuple)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("outer.learning_rate", 1.0, "unknown knob outer.learning_rate"),
        ("extra", {}, "unknown knob extra"),
        ("outer.lr", "fast", "outer.lr must be a number, got 'fast'"),
        ("outer.lr", True, "outer.lr must be a number, got True"),
        ("outer.steps", 10.5, "outer.steps must be an integer, got 10.5"),
        ("outer.steps", True, "outer.steps must be an integer, got True"),
        ("outer.betas", [0.9], "outer.betas must be a list of 2 values"),
        ("outer.schedule", "stairs", "outer.schedule must be one of 'constant', 'linear', 'cosine', got 'stairs'"),
        ("data.download", 1, "data.download must be true or false, got 1"),
        ("data.root", 7, "data.root must be a path, got 7"),
        ("model.hidden", 40, "model.hidden must be a list, got 40"),
        ("run", [], "run must be a JSON object"),
        ("outer.steps", 0, "outer.steps must be an integer >= 1, got 0"),
    ],
)
def test_json_is_read_strictly(path: str, value: object, message: str) -> None:
    values = to_json(TrainConfig())
    *groups, knob = path.split(".")
    target = values
    for group in groups:
        target = target[group]
    target[knob] = value
    with pytest.raises(ConfigError) as caught:
        from_json(TrainConfig, values)
    assert message in str(caught.value)


def test_knobs_are_set_by_name() -> None:
    config = with_knobs(TrainConfig(), {"outer.lr": 0.5, "outer.steps": 7, "meta.algorithm": "reptile"})
    expected = dict(knobs(TrainConfig())) | {"outer.lr": 0.5, "outer.steps": 7, "meta.algorithm": "reptile"}
    assert dict(knobs(config)) == expected
    for values, message in (
        ({"outer.learning_rate": 1.0}, "unknown knob outer.learning_rate"),
        ({"outer": 1.0}, "unknown knob outer"),
        ({"meta.algorithm": "newton"}, "meta.algorithm must be one of"),
        ({"inner.lam": 0.0}, "inner.lam must be a positive number"),  # with meta.algorithm imaml
    ):
        with pytest.raises(ConfigError, match=message):
            with_knobs(TrainConfig(), values)


def test_json_must_have_every_knob() -> None:
    values = to_json(TrainConfig())
    del values["inner"]["lam"]
    with pytest.raises(ConfigError, match=r"knob inner\.lam is missing"):
        from_json(TrainConfig, values)


def test_runs_of_before_there_were_photographs_are_read() -> None:
    values = to_json(TrainConfig())
    del values["augment"]
    for knob in ("image_size", "greyscale", "val_fraction", "test_fraction"):
        del values["data"][knob]
    assert from_json(TrainConfig, values) == TrainConfig()


@pytest.mark.parametrize(
    ("group", "knob", "value"),
    [
        (DataConfig, "ways", 1),
        (DataConfig, "shots", 0),
        (DataConfig, "train_shots", 0),
        (DataConfig, "queries", 0),
        (DataConfig, "noise", -0.1),
        (DataConfig, "condition_number", 0.5),
        (DataConfig, "image_size", 0),
        (DataConfig, "val_fraction", 1.0),
        (DataConfig, "test_fraction", 0.9),  # 0.16 are for validation
        (ModelConfig, "filters", 0),
        (ModelConfig, "hidden", (40, 0)),
        (InnerConfig, "lam", -0.1),
        (InnerConfig, "lam", float("nan")),
        (InnerConfig, "steps", 0),
        (InnerConfig, "lr", -0.1),
        (InnerConfig, "momentum", 1.0),
        (InnerConfig, "cg_steps", 0),
        (InnerConfig, "damping", -1.0),
        (InnerConfig, "backtracks", -1),
        (MetaConfig, "cg_steps", 0),
        (MetaConfig, "damping", -1.0),
        (MetaConfig, "solver_lr", 0.0),
        (InnerConfig, "betas", (1.0, 0.9)),
        (InnerConfig, "batch_size", 0),
        (OuterConfig, "lr", float("inf")),
        (OuterConfig, "lam_lr", 0.0),
        (OuterConfig, "betas", (0.9, 1.0)),
        (OuterConfig, "warmup_steps", -1),
        (OuterConfig, "clip_norm", 0.0),
        (OuterConfig, "final_lr_fraction", 1.5),
        (OuterConfig, "average", 1.0),
        (EvaluationConfig, "tasks", 1),
        (EvaluationConfig, "inner_steps", -1),
        (RunConfig, "seed", -1),
        (RunConfig, "threads", 0),
        (RunConfig, "log_every", 0),
        (RunConfig, "keep_checkpoints", 0),
    ],
)
def test_a_bad_value_is_named(group: type, knob: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        group(**{knob: value})
    message = str(caught.value)
    assert knob.replace("_", "-") in message
    assert f"got {value!r}" in message
    assert "\n" not in message


def test_knobs_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match=r"outer.warmup-steps must be smaller than outer.steps"):
        OuterConfig(steps=10, warmup_steps=10)
    with pytest.raises(ConfigError, match=r"model.name must be 'mlp' for the data set 'sinusoid'"):
        TrainConfig(data=DataConfig(name="sinusoid"), model=ModelConfig(name="conv4"))
    with pytest.raises(ConfigError, match=r"model.head must be 'own' for the data set 'sinusoid', which has no"):
        TrainConfig(data=DataConfig(name="sinusoid"), model=ModelConfig(name="mlp", head="shared"))
    with pytest.raises(ConfigError, match=r"model.head must be 'own' with meta.learn-lam 'parameter', which tells"):
        TrainConfig(model=ModelConfig(head="shared"), meta=MetaConfig(learn_lam="parameter"))
    with pytest.raises(ConfigError, match=r"model.feature-scale must be left out for mlp, got 2.0"):
        ModelConfig(name="mlp", feature_scale=2.0)


@pytest.mark.parametrize(
    ("meta", "inner", "message"),
    [
        ({"algorithm": "imaml"}, {"lam": 0.0}, "inner.lam must be a positive number with meta.algorithm 'imaml'"),
        (
            {"algorithm": "maml", "learn_lam": "global"},
            {"lam": 0.0},
            "inner.lam must be a positive number to be learnt",
        ),
        ({"algorithm": "maml", "solver": "neumann"}, {}, "meta.solver must be left out with meta.algorithm 'maml'"),
        ({"checkpoint_steps": True}, {}, "meta.checkpoint-steps must be left out with meta.algorithm 'imaml'"),
        ({"solver_lr": 0.1}, {}, "meta.solver-lr must be left out with meta.solver 'cg'"),
        (
            {"algorithm": "maml"},
            {"solver": "hessian_free"},
            "meta.algorithm must be 'imaml', 'fomaml' or 'reptile' with",
        ),
        (
            {"solver": "fixed_point"},
            {"solver": "hessian_free"},
            "meta.solver-lr must be given for the solver 'fixed_po",
        ),
        ({"algorithm": "reptile", "learn_lam": "layer"}, {}, "meta.learn-lam must be 'none' with meta.algorithm 'rep"),
        ({"algorithm": "fomaml", "learn_lam": "layer"}, {}, "meta.learn-lam must be 'none' with meta.algorithm 'fom"),
    ],
)
def test_algorithms_and_knobs_that_do_not_go_together(
    meta: dict[str, Any], inner: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(meta=MetaConfig(**meta), inner=InnerConfig(**inner))
    assert message in str(caught.value)


@pytest.mark.parametrize(("knob", "value"), [("optimizer", "adam"), ("proximal", "pullback"), ("batch_size", 5)])
def test_hessian_free_has_no_descent_rule(knob: str, value: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"inner\.{knob.replace('_', '-')} must be left out with inner\.solver 'hessian_free'"
    ):
        InnerConfig(solver="hessian_free", **{knob: value})


def test_every_knob_is_explained_once() -> None:
    """The line under a field is its help on the command line."""
    import ast
    import inspect

    import imaml_ext.training.config as module

    tree = ast.parse(inspect.getsource(module))
    for item in (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Config")):
        if item.name == "TrainConfig":
            continue
        for field, after in zip(item.body, item.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign):
                assert isinstance(after, ast.Expr), f"{item.name}.{field.target.id} has no help"  # type: ignore[union-attr]


def test_configurations_are_frozen_and_their_knobs_are_listed() -> None:
    config = TrainConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.outer.lr = 1.0  # type: ignore[misc]
    names = [name for name, _ in knobs(config)]
    assert len(names) == len(set(names))
    assert {"data.ways", "outer.lr", "run.seed"} <= set(names)
