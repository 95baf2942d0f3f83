"""Weights files: meta-parameters as safetensors, with everything that says where they come from.

A file holds one tensor a parameter, by the names of the model's layout (and `log_lam` where lambda was learnt), so that
any program can read it. Its metadata has the resolved configuration of the run, and the card: data, command, result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from imaml_ext.errors import RunError, WeightsError
from imaml_ext.files import atomic_write
from imaml_ext.models import TaskLoss
from imaml_ext.training.checkpoint import load_newest
from imaml_ext.training.config import FromScratch, TrainConfig, from_json, to_json
from imaml_ext.training.evaluation import AS_CONFIGURED, Evaluation, EvaluationOverrides, evaluate_as_configured
from imaml_ext.training.experiment import build, open_dataset, task_loss
from imaml_ext.training.run_directory import RunDirectory, read_config

FORMAT = "imaml_ext 1"
_LOG_LAM = "log_lam"
_PUBLISHED = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Card:
    """Where the weights come from.

    Attributes:
        preset, command: what trained them. commit: of the sources, "" where it is not known.
        data: one line. input_shape: of an example, (C, H, W) or (features,). kind: "classification" or "regression".
        steps, meta_batch: meta-steps, and tasks in each. train_seconds: how long they took.
        test: split, tasks, seed, inner steps, and the figures with their 95 % intervals, as in result.json; `first` are
            those of its first tasks (missing in results of before there were such figures).
        environment: versions and hardware of the training.
    """

    preset: str
    command: str
    commit: str
    data: str
    kind: str
    input_shape: tuple[int, ...]
    steps: int
    meta_batch: int
    train_seconds: float
    test: dict[str, Any]
    environment: dict[str, Any]

    def to_markdown(self, name: str, config: TrainConfig) -> str:
        """The card as a page."""
        ways = f"{config.data.ways}-way {config.data.shots}-shot" if self.kind == "classification" else "regression"
        inner = config.inner.solver.replace("_", " ").replace("hessian free", "Hessian-free")
        rows = {
            "data": self.data,
            "tasks": ways,
            "algorithm": f"{config.meta.algorithm}, {inner}, {config.inner.steps} steps, λ = {config.inner.lam:g}"
            + (", shared head" if config.model.head == "shared" else ""),
            "trained": f"{self.steps:,} meta-steps of {self.meta_batch} tasks, {self.train_seconds / 60:.0f} minutes"
            + (f", from the weights {config.model.weights}" if config.model.weights is not None else ""),
            "on": f"{self.environment['cpu']}, {self.environment['threads']} threads"
            if self.environment["device"] == "cpu"
            else self.environment.get("gpu", self.environment["device"]),
            "test": f"{self.figure} on {self.test['tasks']:,} tasks of classes never seen (seed {self.test['seed']})",
            **({"check": self._first_figure} if "first" in self.test else {}),
            "command": f"`{self.command}`",
            "commit": self.commit or "unknown",
            "versions": ", ".join(f"{key} {self.environment[key]}" for key in ("imaml_ext", "torch", "python")),
        }
        lines = [f"| {key} | {value} |" for key, value in rows.items()]
        return "\n".join(
            [f"# {name}", "", "| | |", "|---|---|", *lines, "", f"    imaml evaluate --pretrained {name}", ""]
        )

    @property
    def figure(self) -> str:
        """The result of the test, as a reader wants it."""
        if self.test["accuracy"] is None:
            return f"mean squared error {self.test['loss']:.4f} ± {self.test['loss_interval']:.4f}"
        return f"accuracy {100 * self.test['accuracy']:.2f} ± {100 * self.test['accuracy_interval']:.2f} %"

    @property
    def _first_figure(self) -> str:
        first = self.test["first"]
        figure = f"mean squared error {first['loss']:.4f}"
        if first["accuracy"] is not None:
            figure = f"accuracy {100 * first['accuracy']:.2f} %"
        return f"{figure} on the first {first['tasks']} of these tasks (`--tasks {first['tasks']}`)"


@dataclass(frozen=True)
class Weights:
    """The content of a weights file.

    Attributes:
        name: of the file, without its ending. theta: [N]. log_lam: [G] where lambda was learnt, else None.
    """

    name: str
    theta: Tensor
    log_lam: Tensor | None
    config: TrainConfig
    card: Card

    def task_loss(self) -> TaskLoss:
        """The model and criterion that theta belongs to."""
        return task_loss(self.config, kind=self.card.kind, input_shape=self.card.input_shape)

    def parameters(self, *, ways: int | None = None) -> dict[str, Tensor]:
        """theta by name; for another number of `ways` than in training, every class with the mean over the classes in
        the last layer. Nothing is lost by that where the head is a shared one (`model.head`).

        Raises:
            WeightsError: `ways` is given, and they are of regression, or is not at least 2.
        """
        layout = self.task_loss().model.layout
        parameters = layout.views(self.theta)
        if ways is None:
            return parameters
        if self.card.kind != "classification":
            raise WeightsError(f"the weights {self.name} are of regression: ways must be left out, got {ways}")
        if ways < 2:
            raise WeightsError(f"ways must be an integer >= 2, got {ways}")
        if ways == self.config.data.ways:
            return parameters
        return parameters | layout.shared_last_layer(self.theta, ways)


def pretrained_names() -> list[str]:
    """The weights that come with the package."""
    return sorted(path.stem for path in _PUBLISHED.glob("*.safetensors"))


def read_weights(source: Path | str) -> Weights:
    """Weights by the name of published ones, or from a file.

    Raises:
        WeightsError: there are none of that name, the file is missing or damaged, or was not written by `imaml export`.
    """
    path = Path(source)
    if path.suffix != ".safetensors":
        if str(source) not in pretrained_names():
            known = ", ".join(pretrained_names()) or "none"
            raise WeightsError(f"no pretrained weights are called {str(source)!r}; there are: {known}; or give a file")
        path = _PUBLISHED / f"{source}.safetensors"
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except OSError as error:
        raise WeightsError(f"weights {path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise WeightsError(f"weights {path} are damaged: {error}") from error
    if metadata.get("format") != FORMAT:
        raise WeightsError(f"{path} was not written by `imaml export`: its format is {metadata.get('format')!r}")
    try:
        config = from_json(TrainConfig, json.loads(metadata["config"]))
        values = json.loads(metadata["card"])
        values["input_shape"] = tuple(values["input_shape"])
        card = Card(**values)
        log_lam = tensors.pop(_LOG_LAM, None)
        weights = Weights(path.stem, torch.empty(0), log_lam, config, card)
        theta = weights.task_loss().model.layout.flatten(tensors)
    except (KeyError, TypeError, ValueError, RunError) as error:
        raise WeightsError(f"weights {path} cannot be used: {error}") from error
    return Weights(path.stem, theta, log_lam, config, card)


def export_run(run: Path, output: Path, *, commit: str = "") -> Weights:
    """Write the meta-parameters of a finished run as a weights file, and its card beside it (`.md`).

    Args:
        run: the run directory. output: NAME.safetensors. commit: of the sources that trained it, where the run does not
            say.

    Raises:
        RunError: the directory holds no finished run, or the files cannot be written.
        ConfigError, DataError: its data set is not there (its description is written into the card).
    """
    if output.suffix != ".safetensors":
        raise RunError(f"output must be a file NAME.safetensors, got {output}")
    directory = RunDirectory(run)
    recorded = read_config(directory)
    saved = load_newest(directory.checkpoints)
    result = _result(directory)
    if saved is None or saved.step != result["steps"]:
        raise RunError(f"{run} has no checkpoint of step {result['steps']}, which its result.json is about")
    dataset = open_dataset(recorded.config.data)
    config = _portable(recorded.config)
    card = Card(
        preset=recorded.preset,
        command=result["command"],
        commit=commit or result["environment"].get("commit", ""),
        data=dataset.description,
        kind=dataset.kind,
        input_shape=tuple(dataset.input_shape),
        steps=result["steps"],
        meta_batch=config.outer.meta_batch,
        train_seconds=result["train_seconds"],
        test=result["test"],
        environment=result["environment"],
    )
    theta = saved.theta if saved.average is None else saved.average  # [N]
    weights = Weights(output.stem, theta, saved.log_lam, config, card)
    tensors = {name: view.contiguous() for name, view in weights.task_loss().model.layout.views(theta).items()}
    if saved.log_lam is not None:
        tensors[_LOG_LAM] = saved.log_lam
    metadata = {
        "format": FORMAT,
        "config": json.dumps(to_json(config)),
        "card": json.dumps(asdict(card)),
    }
    atomic_write(output, save(tensors, metadata))
    atomic_write(output.with_suffix(".md"), card.to_markdown(output.stem, config).encode())
    return weights


def evaluate_pretrained(
    source: Path | str,
    overrides: EvaluationOverrides = AS_CONFIGURED,
    *,
    split: str = "test",
    from_scratch: FromScratch | None = None,
) -> Evaluation:
    """Adapt weights, by name or from a file, to tasks of their own data set and judge them there.

    Raises:
        WeightsError: there are no such weights, or the file is damaged.
        ConfigError, DataError: the tasks asked for cannot be made.
    """
    weights = read_weights(source)
    experiment = build(overrides.applied(weights.config))
    experiment.restore_lam(weights.log_lam)
    theta = experiment.model.layout.flatten(weights.parameters(ways=overrides.ways))
    theta = theta.to(experiment.device, experiment.dtype)
    return evaluate_as_configured(experiment, theta, split=split, from_scratch=from_scratch)


def _portable(config: TrainConfig) -> TrainConfig:
    """The configuration without the folders of the machine that it ran on."""
    weights = config.model.weights
    return replace(
        config,
        data=replace(config.data, root=None, cache_dir=None),
        model=replace(config.model, weights=None if weights is None else Path(weights).name),
    )


def _result(directory: RunDirectory) -> Mapping[str, Any]:
    try:
        result = json.loads(directory.result.read_text())
    except FileNotFoundError as error:
        raise RunError(f"{directory.path} is not finished: it has no result.json") from error
    except (OSError, ValueError) as error:
        raise RunError(f"{directory.result} cannot be read: {error}") from error
    missing = {"steps", "command", "test", "train_seconds", "environment"} - set(result)
    if missing:
        raise RunError(f"{directory.result} lacks {', '.join(sorted(missing))}")
    return result
