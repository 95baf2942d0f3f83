"""Weights files: meta-parameters as safetensors, with the model and the algorithm that adapts it, and a card.

A file holds one tensor per parameter, by the names of the model's layout, so that any program can read it, and beside
them what else was learnt (`log_lam`, `log_lr`). Its metadata describe the model, the algorithm and where all came from.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from imaml_ext import _renamed
from imaml_ext.data import RecordedClasses
from imaml_ext.errors import WeightsError
from imaml_ext.files import atomic_write
from imaml_ext.losses import TaskLoss
from imaml_ext.meta import MetaAlgorithm
from imaml_ext.models import TaskModel
from imaml_ext.pictures import Reading
from imaml_ext.pretrained import old_format
from imaml_ext.pretrained.images import reading_of_shape
from imaml_ext.settings import from_json, to_json

FORMAT = "imaml_ext 2"
_PUBLISHED = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Card:
    """Where the weights come from.

    Attributes:
        recipe: what trained them. command: the line that began it. commit: of the sources, "" where it is not known.
        description: of the data, in one line. data: the settings of the data source. tasks: ways, shots and queries.
        kind: "classification" or "regression". input_shape: of an example, (C, H, W) or (features,).
        steps: meta-steps. meta_batch: tasks in each. train_seconds: how long all of them took.
        test: split, tasks, seed, inner steps, and the figures with their 95 % intervals, as in result.json; `first` are
            those of its first tasks (missing in results of before there were such figures). Of a run that was not
            finished, or of another checkpoint than the tested one, the figures of its validation, if there was one.
        environment: versions and hardware of the training. trained_from: the weights that it began with, if any.
        reading: how pictures of one's own are read, to be like the training's; None in regression.
        classes: the names of the classes of each split; None where the run did not record them.
        others: figures of other tests than that, in its form, by what is different in words.
        stages: the stages before the last one, if the recipe has several; each has name, tasks, meta_steps, meta_batch
            and train_seconds.
    """

    recipe: str
    command: str
    commit: str
    description: str
    data: dict[str, Any]
    tasks: dict[str, Any]
    kind: str
    input_shape: tuple[int, ...]
    steps: int
    meta_batch: int
    train_seconds: float
    test: dict[str, Any] | None
    environment: dict[str, Any]
    trained_from: str | None = None
    reading: Reading | None = None
    classes: Mapping[str, Sequence[str]] | None = None
    others: Mapping[str, Mapping[str, Any]] | None = None
    stages: Sequence[Mapping[str, Any]] | None = None

    @property
    def recorded_classes(self) -> RecordedClasses:
        """The classes that the weights were trained with, for a check that they are not judged by these."""
        return RecordedClasses(self.data["kind"], self.classes or {})

    @property
    def figure(self) -> str:
        """The result of the test, as a reader wants it."""
        return "not tested" if self.test is None else _figure(self.test)

    def to_markdown(self, name: str, algorithm: MetaAlgorithm, *, shared_head: bool) -> str:
        """The card as a page, for the weights `name` that this algorithm adapts."""
        where, first, classes = self.environment, (self.test or {}).get("first"), self.kind == "classification"
        on = f"{where['cpu']}, {where['threads']} threads" if where["device"] == "cpu" else where.get("gpu")
        rows = {
            "data": self.description,
            "tasks": f"{self.tasks['ways']}-way {self.tasks['shots']}-shot" if classes else "regression",
            "algorithm": f"{algorithm.kind_name}, {algorithm.inner.kind_name}, {algorithm.inner.steps} steps, "
            f"λ = {algorithm.lam:g}{', shared head' if shared_head else ''}",
            **self._trained(),
            "on": on or where["device"],
            **self._tested(),
            **({"check": _check(first)} if first else {}),
            "command": f"`{self.command}`",
            "commit": self.commit or "unknown",
            "versions": ", ".join(f"{key} {where[key]}" for key in ("imaml_ext", "torch", "python")),
        }
        lines = [f"| {key} | {value} |" for key, value in rows.items()]
        source = name if name in pretrained_names() else shlex.quote(f"{name}.safetensors")
        root = " --data.root FOLDER" if self.data["kind"] == "folder" else ""
        tail = ["", f"    imaml evaluate --pretrained {source}{root}", ""]
        return "\n".join([f"# {name}", "", "| | |", "|---|---|", *lines, *tail])

    def _trained(self) -> dict[str, str]:
        """The rows of the page about the training: one, or one per stage."""
        last = {"meta_steps": self.steps, "meta_batch": self.meta_batch, "train_seconds": self.train_seconds}
        start = f", from the weights {self.trained_from}" if self.trained_from else ""
        if not self.stages:
            return {"trained": f"{_spent(last)}{start}"}
        minutes = (sum(stage["train_seconds"] for stage in self.stages) + self.train_seconds) / 60
        rows = {"trained": f"in {len(self.stages) + 1} stages, {minutes:.0f} minutes{start}"}
        for stage in self.stages:
            rows[f"stage {stage['name']}"] = f"{stage['tasks']}, {_spent(stage)}"
        return rows | {"last stage": _spent(last)}

    def _tested(self) -> dict[str, str]:
        """The rows of the page about the test."""
        if self.test is None:
            return {"test": "none: the run was not tested at this step"}
        what = f"{self.figure} on {self.test['tasks']:,} tasks of classes never seen (seed {self.test['seed']})"
        rows = {"test": f"none: {what}" if self.test.get("split") == "val" else what}
        for different, test in (self.others or {}).items():
            rows[different] = f"{_figure(test)} on {test['tasks']:,} tasks"
        return rows


def _figure(test: Mapping[str, Any]) -> str:
    split = "validation " if test.get("split") == "val" else ""
    if test["accuracy"] is None:
        return f"{split}mean squared error {test['loss']:.4f} ± {test['loss_interval']:.4f}"
    return f"{split}accuracy {100 * test['accuracy']:.2f} ± {100 * test['accuracy_interval']:.2f} %"


def _spent(stage: Mapping[str, Any]) -> str:
    minutes = stage["train_seconds"] / 60
    return f"{stage['meta_steps']:,} meta-steps of {stage['meta_batch']} tasks, {minutes:.0f} minutes"


def _check(first: Mapping[str, Any]) -> str:
    figure = f"mean squared error {first['loss']:.4f}"
    if first["accuracy"] is not None:
        figure = f"accuracy {100 * first['accuracy']:.2f} %"
    return f"{figure} on the first {first['tasks']} of these tasks (`--tasks {first['tasks']}`)"


@dataclass(frozen=True)
class Weights:
    """The content of a weights file.

    Attributes:
        name: of the file, without its ending.
        params: the meta-parameters, {"theta": [N]} and what else was learnt ("log_lam", "log_lr") or carried.
        model: the network that theta belongs to. criterion: its loss, "cross_entropy" or "mse".
        algorithm: what adapts it to a task. shared_head: whether all classes begin with the same last layer.
    """

    name: str
    params: dict[str, Tensor]
    model: TaskModel
    criterion: str
    algorithm: MetaAlgorithm
    shared_head: bool
    card: Card

    def bound_algorithm(self) -> MetaAlgorithm:
        """The algorithm on the loss of the model; it adapts `params` to support sets."""
        return self.algorithm.bound(TaskLoss(self.model, self.criterion))

    def for_ways(self, ways: int | None, *, shared: bool = False) -> Weights:
        """The same for tasks of another number of classes; None: as in training.

        Class c begins with m + s (r_c - m) in the last layer: r_c is its own trained row, and m the mean over the
        trained rows, which classes beyond the trained ones have. s = min(1, ways / trained ways): rows that tell fewer
        classes apart are closer to each other. `benchmarks/own_drawings.py` compares that with the mean alone.

        With `shared`, or where the head is a shared one, every class has m.

        Raises:
            WeightsError: they are of regression, or `ways` is not at least 2.
        """
        if ways is None or (self.card.kind == "classification" and ways == self.card.tasks["ways"]):
            return self
        if self.card.kind != "classification":
            raise WeightsError(f"the weights {self.name} are of regression: ways must be left out, got {ways}")
        if ways < 2:
            raise WeightsError(f"ways must be at least 2, got {ways}")
        model = self.model.fitted(self.card.input_shape, ways)

        def fitted(vector: Tensor) -> Tensor:  # theta, or what is learnt per parameter
            views = self.model.layout.views(vector)
            last = self.model.layout.shared_last_layer(vector, ways)
            if not (shared or self.shared_head):
                last = {name: _own_rows(views[name], means) for name, means in last.items()}
            return model.layout.flatten(views | last)

        vectors = {name for name, value in self.params.items() if value.numel() == self.model.layout.numel}
        params = {name: fitted(value) if name in vectors else value for name, value in self.params.items()}
        card = replace(self.card, tasks=self.card.tasks | {"ways": ways})
        return replace(self, params=params, model=model, card=card)

    def parameters(self, *, ways: int | None = None) -> dict[str, Tensor]:
        """theta by the names of the model's layout, for so many classes as `for_ways` says."""
        weights = self.for_ways(ways)
        return weights.model.layout.views(weights.params["theta"])


