"""The pictures of a run: its learning curve, and a sheet of test episodes with what the adapted model makes of them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from imaml_ext.data import Dataset, EpisodeBatch, ImageDataset, sample_sheet
from imaml_ext.errors import RunError
from imaml_ext.files import atomic_write
from imaml_ext.train.experiment import Experiment
from imaml_ext.train.run_directory import RunDirectory, read_metrics

_TRAIN, _VALIDATION = "#1f77b4", "#d62728"
_SCALES = {"accuracy": 100.0, "loss": 1.0}  # what is shown of a metric
_RIGHT, _WRONG = "#1a7f37", "#cf222e"
_MOST_WAYS, _MOST_QUERIES, _MOST_SHOTS, _EPISODES = 10, 5, 3, 3


def draw_learning_curve(directory: RunDirectory, *, title: str) -> None:
    """Draws `learning_curve.png` from `metrics.jsonl`: accuracy if there is one, loss, the residual of the solve."""
    rows = read_metrics(directory.metrics)
    classification = any("query_accuracy" in row for row in rows)
    solved = any("solve_residual" in row for row in rows)
    panels = (["accuracy"] if classification else []) + ["loss"] + (["residual"] if solved else [])
    figure = Figure(figsize=(8, 2.6 * len(panels) + 0.6), layout="constrained")
    axes = dict(zip(panels, figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], strict=True))
    figure.suptitle(title)
    if classification:
        _curve(axes["accuracy"], rows, "accuracy")
        axes["accuracy"].set(ylabel="query accuracy (%)", ylim=(None, 101))
    _curve(axes["loss"], rows, "loss")
    axes["loss"].set_ylabel("query loss" + ("" if classification else " (mean squared error)"))
    if not classification:
        axes["loss"].set_yscale("log")
    if solved:
        axes["residual"].plot(*column(rows, "solve_residual"), color=_TRAIN)
        axes["residual"].set(ylabel="residual of the implicit solve", yscale="log")
    axes[panels[-1]].set_xlabel("meta-step")
    for axis in axes.values():
        axis.grid(alpha=0.3)
    write_figure(figure, directory.learning_curve)


def _curve(axis: Axes, rows: Sequence[Mapping[str, Any]], quantity: str) -> None:
    """Draws training tasks as a faint line with its running mean, validation tasks with their 95 % interval."""
    steps, values = column(rows, f"query_{quantity}")
    axis.plot(steps, _SCALES[quantity] * values, color=_TRAIN, alpha=0.3, linewidth=1)
    _running_mean(axis, rows, quantity, color=_TRAIN, label="training tasks (running mean)")
    _validations(axis, rows, quantity, color=_VALIDATION, label="validation tasks")
    axis.legend(loc="best", frameon=False)


def _running_mean(axis: Axes, rows: Sequence[Mapping[str, Any]], quantity: str, **style: Any) -> None:
    steps, values = column(rows, f"query_{quantity}")
    axis.plot(steps, _SCALES[quantity] * running_mean(values, max(1, len(values) // 25)), **style)


def _validations(axis: Axes, rows: Sequence[Mapping[str, Any]], quantity: str, **style: Any) -> None:
    steps, values = column(rows, f"val_{quantity}")
    if len(values):
        _, interval = column(rows, f"val_{quantity}_interval")
        error = _SCALES[quantity] * interval if len(interval) == len(values) else None
        axis.errorbar(steps, _SCALES[quantity] * values, yerr=error, capsize=2, **style)


def draw_curves(runs: Mapping[str, RunDirectory], path: Path) -> None:
    """Draws the learning curves of several runs into one picture, a colour for each.

    A panel shows the running mean over training tasks, and one the validation tasks with their 95 % interval; of the
    accuracy, where one of the runs has it, and of the loss.

    Raises:
        RunError: no run has logged anything yet, or the picture cannot be written.
    """
    rows = {name: read_metrics(directory.metrics) for name, directory in runs.items()}
    found = {metric for each in rows.values() for row in each for metric in row}
    panels = [
        (quantity, words)
        for quantity, words in (("accuracy", "accuracy (%)"), ("loss", "loss"))
        if f"query_{quantity}" in found
    ]
    if not panels:
        raise RunError(f"nothing is logged yet in {', '.join(runs)}")
    figure = Figure(figsize=(11, 3.2 * len(panels) + 0.25 * len(runs) + 0.5), layout="constrained")
    for (quantity, words), (training, validation) in zip(
        panels, figure.subplots(len(panels), 2, sharex=True, sharey="row", squeeze=False), strict=True
    ):
        for number, (name, each) in enumerate(rows.items()):
            _running_mean(training, each, quantity, color=f"C{number % 10}", label=name)
            _validations(validation, each, quantity, color=f"C{number % 10}")
        training.set(title="training tasks (running mean)", ylabel=f"query {words}")
        validation.set_title("validation tasks")
        for axis in (training, validation):
            axis.set(yscale="linear" if "query_accuracy" in found else "log")
            axis.grid(alpha=0.3)
    for axis in figure.axes[-2:]:
        axis.set_xlabel("meta-step")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", frameon=False)
    write_figure(figure, path)


def column(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps and values of the rows that have this metric."""
    pairs = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs], dtype=float)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Returns the mean over the last `width` values, over fewer at the start."""
    sums = np.cumsum(values)
    count = np.minimum(np.arange(1, len(values) + 1), width)
    earlier = np.concatenate([np.zeros(min(width, len(values))), sums[:-width]])
    return (sums - earlier) / count


def draw_episodes(directory: RunDirectory, experiment: Experiment, params: Mapping[str, Tensor]) -> None:
    """Draws `episodes.png`: episodes of the classes that the run is judged on, with predictions, right or wrong."""
    sampler = experiment.sampler(
        experiment.config.evaluation.split, tasks=_EPISODES, seed=experiment.config.evaluation.seed
    )
    episodes = sampler.sample(0)
    phi = experiment.test_algorithm.adapt(params, episodes.support)  # [B, N]
    if experiment.classification:
        with torch.no_grad():
            predicted = experiment.loss.outputs(phi, episodes.query_x).argmax(-1)  # [B, Q]
        figure = _image_episodes(experiment, episodes.to(device="cpu"), predicted.cpu())
    else:
        figure = _regression_episodes(experiment, episodes, phi)
    write_figure(figure, directory.episodes)


def _image_episodes(experiment: Experiment, episodes: EpisodeBatch, predicted: Tensor) -> Figure:
    """Draws a block of rows per episode: one row per class, its support examples left, its queries right."""
    tasks, dataset = experiment.config.tasks, experiment.dataset
    each = predicted.shape[1] // tasks.ways  # queries per class
    ways, shots, queries = min(tasks.ways, _MOST_WAYS), min(tasks.shots, _MOST_SHOTS), min(each, _MOST_QUERIES)
    split = {"val": "validation"}.get(experiment.config.evaluation.split, "test")
    inverted = isinstance(dataset, ImageDataset) and dataset.drawn
    right = (predicted == episodes.query_y).double().mean(1)  # [B]
    width, height = shots + 0.5 + 1.5 * queries, ways + 0.2
    figure = Figure(figsize=(max(7.0, width), height * episodes.num_tasks + 1.2), layout="constrained")
    heading = f"{dataset.name}, {tasks.ways}-way {tasks.shots}-shot: {split} episodes (classes never trained on)"
    figure.suptitle(f"{heading}\nleft: support; right: queries, beside each the class it was taken for")
    for task, axis in enumerate(figure.subplots(episodes.num_tasks, 1, squeeze=False)[:, 0]):
        title = f"episode {task + 1}: {100 * right[task]:.0f} % of {predicted.shape[1]} queries right"
        axis.set_title(title, fontsize=10)
        axis.axis("off")
        for way in range(ways):
            axis.text(-0.7, way, f"{way + 1}", ha="right", va="center")
            for shot in range(shots):
                _image(axis, (shot, way), episodes.support_x[task, way * tasks.shots + shot], inverted)
            for query in range(queries):
                x, index = shots + 0.5 + 1.5 * query, way * each + query
                answer, good = (
                    int(predicted[task, index]),
                    bool(predicted[task, index] == episodes.query_y[task, index]),
                )
                color, mark = (_RIGHT, "✓") if good else (_WRONG, "✗")
                _image(axis, (x, way), episodes.query_x[task, index], inverted, frame=color)
                axis.text(x + 0.5, way, f"{mark}\n{answer + 1}", color=color, va="center", fontsize=9)
        axis.set(xlim=(-1, width), ylim=(height - 0.6, -0.6), aspect="equal")
    return figure


def _image(axis: Axes, place: tuple[float, float], image: Tensor, inverted: bool, frame: str = "none") -> None:
    """Draws an image [C, H, W] in [0, 1] at its place; what is drawn is ink, shown dark on white."""
    (x, y), pixels = place, image.permute(1, 2, 0).float().numpy()  # [H, W, C]
    pixels = 1 - pixels if inverted else pixels
    axis.imshow(pixels, cmap="gray", vmin=0, vmax=1, extent=(x - 0.45, x + 0.45, y + 0.45, y - 0.45))
    axis.add_patch(Rectangle((x - 0.45, y - 0.45), 0.9, 0.9, fill=False, edgecolor=frame, linewidth=2))


def _regression_episodes(experiment: Experiment, episodes: EpisodeBatch, phi: Tensor) -> Figure:
    """Draws one plot per task: support points, query points, and the adapted model; against the first input."""
    figure = Figure(figsize=(4.2 * episodes.num_tasks, 3.6), layout="constrained")
    figure.suptitle(f"{experiment.config.data.kind_name}, {experiment.config.tasks.shots} support points: test tasks")
    with torch.no_grad():
        predicted = experiment.loss.outputs(phi, episodes.query_x)  # [B, Q, 1]
        error = experiment.loss.criterion(predicted, episodes.query_y).cpu()  # [B]
        curve = None
        if episodes.query_x.shape[-1] == 1:
            low, high = float(episodes.query_x.min()), float(episodes.query_x.max())
            grid = torch.linspace(low, high, 200, dtype=phi.dtype, device=phi.device)
            curve = experiment.loss.outputs(phi, grid[None, :, None].expand(len(phi), -1, 1)).cpu()  # [B, 200, 1]
    episodes, predicted = episodes.to(device="cpu"), predicted.cpu()
    for task, axis in enumerate(figure.subplots(1, episodes.num_tasks, squeeze=False)[0]):
        query_x, support_x = episodes.query_x[task, :, 0], episodes.support_x[task, :, 0]
        if curve is not None:
            axis.plot(grid.cpu(), curve[task, :, 0], color=_TRAIN, label="adapted model")
        else:
            axis.scatter(query_x, predicted[task, :, 0], color=_TRAIN, marker="+", label="adapted model")
        axis.scatter(query_x, episodes.query_y[task, :, 0], s=14, color="#888888", label="query")
        axis.scatter(support_x, episodes.support_y[task, :, 0], s=36, marker="^", color=_VALIDATION, label="support")
        axis.set_title(f"mean squared error {error[task]:.3f}")
        axis.set(xlabel="x" if curve is not None else "first input", ylabel="y")
        axis.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def draw_samples(path: Path, dataset: Dataset) -> None:
    """Draws up to ten classes of each split of a data set, one row per class; DataError where it has no images."""
    sheets = {split: sample_sheet(dataset, split) for split in dataset.splits}
    figure = Figure(figsize=(4.5 * len(sheets), 5), layout="constrained")
    figure.suptitle(f"{dataset.name}: one row per class")
    for axis, (split, sheet) in zip(figure.subplots(1, len(sheets), squeeze=False)[0], sheets.items(), strict=True):
        axis.imshow(sheet, cmap="gray", vmin=0, vmax=1)
        axis.set_title(split)
        axis.axis("off")
    write_figure(figure, path)


def write_figure(figure: Figure, path: Path) -> None:
    """Writes the figure as a PNG file, whole or not at all."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    atomic_write(path, buffer.getvalue())
