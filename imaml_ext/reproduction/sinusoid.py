"""Sinusoid regression from 5 and 10 points by every algorithm: squared error against the inner steps taken at test.

A shot is a preset, `sinusoid-5shot` or `sinusoid-10shot`; what an algorithm sets differently is in ALGORITHM_KNOBS.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from imaml_ext.errors import RunError
from imaml_ext.files import atomic_write, json_bytes
from imaml_ext.reproduce.cells import (
    Cell,
    Outcome,
    cell,
    common_knobs,
    draw_learning_curve,
    train_cells,
    write_outcomes,
)
from imaml_ext.reproduce.options import ALGORITHMS, Sinusoid
from imaml_ext.reproduce.results import COLORS, LABELS, markdown_table
from imaml_ext.training.evaluation import evaluate, open_run
from imaml_ext.training.experiment import Experiment
from imaml_ext.training.presets import PRESETS
from imaml_ext.training.progress import ProgressBar
from imaml_ext.training.reports import write_figure
from imaml_ext.training.run_directory import RunDirectory, read_config

SHOTS = ("5shot", "10shot")
TEST_STEPS = (0, 1, 2, 3, 5, 10, 20, 50)
_TASKS_DRAWN, _POINTS_DRAWN = 3, 200

# MAML, first-order MAML: Finn et al. (2017), section 5.1, with five steps in place of one. Reptile: Nichol et al.
# (2018), section 2, with the gradient of all training points in place of batches. None of them has a λ.
ALGORITHM_KNOBS: dict[str, dict[str, Any]] = {
    "imaml-gd": {},
    "imaml-hf": {"inner.solver": "hessian_free", "inner.steps": 3},
    "maml": {"meta.algorithm": "maml", "inner.lam": 0.0, "inner.steps": 5},
    "fomaml": {"meta.algorithm": "fomaml", "inner.lam": 0.0, "inner.steps": 5},
    "reptile": {
        "meta.algorithm": "reptile",
        "data.train_shots": 50,
        "inner.lam": 0.0,
        "inner.steps": 32,
        "inner.lr": 0.02,
        "outer.optimizer": "sgd",
        "outer.lr": 1.0,
        "outer.schedule": "linear",
    },
}
_TRIAL = {
    "outer.steps": 4,
    "outer.meta_batch": 2,
    "model.hidden": (8,),
    "evaluation.tasks": 10,
    "evaluation.every": 0,
    "run.log_every": 1,
}
BUDGETS: dict[str, dict[str, Any]] = {"small": {}, "published": {"outer.steps": 30_000}, "trial": _TRIAL}
_COMMON = {"run.tensorboard": False}


def sinusoid_cells(options: Sinusoid) -> list[Cell]:
    layers = (_COMMON, BUDGETS[options.budget])
    return [
        cell(
            f"{shots}/{algorithm}",
            PRESETS[f"sinusoid-{shots}"].config,
            *layers,
            ALGORITHM_KNOBS[algorithm],
            common_knobs(options),
        )
        for shots in SHOTS
        for algorithm in ALGORITHMS
    ]


def run(options: Sinusoid, *, command: str = "") -> None:
    def draw(found: Mapping[str, Outcome]) -> None:
        adaptation = {name: _adaptation(outcome.directory) for name, outcome in found.items() if outcome.test}
        write_outcomes(options, found, command=command, adaptation=adaptation)
        atomic_write(options.output_dir / "sinusoid.md", _table(options, found).encode())
        write_figure(_draw_errors(options, found, adaptation), options.output_dir / "sinusoid.png")
        write_figure(_draw_functions(adaptation), options.output_dir / "functions.png")

    train_cells(sinusoid_cells(options), options, command=command, draw=draw)


def _adaptation(directory: RunDirectory) -> dict[str, Any]:
    """Test error after each number of inner steps, and some adapted functions; kept in adaptation.json of the run.

    Raises:
        RunError: that file, or the run's newest checkpoint, is damaged.
    """
    path = directory.path / "adaptation.json"
    try:
        adaptation: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        adaptation = _adapt(directory)
        atomic_write(path, json_bytes(adaptation))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}): remove it, and it is made again") from error
    return adaptation


def _adapt(directory: RunDirectory) -> dict[str, Any]:
    config = read_config(directory).config
    settings = config.evaluation
    usual = config.test_inner_steps
    errors, functions = [], {}
    with ProgressBar("adapting", total=len(TEST_STEPS)) as bar:
        for done, steps in enumerate(sorted({*TEST_STEPS, usual}), 1):
            experiment, theta = open_run(directory, replace(config, evaluation=replace(settings, inner_steps=steps)))
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
    truth = torch.cat([episodes.support_x, episodes.query_x], 1), torch.cat([episodes.support_y, episodes.query_y], 1)
    return {
        "x": grid.tolist(),
        "y": values.tolist(),
        "support_x": episodes.support_x.squeeze(-1).tolist(),
        "support_y": episodes.support_y.squeeze(-1).tolist(),
        "task_x": truth[0].squeeze(-1).tolist(),
        "task_y": truth[1].squeeze(-1).tolist(),
    }


def _table(options: Sinusoid, found: Mapping[str, Outcome]) -> str:
    rows = []
    for algorithm in ALGORITHMS:
        row = [LABELS[algorithm]]
        for shots in SHOTS:
            outcome = found.get(f"{shots}/{algorithm}")
            if outcome is None:
                row.append("not run")
            elif outcome.test is None:
                row.append("diverged")
            else:
                steps = outcome.test["inner_steps"]
                loss, interval = outcome.test["loss"], outcome.test["loss_interval"]
                row.append(f"{loss:.3f} ± {interval:.3f} ({steps} steps)")
        rows.append(row)
    head = ["algorithm", *(f"{shots.removesuffix('shot')} points" for shots in SHOTS)]
    return (
        f"Mean squared error on test tasks, ± 95 % interval, after the inner steps in brackets; "
        f"budget `{options.budget}`.\n\n{markdown_table(head, rows)}"
    )


def _draw_errors(options: Sinusoid, found: Mapping[str, Outcome], adaptation: Mapping[str, Any]) -> Figure:
    """A row a shot: error against inner steps at test with its 95 % band, and the learning curves."""
    figure = Figure(figsize=(11, 3.8 * len(SHOTS)), layout="constrained")
    figure.suptitle(f"Sinusoid regression, budget {options.budget}")
    for (left, right), shots in zip(figure.subplots(len(SHOTS), 2), SHOTS, strict=True):
        for algorithm in ALGORITHMS:
            name = f"{shots}/{algorithm}"
            style: dict[str, Any] = {"color": COLORS[algorithm], "label": LABELS[algorithm]}
            if name in adaptation:
                _draw_error(left, adaptation[name], **style)
            if name in found:
                draw_learning_curve(right, found[name], "query_loss", **style)
        points = shots.removesuffix("shot")
        left.set(title=f"{points} points: test tasks", xlabel="inner steps at test (dot: as tested)", yscale="log")
        left.set_xscale("symlog", linthresh=1, base=2)
        left.set_ylabel("mean squared error, 95 % band")
        right.set(title=f"{points} points: training tasks, running mean", xlabel="meta-step", yscale="log")
        right.set_ylabel("query loss")
        for axis in (left, right):
            axis.grid(alpha=0.3)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(frameon=False, fontsize=8)
    return figure


def _draw_error(axis: Axes, adaptation: Mapping[str, Any], *, color: str, label: str) -> None:
    # A model that runs away at test has no error that a JSON file could hold, or that a figure could show.
    errors = [error for error in adaptation["errors"] if error["loss"] is not None and error["interval"] is not None]
    steps = [error["inner_steps"] for error in errors]
    axis.plot(steps, [error["loss"] for error in errors], color=color, label=label)
    low, high = ([max(error["loss"] + sign * error["interval"], 1e-6) for error in errors] for sign in (-1, 1))
    axis.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    dot = [error for error in errors if error["inner_steps"] == adaptation["usual_steps"]]
    axis.plot([error["inner_steps"] for error in dot], [error["loss"] for error in dot], "o", color=color, markersize=4)


def _draw_functions(adaptation: Mapping[str, Any]) -> Figure:
    """A row an algorithm, 10 points: the model before and after adaptation to test tasks, the same ones in all rows."""
    names = [f"{SHOTS[-1]}/{algorithm}" for algorithm in ALGORITHMS if f"{SHOTS[-1]}/{algorithm}" in adaptation]
    names = names or list(adaptation)
    figure = Figure(figsize=(4 * _TASKS_DRAWN, 2.2 * max(1, len(names)) + 0.6), layout="constrained")
    axes = figure.subplots(max(1, len(names)), _TASKS_DRAWN, squeeze=False, sharex=True, sharey="col")
    for row, name in zip(axes, names, strict=False):
        shots, algorithm = name.split("/")
        drawn = adaptation[name]["functions"]
        row[0].set_ylabel(f"{LABELS[algorithm]}\n{shots.removesuffix('shot')} points", fontsize=8)
        for task, axis in enumerate(row):
            after, before = drawn["after"], drawn["before"]
            axis.plot(before["x"], before["y"][task], color="#bbbbbb", linestyle="--", label="before")
            axis.plot(after["x"], after["y"][task], color=COLORS[algorithm], label="after")
            axis.scatter(after["task_x"][task], after["task_y"][task], s=8, color="#888888", label="task")
            axis.scatter(after["support_x"][task], after["support_y"][task], marker="^", color="black", label="support")
            axis.grid(alpha=0.3)
    axes[0, 0].legend(frameon=False, fontsize=7)
    figure.suptitle("Adapted functions on test tasks")
    return figure