def _own_rows(rows: Tensor, means: Tensor) -> Tensor:
    """Rows [..., trained] in place of the first of their means [..., ways], as `Weights.for_ways` says."""
    trained, ways = rows.shape[-1], means.shape[-1]
    own = torch.lerp(means[..., :trained], rows[..., :ways], min(1.0, ways / trained))
    return torch.cat([own, means[..., trained:]], dim=-1)


def pretrained_names() -> list[str]:
    """Returns the names of the weights that come with the package."""
    return sorted(path.stem for path in _PUBLISHED.glob("*.safetensors"))


def read_weights(source: Path | str) -> Weights:
    """Reads weights by the name of published ones, or from a file.

    Raises:
        WeightsError: there are none of that name, the file is missing or damaged, or was not written by `imaml export`.
    """
    path = Path(source)
    if path.suffix != ".safetensors":
        if str(source) not in pretrained_names():
            today = _renamed.recipe_of_today(str(source))
            if today in pretrained_names():
                raise WeightsError(f"the pretrained weights {source} are now {today}")
            known = ", ".join(pretrained_names()) or "none"
            raise WeightsError(f"no pretrained weights are called {str(source)!r}; there are: {known}; or give a file")
        path = _PUBLISHED / f"{source}.safetensors"
    tensors, metadata = read_tensors(path)
    form = metadata.pop("format", None)
    if form not in (FORMAT, old_format.FORMAT):
        raise WeightsError(f"{path} was not written by `imaml export`: its format is {form!r}")
    try:
        values = {key: json.loads(value) for key, value in metadata.items()}
        return _from_file(path.stem, tensors, values if form == FORMAT else old_format.old_weights(**values))
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"weights {path} cannot be used: {error}") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and the metadata of a safetensors file; WeightsError where it is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except OSError as error:
        raise WeightsError(f"weights {path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise WeightsError(f"weights {path} are damaged: {error}") from error


def _from_file(name: str, tensors: dict[str, Tensor], values: dict[str, Any]) -> Weights:
    card = _card_from_file(values["card"])
    model = from_json(TaskModel, values["model"], "model")  # type: ignore[type-abstract]  # as one of its kinds
    algorithm = from_json(MetaAlgorithm, values["algorithm"], "algorithm")  # type: ignore[type-abstract]
    learnt = {f"log_{name}": tensors.pop(f"log_{name}") for name in getattr(algorithm, "learn", {})}
    carried = {name: tensors.pop(name) for name in algorithm.carried}
    params = {"theta": model.layout.flatten(tensors), **learnt, **carried}
    return Weights(name, params, model, values["criterion"], algorithm, bool(values["shared_head"]), card)


def _card_from_file(values: Mapping[str, Any]) -> Card:
    """Reads a card; one without a reading is from before pictures of one's own were read as the training's."""
    shape, reading = tuple(values["input_shape"]), values.get("reading")
    if reading is not None:
        reading = from_json(Reading, reading, "reading")
    elif values["kind"] == "classification" and len(shape) == 3:
        reading = reading_of_shape(shape)
    return Card(**{**values, "input_shape": shape, "reading": reading})


def _card_to_file(card: Card) -> dict[str, Any]:
    """A card as JSON; the reading in it is as `to_json` makes it, since its values are plain."""
    values = asdict(card)
    may_lack = ("classes", "others", "stages")
    return {name: value for name, value in values.items() if name not in may_lack or value is not None}


def save_weights(path: Path, weights: Weights) -> None:
    """Writes a weights file NAME.safetensors, and its card NAME.md beside it.

    Raises:
        WriteError: a file cannot be written.
    """
    theta = weights.model.layout.views(weights.params["theta"])
    tensors = {name: view.contiguous() for name, view in theta.items()}
    tensors |= {name: value for name, value in weights.params.items() if name != "theta"}
    values = {
        "model": to_json(weights.model),
        "criterion": weights.criterion,
        "algorithm": to_json(weights.algorithm),
        "shared_head": weights.shared_head,
        "card": _card_to_file(weights.card),
    }
    write_tensors(path, FORMAT, tensors, values)
    page = weights.card.to_markdown(path.stem, weights.algorithm, shared_head=weights.shared_head)
    atomic_write(path.with_suffix(".md"), page.encode())


def write_tensors(path: Path, form: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Writes a safetensors file of a format whose metadata are these values as JSON."""
    metadata = {"format": form, **{key: json.dumps(value) for key, value in values.items()}}
    atomic_write(path, save(dict(tensors), metadata))
