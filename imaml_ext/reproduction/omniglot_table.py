"""The paper's Omniglot table: five algorithms on four kinds of tasks, beside the published figures.

A column is a preset, `omniglot-5w1s` and so on: data and network. What an algorithm sets differently is in
ALGORITHM_KNOBS, how long it is trained in BUDGETS; nothing else decides a cell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from imaml_ext.files import atomic_write
from imaml_ext.reproduce.cells import (
    Cell,
    Outcome,
    accuracy_bars,
    cell,
    common_knobs,
    draw_learning_curve,
    error_axis,
    train_cells,
    write_outcomes,
)
from imaml_ext.reproduce.options import ALGORITHMS, OmniglotTable
from imaml_ext.reproduce.results import COLORS, LABELS, markdown_table
from imaml_ext.training.presets import PRESETS
from imaml_ext.training.reports import write_figure

COLUMNS = {"5w1s": "5-way 1-shot", "5w5s": "5-way 5-shot", "20w1s": "20-way 1-shot", "20w5s": "20-way 5-shot"}

# Accuracy in percent and its 95 % interval: table 2 of Rajeswaran et al., arXiv 1909.04630.
PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "maml": {"5w1s": (98.7, 0.4), "5w5s": (99.9, 0.1), "20w1s": (95.8, 0.3), "20w5s": (98.9, 0.2)},
    "fomaml": {"5w1s": (98.3, 0.5), "5w5s": (99.2, 0.2), "20w1s": (89.4, 0.5), "20w5s": (97.9, 0.1)},
    "reptile": {"5w1s": (97.68, 0.04), "5w5s": (99.48, 0.06), "20w1s": (89.43, 0.14), "20w5s": (97.12, 0.32)},
    "imaml-gd": {"5w1s": (99.16, 0.35), "5w5s": (99.67, 0.12), "20w1s": (94.46, 0.42), "20w5s": (98.69, 0.1)},
    "imaml-hf": {"5w1s": (99.50, 0.26), "5w5s": (99.74, 0.11), "20w1s": (96.18, 0.36), "20w5s": (99.14, 0.1)},
}

# iMAML: as omniglot-5w1s-1000, which says why not the paper's letter; Hessian-free by many short directions, which
# reach a lower objective for their cost than few long ones (docs/algorithms.md), and at an outer rate of its own: with
# 3e-3 it learns more slowly than gradient descent, with 1e-2 faster, where gradient descent gains nothing. MAML,
# first-order MAML: Finn et al. (2017), appendix A.1. Reptile: Nichol et al. (2018), appendix A, but for an inner rate
# ten times theirs: Adam begins anew with every task, and there are a twentieth of their meta-steps.
_MAML_KNOBS = {
    5: {"inner.lam": 0.0, "inner.steps": 1, "inner.lr": 0.4, "evaluation.inner_steps": 3},
    20: {"inner.lam": 0.0, "inner.steps": 5, "inner.lr": 0.1},
}
_IMAML_KNOBS = {"inner.lam": 0.1, "meta.cg_steps": 5, "meta.curvature": "gauss_newton"}
_REPTILE_KNOBS = {
    "meta.algorithm": "reptile",
    "data.train_shots": 10,
    "inner.lam": 0.0,
    "inner.optimizer": "adam",
    "inner.betas": (0.0, 0.999),
    "inner.lr": 1e-2,
    "evaluation.inner_steps": 50,
    "outer.optimizer": "sgd",
    "outer.lr": 1.0,
    "outer.schedule": "linear",
}
ALGORITHM_KNOBS: dict[str, dict[int, dict[str, Any]]] = {  # by algorithm and ways
    "imaml-gd": {
        5: {**_IMAML_KNOBS, "inner.steps": 16, "inner.lr": 0.4},
        20: {**_IMAML_KNOBS, "inner.steps": 25, "inner.lr": 0.4},
    },
    "imaml-hf": {
        ways: {
            **_IMAML_KNOBS,
            "inner.solver": "hessian_free",
            "inner.steps": 8,
            "inner.cg_steps": 1,
            "outer.lr": 1e-2,
        }
        for ways in (5, 20)
    },
    "maml": {ways: {"meta.algorithm": "maml", **knobs} for ways, knobs in _MAML_KNOBS.items()},
    "fomaml": {ways: {"meta.algorithm": "fomaml", **knobs} for ways, knobs in _MAML_KNOBS.items()},
    "reptile": {
        5: {**_REPTILE_KNOBS, "inner.steps": 5, "inner.batch_size": 10},
        20: {**_REPTILE_KNOBS, "inner.steps": 10, "inner.batch_size": 20},
    },
}

_TRIAL = {"outer.steps": 4, "outer.meta_batch": 2, "model.filters": 4, "evaluation.tasks": 10, "run.log_every": 1}
BUDGETS: dict[str, dict[int, dict[str, Any]]] = {  # by name and ways
    "small": {
        5: {"outer.steps": 5000, "outer.meta_batch": 16, "outer.lr": 3e-3, "outer.schedule": "cosine"},
        20: {"outer.steps": 1000, "outer.meta_batch": 4, "outer.lr": 3e-3, "outer.schedule": "cosine"},
    },
    "published": {
        5: {"outer.steps": 20_000, "outer.meta_batch": 32, "outer.lr": 1e-3, "outer.schedule": "cosine"},
        20: {"outer.steps": 20_000, "outer.meta_batch": 16, "outer.lr": 1e-3, "outer.schedule": "cosine"},
    },
    "trial": {5: _TRIAL, 20: _TRIAL},
}
_COMMON = {"evaluation.tasks": 1000, "run.tensorboard": False}


def table_cells(options: OmniglotTable) -> list[Cell]:
    cells = []
    for column in COLUMNS:
        base = PRESETS[f"omniglot-{column}"].config
        ways = base.data.ways
        for algorithm in ALGORITHMS:
            layers = (_COMMON, BUDGETS[options.budget][ways], ALGORITHM_KNOBS[algorithm][ways], common_knobs(options))
            cells.append(cell(f"{column}/{algorithm}", base, *layers))
    return cells


def run(options: OmniglotTable, *, command: str = "") -> None:
    def draw(found: Mapping[str, Outcome]) -> None:
        write_outcomes(options, found, command=command, published=PUBLISHED)
        atomic_write(options.output_dir / "omniglot-table.md", _table(options, found).encode())
        write_figure(_draw_table(options, found), options.output_dir / "omniglot-table.png")
        write_figure(_draw_curves(options, found), options.output_dir / "learning-curves.png")

    train_cells(table_cells(options), options, command=command, draw=draw)


def _table(options: OmniglotTable, found: Mapping[str, Outcome]) -> str:
    rows = []
    for algorithm in ALGORITHMS:
        here, published = [], []
        for column in COLUMNS:
            outcome = found.get(f"{column}/{algorithm}")
            here.append("not run" if outcome is None else outcome.accuracy)
            mean, interval = PUBLISHED[algorithm][column]
            published.append(f"{mean} ± {interval}")
        rows += [[LABELS[algorithm], "here", *here], ["", "published", *published]]
    tasks = {outcome.test["tasks"] for outcome in found.values() if outcome.test is not None}
    heading = f"Test accuracy (%), ± 95 % interval, on {' or '.join(map(str, sorted(tasks))) or 'no'} tasks"
    return (
        f"{heading}; {options.data}, budget `{options.budget}`.\n\n"
        + markdown_table(["algorithm", "", *COLUMNS.values()], rows)
        + "\nPublished: Rajeswaran et al., arXiv 1909.04630, table 2.\n"
    )


def _draw_table(options: OmniglotTable, found: Mapping[str, Outcome]) -> Figure:
    """Error rates, a panel a column: here as filled points, published as hollow ones."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    figure.suptitle(f"Accuracy on {options.data}, budget {options.budget}: filled here, hollow published")
    for axis, (column, title) in zip(figure.subplots(1, len(COLUMNS), sharey=True), COLUMNS.items(), strict=True):
        for row, algorithm in enumerate(ALGORITHMS):
            mean, interval = PUBLISHED[algorithm][column]
            style: dict[str, Any] = {"color": COLORS[algorithm], "marker": "o", "linestyle": "none", "capsize": 2}
            axis.errorbar(mean, row + 0.15, xerr=interval, markerfacecolor="white", **style)
            if f"{column}/{algorithm}" in found:
                accuracy, error = accuracy_bars([found[f"{column}/{algorithm}"]])
                axis.errorbar(accuracy, [row - 0.15], xerr=error, **style)
        axis.set(title=title, xlabel="accuracy (%)", ylim=(len(ALGORITHMS) - 0.5, -0.5))
        axis.set_yticks(range(len(ALGORITHMS)), [LABELS[algorithm] for algorithm in ALGORITHMS])
        axis.grid(alpha=0.3)
    return figure


def _draw_curves(options: OmniglotTable, found: Mapping[str, Outcome]) -> Figure:
    """Query error on the training tasks, a panel for each column that has runs."""
    columns = [column for column in COLUMNS if any(f"{column}/{algorithm}" in found for algorithm in ALGORITHMS)]
    figure = Figure(figsize=(3 + 3.2 * len(columns), 4.2), layout="constrained")
    figure.suptitle(f"Training tasks of {options.data}, budget {options.budget}, running mean")
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axis, column in zip(axes, columns, strict=True):
        for algorithm in ALGORITHMS:
            if f"{column}/{algorithm}" in found:
                style = {"color": COLORS[algorithm], "label": LABELS[algorithm]}
                draw_learning_curve(axis, found[f"{column}/{algorithm}"], "query_accuracy", **style)
        axis.set(title=COLUMNS[column], xlabel="meta-step")
        error_axis(axis)
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("query error (%)")
    return figure
