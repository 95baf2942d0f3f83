"""The paper's exactness experiment: how far a meta-gradient is from the exact one after finitely many inner steps.

Linear regression, L(φ) = mean (x·φ − y)², where φ*, and with it the exact meta-gradient, has a closed form. The inner
problem is L(φ) + ½ λ ‖φ − θ‖² for MAML as for iMAML, solved by the same gradient descent, so that both converge to the
same gradient. λ is the smallest eigenvalue of ∇²L: the inner problem then has the condition number (κ + 1) / 2.

Source: Rajeswaran et al., arXiv 1909.04630, section 4 ("the exactness of the meta-gradient").
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
from imaml_ext.progress import ProgressBar, say
from imaml_ext.reproduction.figures import STYLES, curve_with_band, finish, panels
from imaml_ext.reproduction.options import Exactness
from imaml_ext.reproduction.results import output_folder, write_results
from imaml_ext.solvers import CG
from imaml_ext.train.reports import write_figure

_BLUES = ("#9ecae1", "#4292c6", "#08519c", "#000000")  # iMAML, from the fewest CG steps to the most
_ENOUGH_STEPS = 24  # inner steps over condition number: (1 − 1/κ)^(24 κ) ≈ 4e-11
_FROM_STEP = 5  # iMAML is to be closer than MAML at every equal number of inner steps from here on
Tasks = tuple[EpisodeBatch, Tensor, Tensor, Tensor]  # with θ [N], their exact meta-gradient [N] in float64, its norm


@dataclass
class Curve:
    """A family of inner problems, and the errors measured on it; κ is the condition number of ∇²L."""

    condition_number: float
    eigenvalues: int
    dtype: str
    points: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lam = 2 / self.condition_number  # the smallest eigenvalue of ∇²L = 2 XᵀX/S
        self.lr = 1 / (2 + self.lam)  # the largest step that cannot overshoot
        self.inner_condition_number = (self.condition_number + 1) / 2  # of ∇²L + λI
        self.eps = float(torch.finfo(getattr(torch, self.dtype)).eps)
        self.rounding = 4 * self.inner_condition_number * self.eps  # relative error by the arithmetic alone

    def inner_steps(self) -> list[int]:
        """Every number up to 6, then two per octave, up to where gradient descent has arrived."""
        last = math.ceil(_ENOUGH_STEPS * self.inner_condition_number)
        octaves = {round(2 ** (exponent / 2)) for exponent in range(6, math.ceil(2 * math.log2(last)))}
        return [*range(1, 7), *sorted(octaves), last]

    def measure(self, inner_steps: int, tasks: Sequence[Tasks], cg_steps: Sequence[int]) -> None:
        """Adds the relative error of each method: median, smallest and largest over the draws."""
        inner = GradientDescent(steps=inner_steps, lr=self.lr)
        methods: dict[str, MetaAlgorithm] = {"maml": MAML(_loss, inner=inner, lam=self.lam)}
        for steps in cg_steps:
            solver = CG(max_iterations=steps, rtol=self.eps)  # a solve at the limit of rounding ends
            methods[f"imaml-{steps}"] = IMAML(_loss, lam=self.lam, inner=inner, linear_solver=solver)
        for name, method in methods.items():
            errors = [
                float(torch.linalg.vector_norm(method.meta_gradient(theta, batch).gradient.double() - exact) / scale)
                for batch, theta, exact, scale in tasks
            ]
            spread = {"median": statistics.median(errors), "smallest": min(errors), "largest": max(errors)}
            self.points.append({"inner_steps": inner_steps, "method": name, **spread})


def run(options: Exactness, *, command: str = "") -> None:
    folder = output_folder(options)
    curves = [Curve(*choice) for choice in product(options.condition_numbers, options.eigenvalues, options.dtypes)]
    tasks = [(curve, list(_draw_tasks(curve, options))) for curve in curves]
    work = [(curve, drawn, steps) for curve, drawn in tasks for steps in curve.inner_steps()]
    with ProgressBar("exactness", total=len(work)) as bar:
        for done, (curve, drawn, steps) in enumerate(work, 1):
            curve.measure(steps, drawn, options.cg_steps)
            bar.update(done, {"κ": f"{curve.condition_number:g}", "inner steps": steps})
    findings = [_findings(curve, max(options.cg_steps)) for curve in curves]
    write_results(options, torch.device("cpu"), command=command, findings=findings, curves=[vars(c) for c in curves])
    write_figure(_draw(curves, options), folder / "exactness.png")
    for finding in findings:
        say(_sentence(finding))
    say(f"results are in {folder}")


def _draw_tasks(curve: Curve, options: Exactness) -> Iterator[Tasks]:
    size, dtype = options.features, getattr(torch, curve.dtype)
    sizes: dict[str, Any] = {"features": size, "shots": 2 * size, "queries": 2 * size, "meta_batch": options.tasks}
    conditioning: dict[str, Any] = {"condition_number": curve.condition_number, "eigenvalues": curve.eigenvalues}
    sampler = LinearSampler(**sizes, **conditioning, seed=options.seed, dtype=dtype)
    theta = torch.zeros(size, dtype=dtype)
    for draw in range(options.draws):
        batch = sampler.sample(draw)
        exact, _ = LinearClosedForm(batch.to(dtype=torch.float64)).meta_gradient(theta.double(), curve.lam)
        yield batch, theta, exact, torch.linalg.vector_norm(exact)


def _loss(params: Tensor, data: Data) -> Tensor:
    """mean (x·φ − y)² [B] for params [B, N]."""
    return ((data.x @ params.unsqueeze(-1)) - data.y).square().mean((1, 2))


def _findings(curve: Curve, most_cg_steps: int) -> dict[str, Any]:
    """The terminal error of every method, and who is closer; nothing is compared where MAML's error is rounding."""
    by_method: dict[str, dict[int, float]] = {}
    for point in curve.points:
        by_method.setdefault(point["method"], {})[point["inner_steps"]] = point["median"]
    maml, most = by_method["maml"], by_method[f"imaml-{most_cg_steps}"]
    compared = [steps for steps in most if steps >= _FROM_STEP and maml[steps] > curve.rounding]
    return {
        **{name: getattr(curve, name) for name in ("condition_number", "eigenvalues", "dtype")},
        "inner_steps": max(most),
        "terminal_error": {method: errors[max(errors)] for method, errors in by_method.items()},
        "most_cg_steps": most_cg_steps,
        "from_step": _FROM_STEP,
        "maml_closer_at": [steps for steps in compared if most[steps] >= maml[steps]],
    }


