"""What each knob does to iMAML: 5-way 1-shot at one fixed, small budget.

Three recipes are varied, one knob at a time: `literal`, the paper's text with its numbers; `base`, the same algorithm
with numbers that train; `hessian-free`, the same with the other inner solver. Beside them stand the variant of
the paper's public code, and the first-order gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
from imaml_ext.reproduce.options import Ablation
from imaml_ext.reproduce.results import markdown_table
from imaml_ext.training.presets import PRESETS
from imaml_ext.training.reports import write_figure

LITERAL: dict[str, Any] = {
    "inner.lam": 2.0,
    "inner.lr": 0.1,
    "inner.steps": 16,
    "inner.proximal": "gradient",
    "meta.curvature": "hessian",
    "meta.damping": 0.0,
    "meta.cg_steps": 5,
    "meta.negative_curvature": "keep",
}
BASE = {**LITERAL, "inner.lam": 0.1, "inner.lr": 0.4, "meta.curvature": "gauss_newton"}
HESSIAN_FREE = {**BASE, "inner.solver": "hessian_free", "inner.steps": 8, "inner.cg_steps": 1}
# Its operator is (H + 24 I)/12 = (H + λ + δ)/12 with λ = 2, δ = 22; Adam does not see the factor.
PUBLIC_CODE = {**LITERAL, "inner.proximal": "pullback", "meta.damping": 22.0}
FIRST_ORDER = {**{name: BASE[name] for name in BASE if name.startswith("inner.")}, "meta.algorithm": "fomaml"}


@dataclass(frozen=True)
class Study:
    """Cells that differ from the recipe `base` in what their label says; `base_value` is the label of the recipe."""

    name: str
    title: str
    base: str
    base_value: str
    cells: Mapping[str, Mapping[str, Any]]


def _values(knob: str, *values: float) -> dict[str, dict[str, Any]]:
    return {f"{value:g}": {knob: value} for value in values}


_HANDLING = {
    "hessian-keep": {"meta.curvature": "hessian", "meta.negative_curvature": "keep"},
    "hessian-gradient": {"meta.curvature": "hessian", "meta.negative_curvature": "gradient"},
    "hessian-skip": {"meta.curvature": "hessian", "meta.negative_curvature": "skip"},
    "gauss-newton": {"meta.curvature": "gauss_newton"},
}
_FASTER = {"outer.lr": 0.003}
RECIPES = {
    "literal": LITERAL,
    "base": BASE,
    "hessian-free": HESSIAN_FREE,
    "public-code": PUBLIC_CODE,
    "first-order": FIRST_ORDER,
}
STUDIES = (
    Study("literal-damping", "literal: damping δ", "literal", "0", _values("meta.damping", 1, 4, 22, 100)),
    Study(
        "literal-curvature",
        "literal: curvature, and tasks where it is negative",
        "literal",
        "hessian-keep",
        {label: knobs for label, knobs in _HANDLING.items() if label != "hessian-keep"},
    ),
    Study("literal-inner", "literal: inner step", "literal", "gradient", {"pullback": {"inner.proximal": "pullback"}}),
    Study("lam", "base: λ", "base", "0.1", _values("inner.lam", 0.02, 0.5, 2)),
    Study("cg-steps", "base: CG steps", "base", "5", {str(n): {"meta.cg_steps": n} for n in (1, 2, 10, 20)}),
    Study("damping", "base: damping δ", "base", "0", _values("meta.damping", 0.1, 1, 10)),
    Study(
        "curvature",
        "base: curvature, and tasks where it is negative",
        "base",
        "gauss-newton",
        {label: knobs for label, knobs in _HANDLING.items() if label != "gauss-newton"},
    ),
    Study("inner", "base: inner step", "base", "gradient", {"pullback": {"inner.proximal": "pullback"}}),
    Study("inner-steps", "base: inner steps", "base", "16", {str(n): {"inner.steps": n} for n in (1, 2, 4, 8)}),
    Study("outer-lr", "base: outer learning rate", "base", "0.001", _values("outer.lr", 0.003, 0.01, 0.03)),
    Study(
        "outer-schedule",
        "base at outer rate 0.003: schedule, average",
        "base",
        "constant, 0.001",
        {
            "cosine": {**_FASTER, "outer.schedule": "cosine"},
            "linear": {**_FASTER, "outer.schedule": "linear"},
            "average": {**_FASTER, "outer.average": 0.98},
        },
    ),
    Study(
        "hessian-free-outer-lr",
        "hessian-free: outer learning rate",
        "hessian-free",
        "0.001",
        _values("outer.lr", 0.003, 0.01, 0.03),
    ),
    Study(
        "hessian-free-steps",
        "hessian-free at outer rate 0.01: Newton × CG steps",
        "hessian-free",
        "8×1, 0.001",
        {
            f"{newton}x{cg}": {"outer.lr": 0.01, "inner.steps": newton, "inner.cg_steps": cg}
            for newton, cg in ((4, 1), (16, 1), (5, 2), (2, 5))
        },
    ),
)
BUDGETS: dict[str, dict[str, Any]] = {
    "small": {"outer.steps": 300, "outer.meta_batch": 8, "outer.lr": 1e-3, "evaluation.tasks": 600},
    "published": {"outer.steps": 2000, "outer.meta_batch": 16, "outer.lr": 1e-3, "evaluation.tasks": 1000},
    "trial": {"outer.steps": 3, "outer.meta_batch": 2, "model.filters": 4, "evaluation.tasks": 10, "run.log_every": 1},
}
_COMMON = {"run.tensorboard": False, "run.log_every": 10}


def ablation_cells(options: Ablation) -> list[Cell]:
    preset = PRESETS["omniglot-5w1s"].config
    layers = (_COMMON, BUDGETS[options.budget], common_knobs(options))
    cells = [cell(f"recipe/{label}", preset, *layers, knobs) for label, knobs in RECIPES.items()]
    for study in STUDIES:
        base = RECIPES[study.base]
        cells += (cell(f"{study.name}/{label}", preset, *layers, base, knobs) for label, knobs in study.cells.items())
    return cells


def run(options: Ablation, *, command: str = "") -> None:
    def draw(found: Mapping[str, Outcome]) -> None:
        write_outcomes(options, found, command=command)
        atomic_write(options.output_dir / "ablation.md", _table(options, found).encode())
        write_figure(_draw(options, found), options.output_dir / "ablation.png")

    train_cells(ablation_cells(options), options, command=command, draw=draw)


def _groups(found: Mapping[str, Outcome]) -> list[tuple[str, list[tuple[str, Outcome]]]]:
    """Title and finished cells of the recipes, and of every study that has some, its recipe first."""
    groups = [("recipes", {label: f"recipe/{label}" for label in RECIPES})]
    for study in STUDIES:
        of_study = {label: f"{study.name}/{label}" for label in study.cells}
        if any(name in found for name in of_study.values()):
            groups.append((study.title, {f"{study.base_value} ({study.base})": f"recipe/{study.base}", **of_study}))
    finished = []
    for title, cells in groups:
        members = [(label, found[name]) for label, name in cells.items() if name in found]
        if members:
            finished.append((title, members))
    return finished


def _table(options: Ablation, found: Mapping[str, Outcome]) -> str:
    rows = []
    for title, members in _groups(found):
        for label, outcome in members:
            rows.append([title, label, outcome.accuracy])
            title = ""
    config = next(iter(found.values())).config
    return (
        f"Test accuracy (%), ± 95 % interval; {options.data} 5-way 1-shot after {config.outer.steps} meta-steps of "
        f"{config.outer.meta_batch} tasks.\n\n" + markdown_table(["what is varied", "value", "accuracy"], rows)
    )


def _draw(options: Ablation, found: Mapping[str, Outcome]) -> Figure:
    """Left, the test accuracy of every cell, with that of its recipe as a line; right, the recipes as they learn."""
    groups = _groups(found)
    rows = sum(len(members) + 1 for _, members in groups)
    figure = Figure(figsize=(13, max(4.0, 0.26 * rows + 1.2)), layout="constrained")
    figure.suptitle(f"iMAML on {options.data} 5-way 1-shot, budget {options.budget}")
    left, right = figure.subplots(1, 2)
    ticks, labels, row = [], [], 0
    for index, (title, members) in enumerate(groups):
        color = f"C{index % 10}"
        positions = list(range(row + 1, row + 1 + len(members)))
        accuracy, interval = accuracy_bars([outcome for _, outcome in members])
        left.errorbar(accuracy, positions, xerr=interval, color=color, marker="o", linestyle="none", capsize=2)
        for position, (_, outcome) in zip(positions, members, strict=True):
            if outcome.test is None:
                left.text(0.02, position, "diverged", transform=left.get_yaxis_transform(), color=color, va="center")
        if index:
            left.plot([accuracy[0]] * 2, [row + 0.6, positions[-1] + 0.4], color=color, linewidth=1)
        ticks += [row, *positions]
        labels += [title, *(f"{label}   " for label, _ in members)]
        row = positions[-1] + 1
    left.set_yticks(ticks, labels, fontsize=8)
    left.set(xlabel="test accuracy (%); line: the recipe that is varied", ylim=(row, -1))
    left.grid(alpha=0.3)
    for index, label in enumerate(RECIPES):
        if f"recipe/{label}" in found:
            style = {"color": f"C{index}", "label": label}
            draw_learning_curve(right, found[f"recipe/{label}"], "query_accuracy", **style)
    right.set(xlabel="meta-step", ylabel="query error (%), training tasks, running mean")
    error_axis(right)
    if right.get_legend_handles_labels()[0]:
        right.legend(frameon=False)
    return figure
