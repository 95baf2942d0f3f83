"""Five algorithms on four kinds of Omniglot tasks, each on equally many training tasks.

What an algorithm sets differently is in `algorithm_changes`, how long it is trained in BUDGETS; nothing else decides a
cell. Every orientation of a character is a class, and a task has five queries per class, in training and at the test.
"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from imaml_ext.inner import GradientDescent, NewtonCG
from imaml_ext.meta import FOMAML, IMAML, MAML, Reptile
from imaml_ext.reproduction.cells import REPTILE, TRIAL, Cells, Outcomes, Report, cell, run_cells
from imaml_ext.reproduction.figures import (
    LABELS,
    STYLES,
    accuracies_beside_published,
    finish,
    learning_curve,
    panels,
)
from imaml_ext.reproduction.options import ALGORITHMS, EqualBudget
from imaml_ext.reproduction.paper import COLUMNS, PUBLISHED, paper_settings
from imaml_ext.reproduction.results import markdown_table
from imaml_ext.solvers import CG

NEWTON = NewtonCG(steps=8, linear_solver=CG(max_iterations=1, rtol=0.0), curvature="gauss_newton")


def algorithm_changes(ways: int) -> dict[str, dict[str, Any]]:
    """Returns what each algorithm sets differently on tasks of 5 or 20 ways.

    iMAML: not the paper's letter, which gets worse as it trains (docs/reproduction/). NewtonCG takes many short
    directions, which reach a lower objective for their cost than few long ones, at an outer rate of its own: with 3e-3
    it learns more slowly than gradient descent, with 1e-2 faster, where gradient descent gains nothing. MAML,
    first-order MAML: Finn et al. (2017), appendix A.1. Reptile: Nichol et al. (2018), appendix A, but for an inner rate
    ten times theirs: Adam begins anew with every task, and there are a twentieth of their meta-steps.
    """
    few = ways == 5
    descent = GradientDescent(steps=16 if few else 25, lr=0.4)
    unrolled = GradientDescent(steps=1, lr=0.4) if few else GradientDescent(steps=5, lr=0.1)
    tested = {"evaluation.inner_steps": 3 if few else None}
    steps, batch_size = (5, 10) if few else (10, 20)
    batches = GradientDescent(steps, lr=1e-2, optimizer="adam", betas=(0.0, 0.999), batch_size=batch_size)
    return {
        "imaml-gd": {"algorithm": IMAML(lam=0.1, inner=descent, curvature="gauss_newton")},
        "imaml-hf": {"algorithm": IMAML(lam=0.1, inner=NEWTON, curvature="gauss_newton"), "outer.lr": 1e-2},
        "maml": {"algorithm": MAML(inner=unrolled), **tested},
        "fomaml": {"algorithm": FOMAML(inner=unrolled), **tested},
        "reptile": REPTILE
        | {"algorithm": Reptile(inner=batches), "tasks.train_shots": 10, "evaluation.inner_steps": 50},
    }


# Meta-steps, tasks per meta-step, outer rate and its schedule, by name and ways.
BUDGETS = {
    "small": {5: (5000, 16, 3e-3, "cosine"), 20: (1000, 4, 3e-3, "cosine")},
    "published": {5: (20_000, 32, 1e-3, "cosine"), 20: (20_000, 16, 1e-3, "cosine")},
    "trial": {5: (4, 2, 1e-3, "constant"), 20: (4, 2, 1e-3, "constant")},
}


def equal_cells(options: EqualBudget) -> Cells:
    """Returns the configuration of every cell, COLUMN/ALGORITHM."""
    cells = {}
    for column in COLUMNS:
        base = paper_settings(column)
        ways, changes = base.tasks.ways, algorithm_changes(base.tasks.ways)
        of_outer = ("outer.steps", "outer.meta_batch", "outer.lr", "outer.schedule")
        budget = {"evaluation.tasks": 1000} | dict(zip(of_outer, BUDGETS[options.budget][ways], strict=True))
        budget |= TRIAL | {"model.filters": 4} if options.budget == "trial" else {}
        for algorithm in ALGORITHMS:
            cells[f"{column}/{algorithm}"] = cell(base, options, budget, changes[algorithm])
    return cells


def run(options: EqualBudget, *, command: str = "") -> None:
    def report(found: Outcomes) -> Report:
        title = f"Accuracy on {options.data}, budget {options.budget}: filled here, hollow published"
        accuracies = accuracies_beside_published(title, {name: each.percent() for name, each in found.items()})
        figures = {"equal-budget.png": accuracies, "learning-curves.png": _draw_curves(options, found)}
        return Report(_table(options, found), figures, {"published": PUBLISHED})

    run_cells(options, equal_cells(options), report, command=command)


def _table(options: EqualBudget, found: Outcomes) -> str:
    rows = []
    for algorithm in ALGORITHMS:
        names = [f"{column}/{algorithm}" for column in COLUMNS]
        rows.append([LABELS[algorithm], "here", *(found[n].accuracy if n in found else "not run" for n in names)])
        rows.append(["", "published", *("{} ± {}".format(*PUBLISHED[algorithm][column]) for column in COLUMNS)])
    tasks = sorted({outcome.test["tasks"] for outcome in found.values() if outcome.test is not None})
    return (
        f"Test accuracy (%), ± 95 % interval, on {' or '.join(map(str, tasks)) or 'no'} tasks; "
        f"{options.data}, budget `{options.budget}`.\n\n"
        + markdown_table(["algorithm", "", *COLUMNS.values()], rows)
        + "\nPublished: Rajeswaran et al., arXiv 1909.04630, table 2.\n"
    )


def _draw_curves(options: EqualBudget, found: Outcomes) -> Figure:
    """Query error on the training tasks, one panel for each column that has runs."""
    columns = [column for column in COLUMNS if any(name.startswith(f"{column}/") for name in found)]
    title = f"Training tasks of {options.data}, budget {options.budget}, running mean"
    figure, axes = panels(title, 1, len(columns), size=(3 + 3.2 * len(columns), 4.2), sharey=True)
    for axis, column in zip(axes[0], columns, strict=True):
        for algorithm in ALGORITHMS:
            if f"{column}/{algorithm}" in found:
                learning_curve(axis, found[f"{column}/{algorithm}"].directory, "query_accuracy", **STYLES[algorithm])
        finish(axis, title=COLUMNS[column], xlabel="meta-step")
    axes[0, 0].set_ylabel("query error (%)")
    return figure