def _sentence(finding: Mapping[str, Any]) -> str:
    names = {method: f"{method.removeprefix('imaml-')} CG" for method in finding["terminal_error"]} | {"maml": "MAML"}
    errors = ", ".join(f"{error:.0e} {names[method]}" for method, error in finding["terminal_error"].items())
    exceptions = ", ".join(map(str, finding["maml_closer_at"]))
    return (
        "κ {condition_number:g}, {eigenvalues} eigenvalues, {dtype}: error after {inner_steps} inner steps {errors}; "
        "{most_cg_steps} CG steps are closer than MAML from {from_step} inner steps on {closer}"
    ).format(**finding, errors=errors, closer=f"but for {exceptions}" if exceptions else "throughout")


def _draw(curves: Sequence[Curve], options: Exactness) -> Figure:
    """One column per condition number, one row per dtype and spectrum; error against inner steps, both logarithmic."""
    rows, columns = [*product(map(str, options.dtypes), options.eigenvalues)], options.condition_numbers
    title = "Relative error of the meta-gradient: linear regression, mean over tasks"
    figure, axes = panels(title, len(rows), len(columns), size=(4.4 * len(columns), 3.1 * len(rows) + 1), sharex="col")
    for curve in curves:
        axis = axes[rows.index((curve.dtype, curve.eigenvalues)), columns.index(curve.condition_number)]
        _draw_curve(axis, curve, sorted(options.cg_steps))
        spectrum = f"κ(∇²L) = {curve.condition_number:g}, κ(∇²L + λI) = {curve.inner_condition_number:g}"
        axis.set_title(f"{spectrum}\n{curve.eigenvalues} distinct eigenvalues, {curve.dtype}", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _draw_curve(axis: Axes, curve: Curve, cg_steps: Sequence[int]) -> None:
    styles: dict[str, dict[str, Any]] = {"maml": {"label": "MAML", "color": STYLES["maml"]["color"], "linestyle": "-"}}
    for index, steps in enumerate(cg_steps):
        look = {"color": _BLUES[min(index, len(_BLUES) - 1)], "linestyle": ("-", "--", "-.", ":")[index % 4]}
        styles[f"imaml-{steps}"] = {"label": f"iMAML, {steps} CG steps", **look}
    for method, style in styles.items():
        points = [point for point in curve.points if point["method"] == method]
        columns = ([point[name] for point in points] for name in ("inner_steps", "median", "smallest", "largest"))
        curve_with_band(axis, *columns, **style)
    labels = {"xlabel": "inner gradient steps", "ylabel": "relative error"}
    finish(axis, legend=False, xscale="log", yscale="log", **labels)
