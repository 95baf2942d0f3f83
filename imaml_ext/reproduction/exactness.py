"""The paper's exactness experiment: how far a meta-gradient is from the exact one after finitely many inner steps.

Linear regression, L(φ) = mean (x·φ − y)², where φ*, and with it the exact meta-gradient, has a closed form. The inner
problem is L(φ) + ½ λ ‖φ − θ‖² for MAML as for iMAML, solved by the same gradient descent, so that both converge to the
same gradient. λ is the smallest eigenvalue of ∇²L: the inner problem then has the condition number (κ + 1) / 2.

Source: Rajeswaran et al., arXiv 1909.04630, section 4 ("the exactness of the meta-gradient").
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from imaml_ext.batch import Data, EpisodeBatch
from imaml_ext.data.linear import LinearClosedForm, LinearSampler
from imaml_ext.inner import GradientDescent
from imaml_ext.meta import IMAML, MAML, MetaAlgorithm
from imaml_ext.reproduction.figures import COLORS, curve_with_band, finish, panels
from imaml_ext.reproduction.options import Exactness
from imaml_ext.reproduction.results import output_folder, write_results
from imaml_ext.solvers import CG
from imaml_ext.train.progress import ProgressBar, say
from imaml_ext.train.reports import write_figure

_BLUES = ("#9ecae1", "#4292c6", "#08519c", "#000000")  # iMAML, from the fewest CG steps to the most
_ENOUGH_STEPS = 24  # inner steps over condition number: (1 − 1/κ)^(24 κ) ≈ 4e-11
_FROM_STEP = 5  # iMAML is to be closer than MAML at every equal number of inner steps from here on


@dataclass(frozen=True)
class Problem:
    """A family of inner problems; κ is the condition number of ∇²L."""

    condition_number: float
    eigenvalues: int
    dtype: str

    @property
    def lam(self) -> float:
        """λ = 2/κ, the smallest eigenvalue of ∇²L = 2 XᵀX/S."""
        return 2 / self.condition_number

    @property
    def lr(self) -> float:
        """1/(2 + λ), the largest step that cannot overshoot."""
        return 1 / (2 + self.lam)

    @property
    def inner_condition_number(self) -> float:
        """Of ∇²L + λI."""
        return (self.condition_number + 1) / 2

    def inner_steps(self) -> list[int]:
        """Every number up to 6, then two an octave, up to where gradient descent has arrived."""
        last = math.ceil(_ENOUGH_STEPS * self.inner_condition_number)
        octaves = {round(2 ** (exponent / 2)) for exponent in range(6, math.ceil(2 * math.log2(last)))}
        return [*range(1, 7), *sorted(octaves), last]

    @property
    def eps(self) -> float:
        return float(torch.finfo(getattr(torch, self.dtype)).eps)

    @property
    def rounding(self) -> float:
        """Relative error at which a gradient differs from the exact one by the arithmetic alone."""
        return 4 * self.inner_condition_number * self.eps

    def methods(self, inner_steps: int, options: Exactness) -> dict[str, MetaAlgorithm]:
        inner = GradientDescent(steps=inner_steps, lr=self.lr)
        solvers = {
            steps: CG(max_iterations=steps, rtol=self.eps) for steps in options.cg_steps
        }  # rounding ends a solve
        implicit = {
            f"imaml-{steps}": IMAML(_loss, lam=self.lam, inner=inner, linear_solver=solver)
            for steps, solver in solvers.items()
        }
        return {"maml": MAML(_loss, inner=inner, lam=self.lam), **implicit}


def run(options: Exactness, *, command: str = "") -> None:
    folder = output_folder(options)
    problems = [Problem(*choice) for choice in product(options.condition_numbers, options.eigenvalues, options.dtypes)]
    total = options.draws * sum(len(problem.inner_steps()) for problem in problems)
    curves, done = [], 0
    with ProgressBar("exactness", total=total) as bar:
        for problem in problems:
            points: list[dict[str, Any]] = []
            for steps, errors in _measure(problem, options):
                points += ({"inner_steps": steps, "method": method, **error} for method, error in errors.items())
                done += options.draws
                bar.update(done, {"κ": f"{problem.condition_number:g}", "inner steps": steps})
            derived = {"lam": problem.lam, "lr": problem.lr, "rounding": problem.rounding}
            curves.append({**vars(problem), **derived, "points": points})
    findings = [_findings(curve, options) for curve in curves]
    write_results(options, torch.device("cpu"), command=command, findings=findings, curves=curves)
    write_figure(_draw(curves, options), folder / "exactness.png")
    for finding in findings:
        say(_sentence(finding))
    say(f"results are in {folder}")


def _measure(problem: Problem, options: Exactness) -> Iterator[tuple[int, dict[str, dict[str, float]]]]:
    """For every number of inner steps, the relative error of each method: median, smallest and largest over draws."""
    batches = list(_draw_tasks(problem, options))
    for steps in problem.inner_steps():
        errors = {}
        for name, method in problem.methods(steps, options).items():
            values = [
                float(torch.linalg.vector_norm(method.meta_gradient(theta, batch).gradient.double() - exact) / scale)
                for batch, theta, exact, scale in batches
            ]
            errors[name] = {"median": statistics.median(values), "smallest": min(values), "largest": max(values)}
        yield steps, errors


def _draw_tasks(problem: Problem, options: Exactness) -> Iterator[tuple[EpisodeBatch, Tensor, Tensor, Tensor]]:
    """Tasks, θ [N], the exact meta-gradient [N] of the tasks as rounded, in float64, and its norm, for every draw."""
    sampler = LinearSampler(
        features=options.features,
        shots=2 * options.features,
        queries=2 * options.features,
        meta_batch=options.tasks,
        seed=options.seed,
        condition_number=problem.condition_number,
        eigenvalues=problem.eigenvalues,
        dtype=getattr(torch, problem.dtype),
    )
    theta = torch.zeros(options.features, dtype=sampler.dtype)
    for draw in range(options.draws):
        batch = sampler.sample(draw)
        exact, _ = LinearClosedForm(batch.to(dtype=torch.float64)).meta_gradient(theta.double(), problem.lam)
        yield batch, theta, exact, torch.linalg.vector_norm(exact)


def _loss(params: Tensor, data: Data) -> Tensor:
    """mean (x·φ − y)² [B] for params [B, N]."""
    return ((data.x @ params.unsqueeze(-1)) - data.y).square().mean((1, 2))


def _findings(curve: dict[str, Any], options: Exactness) -> dict[str, Any]:
    """What the paper says of these curves, as figures: the terminal error of every method, and who is closer.

    Where MAML's error is rounding alone, nothing is compared.
    """
    by_method: dict[str, dict[int, float]] = {}
    for point in curve["points"]:
        by_method.setdefault(point["method"], {})[point["inner_steps"]] = point["median"]
    maml, most = by_method["maml"], by_method[f"imaml-{max(options.cg_steps)}"]
    compared = [steps for steps in most if steps >= _FROM_STEP and maml[steps] > curve["rounding"]]
    return {
        **{name: curve[name] for name in ("condition_number", "eigenvalues", "dtype")},
        "inner_steps": max(most),
        "terminal_error": {method: errors[max(errors)] for method, errors in by_method.items()},
        "most_cg_steps": max(options.cg_steps),
        "from_step": _FROM_STEP,
        "maml_closer_at": [steps for steps in compared if most[steps] >= maml[steps]],
    }


def _sentence(finding: dict[str, Any]) -> str:
    errors = ", ".join(
        f"{error:.0e} {'MAML' if method == 'maml' else method.removeprefix('imaml-') + ' CG'}"
        for method, error in finding["terminal_error"].items()
    )
    exceptions = finding["maml_closer_at"]
    closer = f"but for {', '.join(map(str, exceptions))}" if exceptions else "throughout"
    return (
        f"κ {finding['condition_number']:g}, {finding['eigenvalues']} eigenvalues, {finding['dtype']}: "
        f"error after {finding['inner_steps']} inner steps {errors}; "
        f"{finding['most_cg_steps']} CG steps are closer than MAML from {finding['from_step']} inner steps on {closer}"
    )


def _draw(curves: Sequence[dict[str, Any]], options: Exactness) -> Figure:
    """One column per condition number, one row per dtype and spectrum; error against inner steps, both logarithmic."""
    rows, columns = list(product(options.dtypes, options.eigenvalues)), options.condition_numbers
    title = "Relative error of the meta-gradient: linear regression, mean over tasks"
    size = (4.4 * len(columns), 3.1 * len(rows) + 1)
    figure, axes = panels(title, len(rows), len(columns), size=size, sharex="col")
    for curve in curves:
        kappa, eigenvalues, dtype = (curve[name] for name in ("condition_number", "eigenvalues", "dtype"))
        axis = axes[rows.index((dtype, eigenvalues)), columns.index(kappa)]
        _draw_curve(axis, curve, options)
        spectrum = f"κ(∇²L) = {kappa:g}, κ(∇²L + λI) = {(kappa + 1) / 2:g}"
        axis.set_title(f"{spectrum}\n{eigenvalues} distinct eigenvalues, {dtype}", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("inner gradient steps")
    for axis in axes[:, 0]:
        axis.set_ylabel("relative error")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _draw_curve(axis: Axes, curve: dict[str, Any], options: Exactness) -> None:
    styles: dict[str, dict[str, Any]] = {"maml": {"label": "MAML", "color": COLORS["maml"], "linestyle": "-"}}
    for index, steps in enumerate(sorted(options.cg_steps)):
        look = {"color": _BLUES[min(index, len(_BLUES) - 1)], "linestyle": ("-", "--", "-.", ":")[index % 4]}
        styles[f"imaml-{steps}"] = {"label": f"iMAML, {steps} CG steps", **look}
    for method, style in styles.items():
        points = [point for point in curve["points"] if point["method"] == method]
        values = ([point[name] for point in points] for name in ("inner_steps", "median", "smallest", "largest"))
        curve_with_band(axis, *values, **style)
    finish(axis, legend=False, xscale="log", yscale="log")
