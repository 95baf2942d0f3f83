"""What a finished run has learnt, as weights: for a file, and for another run to begin with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from imaml_ext.errors import RunError
from imaml_ext.pretrained.weights import Card, Weights, save_weights
from imaml_ext.settings import changed, leaves, to_json
from imaml_ext.train.checkpoint import chosen_checkpoint
from imaml_ext.train.run_directory import RunDirectory, read_classes, read_config, read_result, tested_step


def export_run(run: Path, output: Path, *, commit: str = "") -> Weights:
    """Writes the meta-parameters of a finished run as a weights file, and its card beside it (`.md`).

    Args:
        run: the run directory. output: NAME.safetensors. commit: of the sources that trained it, where the run does not
            say.

    Raises:
        RunError: the directory holds no finished run, or the files cannot be written.
        ConfigError, DataError: its data set is not there (its description is written into the card).
    """
    if output.suffix != ".safetensors":
        raise RunError(f"output must be a file NAME.safetensors, got {output}")
    weights = run_weights(run, commit=commit)
    save_weights(output, replace(weights, name=output.stem))
    return weights


def run_weights(run: Path, *, commit: str = "") -> Weights:
    """Reads the evaluated meta-parameters of a finished run, or of its last stage, with all that belongs to them."""
    directory = RunDirectory.of_last_stage(run)
    recorded, result = read_config(directory), read_result(directory)
    if result is None:
        raise RunError(f"{directory.path} is not finished: it has no result.json")
    saved = chosen_checkpoint(directory)
    if saved.step != tested_step(result):
        raise RunError(f"{run} has no checkpoint of step {tested_step(result)}, which its result.json is about")
    config = recorded.config
    dataset = config.data.load()
    classes = read_classes(directory)
    places = {name: None for name, _ in leaves(config.data) if name in ("root", "cache_dir", "splits")}
    card = Card(
        recipe=recorded.recipe,
        command=result["command"],
        commit=commit or result["environment"].get("commit", ""),
        description=dataset.description,
        data=to_json(changed(config.data, places)),
        tasks=to_json(config.tasks),
        kind=config.data.kind_of_task,
        input_shape=tuple(dataset.input_shape),
        reading=dataset.reading,
        classes=None if classes is None else classes.classes,
        steps=saved.step,
        meta_batch=config.outer.meta_batch,
        train_seconds=result["train_seconds"],
        test=result["test"],
        environment=result["environment"],
        trained_from=None if config.theta.weights is None else Path(config.theta.weights).name,
    )
    loss = config.task_loss(dataset.input_shape)
    return Weights(
        name=directory.path.name,
        params=saved.evaluated,
        model=loss.model,
        criterion="cross_entropy" if config.classification else "mse",
        algorithm=changed(config.algorithm, {"inner.steps": config.test_inner_steps}),
        shared_head=config.theta.shared_head,
        card=card,
    )
