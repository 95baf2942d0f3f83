"""The parts that the recipes of the published weights are made of (docs/reproduction/README.md)."""

from typing import Any

from imaml_ext.data import Augmentation
from imaml_ext.inner import GradientDescent
from imaml_ext.recipes import omniglot_5w1s
from imaml_ext.reproduction.omniglot_table import NEWTON
from imaml_ext.settings import changed
from imaml_ext.train.config import Outer
from imaml_ext.train.recipe import Recipe


def from_random_parameters(*, ways: int = 5, shots: int = 1, newton: bool, steps: int) -> Recipe:
    """Returns the paper's algorithm with numbers that learn more from a task and from an hour.

    The outer rate belongs to the inner solver. 20-way tasks are dear and tell much each, so that few make a meta-step;
    NewtonCG then wants a lower rate, and large meta-gradients cut, or one of them undoes the training.
    """
    few = ways > 5
    rate, clip = ((5e-3, 0.3) if few else (1e-2, None)) if newton else (4e-3, None)
    outer = Outer(steps=steps, meta_batch=4 if few else 16, lr=rate, schedule="cosine", clip_norm=clip)
    changes = {"tasks.ways": ways, "tasks.shots": shots, "algorithm.lam": 0.1, "outer": outer, "evaluation.tasks": 2000}
    changes["algorithm.inner"] = NEWTON if newton else GradientDescent(steps=8, lr=0.4)
    changes["algorithm.linear_solver.max_iterations"] = 5 if newton else 3
    return _with(omniglot_5w1s.recipe, changes | {"run.log_every": 100, "run.checkpoint_every": 1000})


def with_shared_head(weights: str, recipe: Recipe) -> Recipe:
    """Returns the recipe begun with weights, a last layer that the classes share, and images shifted by a pixel.

    At such parameters support sets keep a curvature that the implicit gradient can use: CG takes five steps for it, and
    gradient descent smaller ones where the ways are few. The seed gives other tasks than the weights have seen.
    """
    smaller = isinstance(recipe.config.algorithm.inner, GradientDescent) and recipe.config.tasks.ways <= 5
    changes = {"theta.weights": weights, "theta.shared_head": True, "augment": Augmentation(crop_padding=1)}
    changes |= {"algorithm.inner.lr": 0.2} if smaller else {}
    return _with(recipe, changes | {"algorithm.linear_solver.max_iterations": 5, "outer.lr": 2e-3, "run.seed": 1})


def by_smaller_inner_steps(weights: str, *, newton: bool, feature_scale: float = 1.0, **tasks: int) -> Recipe:
    """Returns the end of a training by larger inner steps, which overshoot at what they have made of the parameters.

    NewtonCG takes fewer steps then, each of more CG iterations. Features three times as large leave the last layer
    lambda / 9; NewtonCG stands that, gradient descent would run away. Weights trained so have the scale in them.
    """
    recipe = with_shared_head(weights, from_random_parameters(newton=newton, **tasks))
    finer = {"steps": 5, "linear_solver.max_iterations": 2} if newton else {"steps": 16, "lr": 0.1}
    changes = {"theta.feature_scale": feature_scale, "outer.lr": 2e-3 if newton else 1e-3, "run.seed": 2}
    return _with(recipe, changes | {f"algorithm.inner.{name}": value for name, value in finer.items()})


def for_other_tasks(weights: str, *, ways: int, shots: int, newton: bool, steps: int) -> Recipe:
    """Returns a short training on tasks of another kind, which are dear, from weights with a shared head."""
    recipe = by_smaller_inner_steps(weights, ways=ways, shots=shots, newton=newton, steps=steps)
    changes = {"evaluation.tasks": 1000 if ways <= 5 else 500 if shots == 1 else 200, "outer.meta_batch": 4}
    return _with(recipe, changes | {"run.log_every": 20, "run.checkpoint_every": 100, "run.seed": 3})


def on_vinyals_split(recipe: Recipe) -> Recipe:
    """Returns the recipe on Vinyals' split, with a shared head; 5-way 1-shot is tested on validation classes too."""
    changes = {"data.split_protocol": "vinyals", "theta.shared_head": True, "algorithm.linear_solver.max_iterations": 5}
    if (recipe.config.tasks.ways, recipe.config.tasks.shots) == (5, 1):
        changes |= {"evaluation.every": min(500, recipe.config.outer.steps // 2), "evaluation.validation_tasks": 600}
    return _with(recipe, changes)


def _with(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    return Recipe(changed(recipe.config, changes))
