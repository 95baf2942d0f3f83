"""The recipes of the paper's Omniglot table: one beginning for all, and an end for each."""

from __future__ import annotations

from typing import Any

from imaml_ext.data import Augmentation, Omniglot
from imaml_ext.inner import GradientDescent, NewtonCG
from imaml_ext.meta import IMAML
from imaml_ext.models import Conv4
from imaml_ext.solvers import CG
from imaml_ext.train.config import EvaluationSettings, Outer, RunSettings, Tasks, Theta, TrainConfig
from imaml_ext.train.recipe import Recipe, Stage

_FIVE_WAYS = TrainConfig(
    data=Omniglot(validation=100),
    tasks=Tasks(ways=5, shots=1, train_queries=5),
    augment=Augmentation(crop_padding=1, affine=0.1),
    model=Conv4(filters=64),
    theta=Theta(shared_head=True),
    algorithm=IMAML(
        lam=0.1,
        inner=GradientDescent(steps=8, lr=0.4),
        linear_solver=CG(max_iterations=3),
        curvature="gauss_newton",
    ),
    outer=Outer(steps=5500, meta_batch=16, lr=4e-3, schedule="cosine", average=0.99),
    evaluation=EvaluationSettings(split="val", tasks=1000, every=1100, validation_tasks=1000),
    run=RunSettings(log_every=50, checkpoint_every=500),
)
_TWENTY_WAYS: dict[str, Any] = {
    "tasks.ways": 20,
    "augment.affine": 0.0,
    "outer": Outer(steps=5000, meta_batch=4, lr=2e-3, schedule="cosine", average=0.99),
    "evaluation.tasks": 200,
    "evaluation.every": 2500,
    "evaluation.validation_tasks": 200,
    "run.seed": 1,
}
_SMALL_STEPS: dict[str, Any] = {
    "algorithm.inner": GradientDescent(steps=16, lr=0.1),
    "algorithm.linear_solver.max_iterations": 5,
}
_NEWTON: dict[str, Any] = {
    "algorithm.inner": NewtonCG(steps=5, linear_solver=CG(max_iterations=2, rtol=0.0), curvature="gauss_newton"),
    "algorithm.linear_solver.max_iterations": 5,
    "theta.feature_scale": 3.0,
    "outer.steps": 3000,
    "evaluation.every": 1500,
    "run.seed": 2,
}
# Meta-steps and tasks in each, of a training on the cell's own kind of tasks.
_OWN_TASKS = {(5, 1): (200, 16), (5, 5): (200, 4), (20, 1): (200, 4), (20, 5): (60, 4)}


def omniglot(ways: int = 5, shots: int = 1, *, newton: bool = False) -> Recipe:
    """Returns the recipe of a cell of the table: iMAML by gradient descent, or by Newton-CG.

    Once there are features, tasks of 20 ways teach more per minute than those of 5, for tests of 5 ways too. Large
    inner steps learn fastest, but overshoot where they lead to: every recipe ends with small ones, or with Newton steps
    on larger features. Tasks of one shot also teach more for five shots than those of five, which take longer.
    """
    steps, tasks = _OWN_TASKS[ways, shots]
    own: dict[str, Any] = {"tasks.ways": ways, "tasks.shots": shots, "outer.steps": steps, "outer.meta_batch": tasks}
    own |= {"outer.lr": 5e-4, "run.seed": 3 if newton else 2, **({} if newton else _SMALL_STEPS)}
    own |= {"evaluation.split": "test", "evaluation.tasks": 3000 if ways == 5 else 1000, "evaluation.every": 0}
    newton_stages = (Stage("newton", _NEWTON),) if newton else ()
    more = {"outer.steps": 6000 if newton else 5000, "run.seed": 4}
    longer = (Stage("longer", more),) if shots == 5 else ()
    stages = (Stage("five-ways"), Stage("twenty-ways", _TWENTY_WAYS), *newton_stages, *longer, Stage("own-tasks", own))
    return Recipe(_FIVE_WAYS, stages)
