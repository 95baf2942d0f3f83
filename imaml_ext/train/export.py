"""What a run has learnt, as weights: for a file, and for another run to begin with."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from imaml_ext.data import Dataset
from imaml_ext.errors import CheckpointError, RunError
from imaml_ext.files import atomic_write
from imaml_ext.pictures import Reading
from imaml_ext.pretrained.state_dict import torch_state_dict
from imaml_ext.pretrained.weights import Card, Weights, read_weights, save_weights
from imaml_ext.settings import changed, from_json, leaves, to_json
from imaml_ext.train.checkpoint import Checkpoint, chosen_checkpoint, load_checkpoint
from imaml_ext.train.config import TrainConfig
from imaml_ext.train.run_directory import (
    RecordedRun,
    RunDirectory,
    read_classes,
    read_config,
    read_metrics,
    read_result,
    stage_summary,
    tested_step,
)


def export_run(
    run: Path,
    output: Path,
    *,
    commit: str = "",
    checkpoint: Path | None = None,
    data_root: Path | None = None,
    state_dict: Path | None = None,
    others: Mapping[str, Mapping[str, Any]] | None = None,
) -> Weights:
    """Writes the meta-parameters of a run as a weights file, and its card beside it (`.md`).

    Args:
        run: the run directory; the run may be unfinished. output: NAME.safetensors.
        commit: of the sources that trained it, where the run does not say.
        checkpoint: of the run, in place of the one that is evaluated.
        data_root: folder of the data, which is looked at only for a run that has not recorded what its data are.
        state_dict: a file for theta as the state_dict of torch.nn layers (`torch_state_dict`) too.
        others: what other tests than that of the run have found, for the card: see `Card`.

    Raises:
        RunError: the directory holds no run or no checkpoint, or the files cannot be written.
        CheckpointError: a checkpoint that is damaged, or not of this run.
        ConfigError, DataError: the data of a run that has not recorded what they are is not there.
        WeightsError: the model has no form as torch.nn layers.
    """
    if output.suffix != ".safetensors":
        raise RunError(f"output must be a file NAME.safetensors, got {output}")
    weights = run_weights(run, commit=commit, checkpoint=checkpoint, data_root=data_root)
    weights = replace(weights, card=replace(weights.card, others=others))
    if state_dict is not None:
        buffer = io.BytesIO()
        torch.save(torch_state_dict(weights.model, weights.params["theta"]), buffer)
        atomic_write(state_dict, buffer.getvalue())
    save_weights(output, replace(weights, name=output.stem))
    return weights


def weights_from(source: Path | str) -> Weights:
    """Reads weights by name, from a file, or from the directory of a finished run."""
    if not RunDirectory.of_last_stage(Path(source)).holds_run():
        return read_weights(source)
    weights, result = run_weights(Path(source)), read_result(RunDirectory.of_last_stage(Path(source)))
    if result is None or weights.card.steps != tested_step(result):
        raise RunError(f"{source} is not finished: export it, and give the file")
    return weights


def run_weights(
    run: Path, *, commit: str = "", checkpoint: Path | None = None, data_root: Path | None = None
) -> Weights:
    """Reads the meta-parameters of a run, or of its last stage, with all that belongs to them; as `export_run`."""
    *before, directory = RunDirectory.stages_in(run)
    recorded, result = read_config(directory), read_result(directory)
    begun_with = (read_config(before[0]).config if before else recorded.config).theta.weights
    saved, config, classes = saved_parameters(directory, checkpoint), recorded.config, read_classes(directory)
    if data_root is not None:
        config = changed(config, {"data.root": data_root})
    record: Mapping[str, Any] = vars(recorded) | {"train_seconds": saved.seconds, "test": None}
    if result is not None and saved.step == tested_step(result):
        record = result
    data, where = _DataRecord.of_run(recorded, config), record["environment"]
    card = Card(
        recipe=recorded.recipe,
        command=without_folders(record["command"]),
        commit=commit or where.get("commit", ""),
        description=data.description,
        data=to_json(changed(config.data, dict.fromkeys(_places(config), None))),
        tasks=to_json(config.tasks),
        kind=config.data.kind_of_task,
        input_shape=data.input_shape,
        reading=data.reading,
        classes=None if classes is None else classes.classes,
        steps=saved.step,
        meta_batch=config.outer.meta_batch,
        train_seconds=record["train_seconds"],
        test=record["test"] or _validated(directory, config, saved.step),
        environment=where,
        trained_from=None if begun_with is None else Path(begun_with).name,
        stages=[stage_summary(stage) for stage in before] or None,
    )
    loss = config.task_loss(data.input_shape)
    return Weights(
        name=directory.path.name,
        params=saved.evaluated,
        model=loss.model,
        criterion="cross_entropy" if config.classification else "mse",
        algorithm=changed(config.algorithm, {"inner.steps": config.test_inner_steps}),
        shared_head=config.theta.shared_head,
        card=card,
    )


def saved_parameters(directory: RunDirectory, checkpoint: Path | None = None) -> Checkpoint:
    """Returns the checkpoint that a run is judged by, or the one asked for, which must be of this run."""
    if checkpoint is not None:
        if checkpoint.resolve().parent != directory.checkpoints.resolve():
            raise CheckpointError(f"checkpoint must be one of {directory.checkpoints}, got {checkpoint}")
        return load_checkpoint(checkpoint)
    return chosen_checkpoint(directory)


def _validated(directory: RunDirectory, config: TrainConfig, step: int) -> dict[str, Any] | None:
    """Returns the figures of the validation at a step, in the form of a test; None where there was none."""
    rows = [row for row in read_metrics(directory.metrics) if row["step"] == step and "val_loss" in row]
    if not rows:
        return None
    names = ("loss", "loss_interval", "accuracy", "accuracy_interval")
    settings = config.evaluation
    asked = {"split": "val", "tasks": settings.validation_tasks, "seed": settings.seed, "shots": config.tasks.shots}
    return asked | {"inner_steps": config.test_inner_steps} | {name: rows[-1].get(f"val_{name}") for name in names}


# --- what a run and a card say of the data --------------------------------------------------------------------------


@dataclass(frozen=True)
class _DataRecord:
    """Says of a data set what its weights need to know; `to_json` is what a run records."""

    description: str  # one line, without the folder that the data lie in
    input_shape: tuple[int, ...]
    reading: Reading | None

    @classmethod
    def of(cls, dataset: Dataset, config: TrainConfig) -> _DataRecord:
        description = dataset.description
        for place in _places(config).values():
            description = description.replace(str(place), place.name)
        return cls(description, tuple(dataset.input_shape), dataset.reading)

    @classmethod
    def of_run(cls, recorded: RecordedRun, config: TrainConfig) -> _DataRecord:
        """Returns what a run has recorded; an older run has not, and its data are loaded."""
        known = recorded.dataset
        if known is None:
            return cls.of(config.data.load(), config)
        reading = None if known["reading"] is None else from_json(Reading, known["reading"], "reading")
        return cls(known["description"], tuple(known["input_shape"]), reading)

    def to_json(self) -> dict[str, Any]:
        return {
            "description": self.description,
            "input_shape": list(self.input_shape),
            "reading": None if self.reading is None else to_json(self.reading),
        }


def dataset_record(dataset: Dataset, config: TrainConfig) -> dict[str, Any]:
    """Returns what a run records of its data set, so that its weights can be exported without it."""
    return _DataRecord.of(dataset, config).to_json()


def _places(config: TrainConfig) -> Mapping[str, Path]:
    """Returns the folders and files of this machine that the data are read from."""
    return {name: value for name, value in leaves(config.data) if isinstance(value, Path)}


_OF_PLACES = re.compile(r"--?[\w.-]*(root|dir|weights|checkpoint|file|output|splits)")


def without_folders(command: str) -> str:
    """Returns a command line with the name of each file or folder in place of its path."""
    try:
        words = shlex.split(command)
    except ValueError:  # not of a shell
        return ""
    shown = []
    for before, word in zip(["", *words], words, strict=False):
        option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        if value.startswith(("/", "~", ".")) or ("/" in value and _OF_PLACES.fullmatch(option or before)):
            value = Path(value).name
        shown.append(f"{option}{equals}{value}")
    return shlex.join(shown)
