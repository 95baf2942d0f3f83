"""What the recipes of the published Omniglot weights share (docs/reproduction/README.md)."""

from collections.abc import Mapping
from typing import Any

from imaml_ext.inner import GradientDescent, NewtonCG
from imaml_ext.recipes import omniglot_5w1s
from imaml_ext.settings import changed
from imaml_ext.solvers import CG
from imaml_ext.train.config import Outer
from imaml_ext.train.recipe import Recipe

_CG_STEPS = "algorithm.linear_solver.max_iterations"
# The features are three times as large, by which the last layer has λ / 9 for its own. NewtonCG stands that; gradient
# descent would run away. Weights trained so have the scale in them.
LARGER_FEATURES: dict[str, Any] = {"theta.feature_scale": 3.0}
# Vinyals' split, with a last layer that the classes share from the start.
VINYALS: dict[str, Any] = {"data.split_protocol": "vinyals", "theta.shared_head": True, _CG_STEPS: 5}
# With validations; a recipe says how often.
VALIDATED_VINYALS: dict[str, Any] = {**VINYALS, "evaluation.validation_tasks": 600}


def _newton(steps: int, cg_steps: int) -> NewtonCG:
    return NewtonCG(steps, linear_solver=CG(max_iterations=cg_steps, rtol=0.0), curvature="gauss_newton")


def from_random_parameters(
    steps: int, *, ways: int = 5, newton: bool = False, changes: Mapping[str, Any] = {}
) -> Recipe:
    """Trains with settings that learn more from a task, and from an hour, than the paper's.

    The outer rate belongs to the inner solver. 20-way tasks are dear and tell much each, so that few make a meta-step;
    NewtonCG then wants a lower rate, and large meta-gradients cut, or one of them undoes the training.
    """
    few_tasks = ways > 5
    rate = (5e-3 if few_tasks else 1e-2) if newton else 4e-3
    clip_norm = 0.3 if few_tasks and newton else None
    settings = {
        **{"tasks.ways": ways, "evaluation.tasks": 2000, "run.log_every": 100, "run.checkpoint_every": 1000},
        **{"algorithm.lam": 0.1, "algorithm.inner": _newton(8, 1) if newton else GradientDescent(8, lr=0.4)},
        _CG_STEPS: 5 if newton else 3,
        "outer": Outer(steps, 4 if few_tasks else 16, lr=rate, schedule="cosine", clip_norm=clip_norm),
    }
    return Recipe(changed(omniglot_5w1s.recipe.config, {**settings, **changes}))


def from_weights(
    weights: str, steps: int, *, ways: int = 5, newton: bool = False, seed: int = 2, changes: Mapping[str, Any] = {}
) -> Recipe:
    """Trains on from published weights, with a last layer that the classes share, on images shifted by a pixel.

    Support sets keep a curvature there that the implicit gradient can use, and CG takes five steps for it. Inner steps
    are finer, because larger ones overshoot at such parameters. The seed gives tasks that the weights have not seen.
    """
    settings = {
        **{"augment.crop_padding": 1, "theta.weights": weights, "theta.shared_head": True, "run.seed": seed},
        **{"algorithm.inner": _newton(5, 2) if newton else GradientDescent(16, lr=0.1), _CG_STEPS: 5},
        "outer.lr": 2e-3 if newton else 1e-3,
    }
    return from_random_parameters(steps, ways=ways, newton=newton, changes={**settings, **changes})


def on_larger_tasks(
    weights: str, steps: int, *, ways: int, shots: int, newton: bool = False, changes: Mapping[str, Any] = {}
) -> Recipe:
    """Goes on with few tasks of more ways or shots, from weights of 5-way 1-shot tasks with a shared last layer.

    Those tasks are dear: one of 20 ways and 5 shots costs as much as forty of 5 ways and 1 shot. Four make a meta-step.
    """
    tested = 1000 if ways <= 5 else 500 if shots == 1 else 200
    settings = {"tasks.shots": shots, "outer.meta_batch": 4, "evaluation.tasks": tested}
    settings |= {"run.log_every": 20, "run.checkpoint_every": 100}
    return from_weights(weights, steps, ways=ways, newton=newton, seed=3, changes={**settings, **changes})
