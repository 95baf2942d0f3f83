"""What each setting does to iMAML: 5-way 1-shot at one fixed, small budget.

Three recipes are varied, one setting at a time: `literal`, the paper's text with its numbers; `base`, the same
algorithm with numbers that train; `hessian-free`, the same with NewtonCG as inner solver. Beside them stand the variant
of the paper's public code, and the first-order gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from imaml_ext.inner import GradientDescent
from imaml_ext.meta import FOMAML, IMAML, MetaAlgorithm
from imaml_ext.reproduction.cells import TRIAL, Cells, Outcome, Outcomes, Report, cell, run_cells
from imaml_ext.reproduction.equal_budget import NEWTON
from imaml_ext.reproduction.figures import finish, learning_curve, panels
from imaml_ext.reproduction.options import Ablation
from imaml_ext.reproduction.paper import paper_settings
from imaml_ext.reproduction.results import markdown_table

_PAPER, _LARGER = GradientDescent(steps=16, lr=0.1), GradientDescent(steps=16, lr=0.4)
RECIPES: dict[str, MetaAlgorithm] = {
    "literal": IMAML(lam=2.0, inner=_PAPER, curvature="hessian"),
    "base": IMAML(lam=0.1, inner=_LARGER, curvature="gauss_newton"),
    "hessian-free": IMAML(lam=0.1, inner=NEWTON, curvature="gauss_newton"),
    # Its operator is (H + 24 I)/12 = (H + λ + δ)/12 with λ = 2, δ = 22; Adam does not see the factor.
    "public-code": IMAML(lam=2.0, inner=replace(_PAPER, proximal="after"), damping=22.0, curvature="hessian"),
    "first-order": FOMAML(lam=0.1, inner=_LARGER),
}


@dataclass(frozen=True)
class Study:
    """Holds cells that differ from the recipe `base` in what their label says; `base_value` is the recipe's label."""

    name: str
    title: str
    base: str
    base_value: str
    cells: Mapping[str, Mapping[str, Any]]


def _values(path: str, *values: float) -> dict[str, dict[str, Any]]:
    return {f"{value:g}": {path: value} for value in values}


_HANDLING = {
    f"hessian-{word}": {"algorithm.curvature": "hessian", "algorithm.on_breakdown": word}
    for word in ("keep", "gradient", "skip")
} | {"gauss-newton": {"algorithm.curvature": "gauss_newton"}}
_CURVATURE = "curvature, and tasks where it is negative"
_LITERAL_HANDLING, _BASE_HANDLING = (
    {label: changes for label, changes in _HANDLING.items() if label != own} for own in ("hessian-keep", "gauss-newton")
)
_AFTER = {"pullback": {"algorithm.inner.proximal": "after"}}
_RATES = _values("outer.lr", 0.003, 0.01, 0.03)
_SCHEDULES: dict[str, dict[str, Any]] = {
    **{word: {"outer.lr": 0.003, "outer.schedule": word} for word in ("cosine", "linear")},
    "average": {"outer.lr": 0.003, "outer.average": 0.98},
}
_ITERATIONS = "algorithm.inner.linear_solver.max_iterations"
_DIRECTIONS = {
    f"{newton}x{cg}": {"outer.lr": 0.01, "algorithm.inner.steps": newton, _ITERATIONS: cg}
    for newton, cg in ((4, 1), (16, 1), (5, 2), (2, 5))
}
_STEPS = "hessian-free at outer rate 0.01: Newton × CG steps"
STUDIES = (
    Study("literal-damping", "literal: damping δ", "literal", "0", _values("algorithm.damping", 1, 4, 22, 100)),
    Study("literal-curvature", f"literal: {_CURVATURE}", "literal", "hessian-keep", _LITERAL_HANDLING),
    Study("literal-inner", "literal: inner step", "literal", "gradient", _AFTER),
    Study("lam", "base: λ", "base", "0.1", _values("algorithm.lam", 0.02, 0.5, 2)),
    Study("cg-steps", "base: CG steps", "base", "5", _values("algorithm.linear_solver.max_iterations", 1, 2, 10, 20)),
    Study("damping", "base: damping δ", "base", "0", _values("algorithm.damping", 0.1, 1, 10)),
    Study("curvature", f"base: {_CURVATURE}", "base", "gauss-newton", _BASE_HANDLING),
    Study("inner", "base: inner step", "base", "gradient", _AFTER),
    Study("inner-steps", "base: inner steps", "base", "16", _values("algorithm.inner.steps", 1, 2, 4, 8)),
    Study("outer-lr", "base: outer learning rate", "base", "0.001", _RATES),
    Study("outer-schedule", "base at outer rate 0.003: schedule, average", "base", "constant, 0.001", _SCHEDULES),
    Study("hessian-free-outer-lr", "hessian-free: outer learning rate", "hessian-free", "0.001", _RATES),
    Study("hessian-free-steps", _STEPS, "hessian-free", "8×1, 0.001", _DIRECTIONS),
)
BUDGETS: dict[str, dict[str, Any]] = {
    "small": {"outer.steps": 300, "outer.meta_batch": 8, "evaluation.tasks": 600, "run.log_every": 10},
    "published": {"outer.steps": 2000, "outer.meta_batch": 16, "evaluation.tasks": 1000, "run.log_every": 10},
    "trial": TRIAL | {"outer.steps": 3, "model.filters": 4},
}


