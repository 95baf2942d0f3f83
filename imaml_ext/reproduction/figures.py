"""What the figures of all experiments share: one name and one colour for each algorithm, panels, bands and curves."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from imaml_ext.reproduction.options import ALGORITHMS
from imaml_ext.reproduction.paper import COLUMNS, PUBLISHED
from imaml_ext.train.reports import column, running_mean
from imaml_ext.train.run_directory import RunDirectory, read_metrics

_NAMES = {
    "maml": ("MAML", "#d62728"),
    "maml-checkpoint": ("MAML, checkpointed", "#ff7f0e"),
    "fomaml": ("first-order MAML", "#2ca02c"),
    "reptile": ("Reptile", "#8c564b"),
    "imaml-gd": ("iMAML, gradient descent", "#1f77b4"),
    "imaml-hf": ("iMAML, Hessian-free", "#9467bd"),  # the paper's word for NewtonCG
}
LABELS = {algorithm: label for algorithm, (label, _) in _NAMES.items()}
STYLES = {algorithm: {"label": label, "color": color} for algorithm, (label, color) in _NAMES.items()}  # of curves


def panels(title: str, rows: int, columns: int, *, size: tuple[float, float], **sharing: Any) -> tuple[Figure, Any]:
    """Returns a figure of `size` inches under a title, and its axes as an array [rows, columns]."""
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(rows, columns, squeeze=False, **sharing)


def finish(axis: Axes, *, legend: bool = True, **settings: Any) -> None:
    """Sets labels and scales of a panel, its grid and, where curves have labels, a legend."""
    axis.set(**settings)
    axis.grid(alpha=0.3)
    if legend and axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8)


def accuracies_beside_published(title: str, found: Mapping[str, tuple[float, float]]) -> Figure:
    """Draws accuracies in percent with their intervals, one panel per column: filled points, published ones hollow.

    Args:
        found: COLUMN/ALGORITHM to (mean, interval).
    """
    figure, axes = panels(title, 1, len(COLUMNS), size=(13, 3.8), sharey=True)
    for axis, (size, name) in zip(axes[0], COLUMNS.items(), strict=True):
        for row, algorithm in enumerate(ALGORITHMS):
            point: dict[str, Any] = {"color": STYLES[algorithm]["color"], "fmt": "o", "capsize": 2}
            mean, interval = PUBLISHED[algorithm][size]
            axis.errorbar(mean, row + 0.15, xerr=interval, markerfacecolor="white", **point)
            if f"{size}/{algorithm}" in found:
                mean, interval = found[f"{size}/{algorithm}"]
                axis.errorbar(mean, row - 0.15, xerr=interval, **point)
        finish(axis, legend=False, title=name, xlabel="accuracy (%)", ylim=(len(ALGORITHMS) - 0.5, -0.5))
        axis.set_yticks(range(len(ALGORITHMS)), [LABELS[algorithm] for algorithm in ALGORITHMS])
    return figure


def curve_with_band(axis: Axes, x: Any, y: Any, low: Any, high: Any, **style: Any) -> None:
    axis.plot(x, y, **style)
    axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def learning_curve(axis: Axes, directory: RunDirectory, metric: str, **style: Any) -> None:
    """Draws the running mean of a metric over a run; of an accuracy, the error in percent on a logarithmic scale."""
    steps, values = column(read_metrics(directory.metrics), metric)
    error = metric.endswith("accuracy")
    if len(values):
        mean = running_mean(values, max(1, len(values) // 25))
        axis.plot(steps, 100 * (1 - mean) if error else mean, **style)
    axis.set_yscale("log")
    if error:
        ticks = (0.5, 1, 2, 5, 10, 20, 50)
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
