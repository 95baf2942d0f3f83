"""Sinusoid regression from 5 and 10 points by every algorithm: squared error against the inner steps taken at test.

Both are the recipe `sinusoid`; what an algorithm sets differently is in ALGORITHM_CHANGES.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from imaml_ext.errors import RunError
from imaml_ext.files import atomic_write, json_bytes
from imaml_ext.inner import GradientDescent, NewtonCG
from imaml_ext.meta import FOMAML, MAML, Reptile
from imaml_ext.progress import ProgressBar
from imaml_ext.reproduction.cells import REPTILE, TRIAL, Cells, Outcomes, Report, cell, run_cells
from imaml_ext.reproduction.figures import LABELS, STYLES, curve_with_band, finish, learning_curve, panels
from imaml_ext.reproduction.options import ALGORITHMS, Sinusoid
from imaml_ext.reproduction.results import markdown_table, read_json
from imaml_ext.settings import changed
from imaml_ext.train.checkpoint import load_newest
from imaml_ext.train.evaluation import evaluate
from imaml_ext.train.experiment import Experiment, build
from imaml_ext.train.recipe import load_recipe
from imaml_ext.train.run_directory import RunDirectory, read_config

SHOTS = {"5shot": "5 points", "10shot": "10 points"}
TEST_STEPS = (0, 1, 2, 3, 5, 10, 20, 50)
_TASKS_DRAWN, _POINTS_DRAWN = 3, 200

# MAML, first-order MAML: Finn et al. (2017), section 5.1, with five steps in place of one. Reptile: Nichol et al.
# (2018), section 2, with the gradient of all training points in place of batches. None of them has a λ.
ALGORITHM_CHANGES: dict[str, dict[str, Any]] = {
    "imaml-gd": {},
    "imaml-hf": {"algorithm.inner": NewtonCG(steps=3, curvature="gauss_newton")},
    "maml": {"algorithm": MAML(inner=GradientDescent(steps=5, lr=0.01))},
    "fomaml": {"algorithm": FOMAML(inner=GradientDescent(steps=5, lr=0.01))},
    "reptile": {**REPTILE, "algorithm": Reptile(inner=GradientDescent(steps=32, lr=0.02)), "tasks.train_shots": 50},
}
_TRIAL = TRIAL | {"outer.steps": 4, "model.hidden": (8,)}
BUDGETS: dict[str, dict[str, Any]] = {"small": {}, "published": {"outer.steps": 30_000}, "trial": _TRIAL}


def sinusoid_cells(options: Sinusoid) -> Cells:
    """Returns the configuration of every cell, SHOTS/ALGORITHM."""
    recipe = load_recipe("sinusoid").config
    bases = {shots: changed(recipe, {"tasks.shots": int(shots.removesuffix("shot"))}) for shots in SHOTS}
    return {
        f"{shots}/{algorithm}": cell(base, options, BUDGETS[options.budget], ALGORITHM_CHANGES[algorithm])
        for shots, base in bases.items()
        for algorithm in ALGORITHMS
    }


def run(options: Sinusoid, *, command: str = "") -> None:
    def report(found: Outcomes) -> Report:
        adaptation = {name: _adaptation(outcome.directory) for name, outcome in found.items() if outcome.test}
        errors, functions = _draw_errors(options, found, adaptation), _draw_functions(adaptation)
        figures = {"sinusoid.png": errors, "functions.png": functions}
        return Report(_table(options, found), figures, {"adaptation": adaptation})

    run_cells(options, sinusoid_cells(options), report, command=command)


def _adaptation(directory: RunDirectory) -> dict[str, Any]:
    """Test error after each number of inner steps, and some adapted functions; kept in adaptation.json of the run."""
    path = directory.path / "adaptation.json"
    adaptation = read_json(path, "remove it, and it is made again")
    if adaptation is None:
        adaptation = _adapt(directory)
        atomic_write(path, json_bytes(adaptation))
    return adaptation


def _adapt(directory: RunDirectory) -> dict[str, Any]:
    config, saved = read_config(directory).config, load_newest(directory.checkpoints)
    if saved is None:
        raise RunError(f"{directory.path} has no checkpoint: there is nothing to adapt")
    settings, usual = config.evaluation, config.test_inner_steps
    errors, functions = [], {}
    with ProgressBar("adapting", total=len({*TEST_STEPS, usual})) as bar:
        for done, steps in enumerate(sorted({*TEST_STEPS, usual}), 1):
            experiment = build(changed(config, {"evaluation.inner_steps": steps}))
            theta = saved.evaluated["theta"].to(experiment.device, experiment.dtype)
            tested = evaluate(experiment, theta, split="test", tasks=settings.tasks, seed=settings.seed)
            errors.append({"inner_steps": steps, "loss": tested.loss, "interval": tested.loss_interval})
            if steps in (0, usual):
                functions["before" if steps == 0 else "after"] = _functions(experiment, theta)
            bar.update(done, {"inner steps": steps})
    return {"usual_steps": usual, "errors": errors, "functions": functions}


def _functions(experiment: Experiment, theta: Tensor) -> dict[str, Any]:
    """The model after the inner steps of the evaluation, on a grid, for the first test tasks."""
    episodes = experiment.sampler("test", tasks=_TASKS_DRAWN, seed=experiment.config.evaluation.seed).sample(0)
    phi = experiment.test_algorithm.adapt(theta, episodes.support)  # [B, N]
    grid = torch.linspace(-5, 5, _POINTS_DRAWN, dtype=phi.dtype, device=phi.device)
    with torch.no_grad():
        values = experiment.loss.outputs(phi, grid[None, :, None].expand(len(phi), -1, 1)).squeeze(-1)  # [B, grid]
    points = {"support_x": episodes.support_x, "support_y": episodes.support_y}  # [B, points, 1]
    points["task_x"] = torch.cat([episodes.support_x, episodes.query_x], 1)
    points["task_y"] = torch.cat([episodes.support_y, episodes.query_y], 1)
    return {"x": grid.tolist(), "y": values.tolist()} | {name: p.squeeze(-1).tolist() for name, p in points.items()}


def _table(options: Sinusoid, found: Outcomes) -> str:
    def entry(name: str) -> str:
        if name not in found:
            return "not run"
        test = found[name].test
        if test is None:
            return "diverged"
        return f"{test['loss']:.3f} ± {test['loss_interval']:.3f} ({test['inner_steps']} steps)"

    rows = [[LABELS[algorithm], *(entry(f"{shots}/{algorithm}") for shots in SHOTS)] for algorithm in ALGORITHMS]
    heading = "Mean squared error on test tasks, ± 95 % interval, after the inner steps in brackets"
    return f"{heading}; budget `{options.budget}`.\n\n{markdown_table(['algorithm', *SHOTS.values()], rows)}"


def _draw_errors(options: Sinusoid, found: Outcomes, adaptation: Mapping[str, Any]) -> Figure:
    """One row per shot: error against inner steps at test with its 95 % band, and the learning curves."""
    figure, axes = panels(f"Sinusoid regression, budget {options.budget}", 2, 2, size=(11, 7.6))
    for (left, right), (shots, points) in zip(axes, SHOTS.items(), strict=True):
        left.set_yscale("log")
        left.set_xscale("symlog", linthresh=1, base=2)
        for algorithm in ALGORITHMS:
            name = f"{shots}/{algorithm}"
            if name in adaptation:
                _draw_error(left, adaptation[name], **STYLES[algorithm])
            if name in found:
                learning_curve(right, found[name].directory, "query_loss", **STYLES[algorithm])
        left.set(xlabel="inner steps at test (dot: as tested)", ylabel="mean squared error, 95 % band")
        finish(left, title=f"{points}: test tasks")
        finish(right, title=f"{points}: training tasks, running mean", xlabel="meta-step", ylabel="query loss")
    return figure


def _draw_error(axis: Axes, adaptation: Mapping[str, Any], *, color: str, label: str) -> None:
    # A model that runs away at test has no error that a JSON file could hold, or that a figure could show.
    errors = [error for error in adaptation["errors"] if error["loss"] is not None and error["interval"] is not None]
    steps, losses = ([error[name] for error in errors] for name in ("inner_steps", "loss"))
    low, high = ([max(error["loss"] + sign * error["interval"], 1e-6) for error in errors] for sign in (-1, 1))
    curve_with_band(axis, steps, losses, low, high, color=color, label=label)
    for error in errors:
        if error["inner_steps"] == adaptation["usual_steps"]:
            axis.plot(error["inner_steps"], error["loss"], "o", color=color, markersize=4)


def _draw_functions(adaptation: Mapping[str, Any]) -> Figure:
    """One row per algorithm, 10 points: the model before and after adaptation to test tasks, the same in all rows."""
    names = [name for name in adaptation if name.startswith("10shot/")] or list(adaptation)
    rows, size = max(1, len(names)), (4 * _TASKS_DRAWN, 2.2 * max(1, len(names)) + 0.6)
    figure, axes = panels("Adapted functions on test tasks", rows, _TASKS_DRAWN, size=size, sharex=True, sharey="col")
    for row, name in zip(axes, names, strict=False):
        shots, algorithm = name.split("/")
        before, after = (adaptation[name]["functions"][when] for when in ("before", "after"))
        row[0].set_ylabel(f"{LABELS[algorithm]}\n{SHOTS[shots]}", fontsize=8)
        for task, axis in enumerate(row):
            axis.plot(before["x"], before["y"][task], color="#bbbbbb", linestyle="--", label="before")
            axis.plot(after["x"], after["y"][task], color=STYLES[algorithm]["color"], label="after")
            axis.scatter(after["task_x"][task], after["task_y"][task], s=8, color="#888888", label="task")
            axis.scatter(after["support_x"][task], after["support_y"][task], marker="^", color="black", label="support")
            finish(axis, legend=axis is axes[0, 0])
    return figure