def ablation_cells(options: Ablation) -> Cells:
    """Returns the configuration of every cell, recipe/LABEL or STUDY/LABEL."""
    base, budget = paper_settings("5w1s"), {**BUDGETS[options.budget], "outer.lr": 1e-3}
    cells = {f"recipe/{name}": cell(base, options, budget, {"algorithm": RECIPES[name]}) for name in RECIPES}
    for study in STUDIES:
        for label, changes in study.cells.items():
            cells[f"{study.name}/{label}"] = cell(cells[f"recipe/{study.base}"], options, changes)
    return cells


def run(options: Ablation, *, command: str = "") -> None:
    def report(found: Outcomes) -> Report:
        return Report(_table(options, found), {"ablation.png": _draw(options, found)})

    run_cells(options, ablation_cells(options), report, command=command)


def _groups(found: Outcomes) -> list[tuple[str, dict[str, Outcome]]]:
    """Title and finished cells of the recipes, and of every study that has some, its recipe first."""
    groups = [("recipes", {label: f"recipe/{label}" for label in RECIPES})]
    for study in STUDIES:
        of_study = {label: f"{study.name}/{label}" for label in study.cells}
        if any(name in found for name in of_study.values()):
            groups.append((study.title, {f"{study.base_value} ({study.base})": f"recipe/{study.base}", **of_study}))
    finished = ((title, {label: found[n] for label, n in cells.items() if n in found}) for title, cells in groups)
    return [(title, members) for title, members in finished if members]


def _table(options: Ablation, found: Outcomes) -> str:
    rows = []
    for title, members in _groups(found):
        titles = [title, *[""] * len(members)]
        rows += [[title, label, each.accuracy] for title, (label, each) in zip(titles, members.items(), strict=False)]
    outer = next(iter(found.values())).config.outer
    heading = f"{options.data} 5-way 1-shot after {outer.steps} meta-steps of {outer.meta_batch} tasks"
    table = markdown_table(["what is varied", "value", "accuracy"], rows)
    return f"Test accuracy (%), ± 95 % interval; {heading}.\n\n{table}"


def _draw(options: Ablation, found: Outcomes) -> Figure:
    """Left, the test accuracy of every cell, with that of its recipe as a line; right, the recipes as they learn."""
    groups = _groups(found)
    height = max(4.0, 0.26 * sum(len(members) + 1 for _, members in groups) + 1.2)
    title = f"iMAML on {options.data} 5-way 1-shot, budget {options.budget}"
    figure, [(left, right)] = panels(title, 1, 2, size=(13, height))
    _draw_accuracies(left, groups)
    for index, label in enumerate(RECIPES):
        if f"recipe/{label}" in found:
            learning_curve(right, found[f"recipe/{label}"].directory, "query_accuracy", color=f"C{index}", label=label)
    finish(right, xlabel="meta-step", ylabel="query error (%), training tasks, running mean")
    return figure


def _draw_accuracies(axis: Axes, groups: list[tuple[str, dict[str, Outcome]]]) -> None:
    labels: list[str] = []
    for index, (title, members) in enumerate(groups):
        color, first = f"C{index % 10}", len(labels) + 1
        labels += [title, *(f"{label}   " for label in members)]
        for row, outcome in enumerate(members.values(), first):
            accuracy, interval = outcome.percent()
            axis.errorbar(accuracy, row, xerr=interval, color=color, fmt="o", capsize=2)
            if outcome.test is None:
                axis.text(0.02, row, "diverged", transform=axis.get_yaxis_transform(), color=color, va="center")
        if index:
            recipe = next(iter(members.values())).percent()[0]
            axis.plot([recipe] * 2, [first - 0.4, len(labels) - 0.6], color=color, linewidth=1)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    finish(axis, xlabel="test accuracy (%); line: the recipe that is varied", ylim=(len(labels), -1))
