"""The paper's Omniglot table: five algorithms on four kinds of tasks, beside the published figures.

A column is a recipe, `omniglot-5w1s` and so on: data and network. What an algorithm sets differently is in
`algorithm_changes`, how long it is trained in BUDGETS; nothing else decides a cell.
"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from imaml_ext.inner import GradientDescent, NewtonCG
from imaml_ext.meta import FOMAML, IMAML, MAML, Reptile
from imaml_ext.reproduction.cells import REPTILE, TRIAL, Cells, Outcomes, Report, cell, run_cells
from imaml_ext.reproduction.figures import LABELS, STYLES, finish, learning_curve, panels
from imaml_ext.reproduction.options import ALGORITHMS, OmniglotTable
from imaml_ext.reproduction.results import markdown_table
from imaml_ext.solvers import CG
from imaml_ext.train.recipe import load_recipe

COLUMNS = {"5w1s": "5-way 1-shot", "5w5s": "5-way 5-shot", "20w1s": "20-way 1-shot", "20w5s": "20-way 5-shot"}

# Accuracy in percent and its 95 % interval: table 2 of Rajeswaran et al., arXiv 1909.04630.
PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "maml": {"5w1s": (98.7, 0.4), "5w5s": (99.9, 0.1), "20w1s": (95.8, 0.3), "20w5s": (98.9, 0.2)},
    "fomaml": {"5w1s": (98.3, 0.5), "5w5s": (99.2, 0.2), "20w1s": (89.4, 0.5), "20w5s": (97.9, 0.1)},
    "reptile": {"5w1s": (97.68, 0.04), "5w5s": (99.48, 0.06), "20w1s": (89.43, 0.14), "20w5s": (97.12, 0.32)},
    "imaml-gd": {"5w1s": (99.16, 0.35), "5w5s": (99.67, 0.12), "20w1s": (94.46, 0.42), "20w5s": (98.69, 0.1)},
    "imaml-hf": {"5w1s": (99.50, 0.26), "5w5s": (99.74, 0.11), "20w1s": (96.18, 0.36), "20w5s": (99.14, 0.1)},
}
NEWTON = NewtonCG(steps=8, linear_solver=CG(max_iterations=1, rtol=0.0), curvature="gauss_newton")


def algorithm_changes(ways: int) -> dict[str, dict[str, Any]]:
    """Returns what each algorithm sets differently on tasks of 5 or 20 ways.

    iMAML: as the recipe omniglot-5w1s-1000, and not the paper's letter (docs/reproduction/). NewtonCG takes many short
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


def table_cells(options: OmniglotTable) -> Cells:
    """Returns the configuration of every cell, COLUMN/ALGORITHM."""
    cells = {}
    for column in COLUMNS:
        base = load_recipe(f"omniglot-{column}").config
        ways, changes = base.tasks.ways, algorithm_changes(base.tasks.ways)
        of_outer = ("outer.steps", "outer.meta_batch", "outer.lr", "outer.schedule")
        budget = {"evaluation.tasks": 1000} | dict(zip(of_outer, BUDGETS[options.budget][ways], strict=True))
        budget |= TRIAL | {"model.filters": 4} if options.budget == "trial" else {}
        for algorithm in ALGORITHMS:
            cells[f"{column}/{algorithm}"] = cell(base, options, budget, changes[algorithm])
    return cells


def run(options: OmniglotTable, *, command: str = "") -> None:
    def report(found: Outcomes) -> Report:
        table, curves = _draw_table(options, found), _draw_curves(options, found)
        figures = {"omniglot-table.png": table, "learning-curves.png": curves}
        return Report(_table(options, found), figures, {"published": PUBLISHED})

    run_cells(options, table_cells(options), report, command=command)


def _table(options: OmniglotTable, found: Outcomes) -> str:
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


def _draw_table(options: OmniglotTable, found: Outcomes) -> Figure:
    """Accuracies, one panel per column: here as filled points, published as hollow ones."""
    title = f"Accuracy on {options.data}, budget {options.budget}: filled here, hollow published"
    figure, axes = panels(title, 1, len(COLUMNS), size=(13, 3.8), sharey=True)
    for axis, (column, name) in zip(axes[0], COLUMNS.items(), strict=True):
        for row, algorithm in enumerate(ALGORITHMS):
            point: dict[str, Any] = {"color": STYLES[algorithm]["color"], "fmt": "o", "capsize": 2}
            mean, interval = PUBLISHED[algorithm][column]
            axis.errorbar(mean, row + 0.15, xerr=interval, markerfacecolor="white", **point)
            if f"{column}/{algorithm}" in found:
                mean, interval = found[f"{column}/{algorithm}"].percent()
                axis.errorbar(mean, row - 0.15, xerr=interval, **point)
        finish(axis, legend=False, title=name, xlabel="accuracy (%)", ylim=(len(ALGORITHMS) - 0.5, -0.5))
        axis.set_yticks(range(len(ALGORITHMS)), [LABELS[algorithm] for algorithm in ALGORITHMS])
    return figure


def _draw_curves(options: OmniglotTable, found: Outcomes) -> Figure:
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
