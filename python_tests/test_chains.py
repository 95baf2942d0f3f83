"""The recipes of the published weights: each of them loads and is described, and two are spelled out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from imaml_ext.pretrained.weights import pretrained_names
from imaml_ext.reproduction import chains
from imaml_ext.settings import leaves
from imaml_ext.train.config import TrainConfig
from imaml_ext.train.recipe import load_recipe, recipe_names

CHAINS = Path(chains.__file__).parent
NAMES = recipe_names((CHAINS,))


def test_there_is_a_chain_for_each_of_the_published_weights() -> None:
    assert len(NAMES) == 21
    assert set(NAMES) == set(pretrained_names())


@pytest.mark.parametrize("name", NAMES)
def test_a_chain_loads_and_says_what_it_costs(name: str) -> None:
    recipe = load_recipe(name, (CHAINS,))
    assert isinstance(recipe.config, TrainConfig)
    summary, empty, *head = recipe.description.strip().splitlines()
    assert summary.startswith("Omniglot, ")
    assert not empty
    words = (
        rf"Command: imaml train {name} --data\.root FOLDER",
        r"Time: \d+ minutes on one (busy )?CPU core\.",
        r"Accuracy: \d\d\.\d\d ± \d\.\d\d % on [\d,]+ test tasks\.",
    )
    assert len(head) == len(words)
    for line, expected in zip(head, words, strict=True):
        assert re.fullmatch(expected, line), line
    weights = recipe.config.theta.weights
    assert weights is None or weights in NAMES


NEWTON = {
    "data": "omniglot",
    "model": "conv4",
    "model.filters": 64,
    "tasks.shots": 1,
    "tasks.queries": 5,
    "algorithm": "imaml",
    "algorithm.lam": 0.1,
    "algorithm.damping": 0.0,
    "algorithm.curvature": "gauss_newton",
    "algorithm.on_breakdown": "keep",
    "algorithm.linear_solver": "cg",
    "algorithm.linear_solver.max_iterations": 5,
    "algorithm.linear_solver.rtol": 1e-5,
    "algorithm.inner": "newton_cg",
    "algorithm.inner.curvature": "gauss_newton",
    "outer.optimizer": "adam",
    "outer.schedule": "cosine",
    "outer.warmup_steps": 0,
    "outer.average": 0.0,
    "evaluation.tasks": 2000,
    "evaluation.seed": 0,
    "run.log_every": 100,
    "run.checkpoint_every": 1000,
}
SPELLED_OUT: dict[str, dict[str, Any]] = {
    "omniglot-20w1s-hf": {
        "data.split_protocol": "1200/423",
        "tasks.ways": 20,
        "augment.crop_padding": 0,
        "theta.weights": None,
        "theta.shared_head": False,
        "theta.feature_scale": 1.0,
        "algorithm.inner.steps": 8,
        "algorithm.inner.linear_solver.max_iterations": 1,
        "outer.steps": 7000,
        "outer.meta_batch": 4,
        "outer.lr": 5e-3,
        "outer.clip_norm": 0.3,
        "evaluation.every": 0,
        "run.seed": 0,
    },
    "omniglot-vinyals-5w1s-hf": {
        "data.split_protocol": "vinyals",
        "tasks.ways": 5,
        "augment.crop_padding": 1,
        "theta.weights": "omniglot-vinyals-start",
        "theta.shared_head": True,
        "theta.feature_scale": 3.0,
        "algorithm.inner.steps": 5,
        "algorithm.inner.linear_solver.max_iterations": 2,
        "outer.steps": 3000,
        "outer.meta_batch": 16,
        "outer.lr": 2e-3,
        "outer.clip_norm": None,
        "evaluation.every": 500,
        "evaluation.validation_tasks": 600,
        "run.seed": 2,
    },
}


@pytest.mark.parametrize("name", SPELLED_OUT)
def test_a_chain_is_spelled_out(name: str) -> None:
    settings = dict(leaves(load_recipe(name, (CHAINS,)).config))
    expected = NEWTON | SPELLED_OUT[name]
    assert {path: settings[path] for path in expected} == expected
