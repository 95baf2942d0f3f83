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
from torch import Tensor

from imaml_ext.data import Dataset, EpisodeBatch, ImageDataset, sample_sheet
from imaml_ext.files import atomic_write
from imaml_ext.train.experiment import Experiment
from imaml_ext.train.run_directory import RunDirectory, read_metrics

_TRAIN, _VALIDATION = "#1f77b4", "#d62728"
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
        _curve(axes["accuracy"], rows, "accuracy", "query accuracy (%)", scale=100.0)
        axes["accuracy"].set_ylim(top=101)
    _curve(axes["loss"], rows, "loss", "query loss" + ("" if classification else " (mean squared error)"))
    if not classification:
        axes["loss"].set_yscale("log")
    if solved:
        _line(axes["residual"], rows, "solve_residual", "mean over tasks", _TRAIN)
        axes["residual"].set(ylabel="residual of the implicit solve", yscale="log")
    axes[panels[-1]].set_xlabel("meta-step")
    for axis in axes.values():
        axis.grid(alpha=0.3)
    write_figure(figure, directory.learning_curve)


def _curve(axis: Axes, rows: Sequence[Mapping[str, Any]], quantity: str, label: str, *, scale: float = 1.0) -> None:
    """Draws training tasks as a faint line with its running mean, validation tasks with their 95 % interval."""
    steps, values = column(rows, f"query_{quantity}")
    axis.plot(steps, scale * values, color=_TRAIN, alpha=0.3, linewidth=1)
    width = max(1, len(values) // 25)
    axis.plot(steps, scale * running_mean(values, width), color=_TRAIN, label="training tasks (running mean)")
    steps, values = column(rows, f"val_{quantity}")
    if len(values):
        _, interval = column(rows, f"val_{quantity}_interval")
        error = scale * interval if len(interval) == len(values) else None
        axis.errorbar(steps, scale * values, yerr=error, color=_VALIDATION, capsize=2, label="validation tasks")
    axis.set_ylabel(label)
    axis.legend(loc="best", frameon=False)


def _line(axis: Axes, rows: Sequence[Mapping[str, Any]], name: str, label: str, color: str) -> None:
    steps, values = column(rows, name)
    axis.plot(steps, values, color=color, label=label)


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
    """Draws `episodes.png`: test episodes with support set, query set and predictions, right or wrong."""
    sampler = experiment.sampler("test", tasks=_EPISODES, seed=experiment.config.evaluation.seed)
    episodes = sampler.sample(0)
    phi = experiment.test_algorithm.adapt(params, episodes.support)  # [B, N]
    if experiment.classification:
        with torch.no_grad():
            predicted = experiment.loss.outputs(phi, episodes.query_x).argmax(-1)  # [B, Q]
        figure = _image_episodes(episodes.to(device="cpu"), predicted.cpu(), experiment)
    else:
        figure = _regression_episodes(experiment, episodes, phi)
    write_figure(figure, directory.episodes)


def _image_episodes(episodes: EpisodeBatch, predicted: Tensor, experiment: Experiment) -> Figure:
    """Draws a block of rows per episode: one row per class, its support examples left, its queries right."""
    tasks, data = experiment.config.tasks, experiment.config.data.kind_name
    ways, shots, queries = min(tasks.ways, _MOST_WAYS), min(tasks.shots, _MOST_SHOTS), min(tasks.queries, _MOST_QUERIES)
    columns = shots + queries
    drawn = isinstance(experiment.dataset, ImageDataset) and experiment.dataset.drawn
    figure = Figure(
        figsize=(max(7.0, 0.8 * columns * 1.15), 0.95 * ways * episodes.num_tasks + 1.2), layout="constrained"
    )
    right = (predicted == episodes.query_y).double().mean(1)  # [B]
    heading = f"{data}, {tasks.ways}-way {tasks.shots}-shot: test episodes (classes never trained on)"
    figure.suptitle(f"{heading}\nbeside each query: the class it was taken for")
    blocks = figure.subfigures(episodes.num_tasks, 1, squeeze=False)[:, 0]
    for task, block in enumerate(blocks):
        block.suptitle(
            f"episode {task + 1}: {100 * right[task]:.0f} % of {predicted.shape[1]} queries right", fontsize=10
        )
        axes = block.subplots(ways, columns + 1, squeeze=False, width_ratios=[1] * shots + [0.35] + [1] * queries)
        for axis in axes.flat:
            axis.axis("off")
        axes[0, 0].set_title("support", fontsize=9)
        axes[0, shots + 1].set_title("query", fontsize=9)
        for way in range(ways):
            for shot in range(shots):
                _image(axes[way, shot], episodes.support_x[task, way * tasks.shots + shot], drawn)
            axes[way, 0].text(-0.15, 0.5, f"{way + 1}", transform=axes[way, 0].transAxes, ha="right", va="center")
            for query in range(queries):
                index = way * tasks.queries + query
                answer = int(predicted[task, index])
                good = answer == int(episodes.query_y[task, index])
                axis = axes[way, shots + 1 + query]
                _image(axis, episodes.query_x[task, index], drawn)
                color, mark = (_RIGHT, "✓") if good else (_WRONG, "✗")
                axis.text(
                    1.04, 0.5, f"{mark}\n{answer + 1}", transform=axis.transAxes, color=color, va="center", fontsize=9
                )
                axis.axis("on")
                axis.set(xticks=[], yticks=[])
                for spine in axis.spines.values():
                    spine.set(color=color, linewidth=2)
    return figure


def _image(axis: Axes, image: Tensor, drawn: bool) -> None:
    """Shows an image [C, H, W] in [0, 1]; what is drawn is ink, shown dark on white."""
    pixels = image.permute(1, 2, 0).float().numpy()  # [H, W, C]
    axis.imshow(1 - pixels if drawn else pixels, cmap="gray", vmin=0, vmax=1)


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
    """Draws a picture of a data set: up to ten classes of each split, one row per class.

    Raises:
        DataError: the data set has no images.
        RunError: the picture cannot be written.
    """
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
