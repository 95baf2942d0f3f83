"""Trains a recipe: one run, or one per stage, each of which begins with what the one before has learnt."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from imaml_ext.data.cache import named_folder
from imaml_ext.data.source import DataSource, FileSource
from imaml_ext.errors import ConfigError, RunError
from imaml_ext.progress import say
from imaml_ext.settings import changed
from imaml_ext.train.config import TrainConfig, differences
from imaml_ext.train.job import joined
from imaml_ext.train.recipe import Recipe
from imaml_ext.train.run_directory import RunDirectory, absolute, check_directory, explained, read_config, read_result
from imaml_ext.train.trainer import OnLog, train


def train_recipe(
    recipe: Recipe,
    path: Path,
    *,
    name: str = "",
    command: str = "",
    changes: Mapping[str, Any] | None = None,
    resume: bool = False,
    checkpoint: Path | None = None,
    on_log: OnLog | None = None,
) -> dict[str, Any]:
    """Trains as a recipe says, and leaves everything in `path`.

    A recipe without stages is one run in `path`. With stages, each is a run in a directory of its own, `path/1-NAME`,
    `path/2-NAME`, …, and begins with the meta-parameters that the one before was tested with. With `resume`, stages
    that are finished are passed over, and the first that is not is begun or continued.

    Args:
        name: for the record, in place of the recipe's own. changes: of its settings in every stage, {path: value}; a
            recipe with stages that is resumed keeps those that it was begun with.
        checkpoint: of the stage that is continued, in place of its newest.
        on_log: as of `trainer.train`; True ends the stage.

    Returns:
        The content of the last result.json.

    Raises:
        ImamlError: as `train` does.
    """
    changes, record = dict(changes or {}), {"recipe": name or recipe.name, "command": command}
    if not recipe.stages:
        config = changed(recipe.config, changes)
        return train(config, path, **record, resume=resume, checkpoint=checkpoint, on_log=on_log)
    places = _places(recipe, path)
    result: dict[str, Any] | None = None
    with joined() as ranks:
        configs = ranks.on_first(_planned, recipe, path, places, changes, resume=resume)
        for number, (place, config) in enumerate(zip(places, configs, strict=True), start=1):
            result = ranks.on_first(_finished, place, config)
            if result is None or number == len(places):
                title = f"stage {number} of {len(places)} ({recipe.stages[number - 1].name})"
                if ranks.first:
                    say(f"{title}, in {place}")
                result = train(config, place, **record, stage=title, resume=True, checkpoint=checkpoint, on_log=on_log)
                checkpoint = None
    assert result is not None
    return result


def take_finished_stages(recipe: Recipe, path: Path, changes: Mapping[str, Any], others: Iterable[Path]) -> None:
    """Copies into `path` the first stages that another directory has finished, where they have the same settings.

    Recipes that begin alike thus train their common stages once. The directory that shares most stages is taken. Device
    and threads may have been others. Nothing is done where `path` exists already.

    Raises:
        RunError: a stage cannot be copied.
    """
    if path.exists():
        return
    configs, shared = recipe.staged(changes), list[Path]()
    for other in others:
        found: list[Path] = []
        for place, config in zip(_places(recipe, other), configs, strict=True):
            if not _same(place, changed(config, {"theta.weights": str(found[-1])} if found else {})):
                break
            found.append(place)
        shared = max(shared, found, key=len)
    if not shared:
        return
    say(f"{path} begins with {len(shared)} of {len(configs)} stages of {shared[0].parent}")
    with explained(f"{path} cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as partial:
            try:
                for place in shared:
                    shutil.copytree(place, Path(partial, path.name, place.name))
            except shutil.Error as error:  # which names every file
                raise RunError(f"{path} cannot be written: {error.args[0][0][2]}") from error
            Path(partial, path.name).rename(path)


def _places(recipe: Recipe, path: Path) -> list[Path]:
    return [path / f"{number}-{stage.name}" for number, stage in enumerate(recipe.stages, start=1)]


def _same(place: Path, config: TrainConfig) -> bool:
    """Tells whether a stage is finished, and was trained on such data, and judged, as a configuration says."""
    try:
        if _finished(place, config) is None:
            return False
        done, wanted = read_config(RunDirectory(place)).config, absolute(config)
    except (ConfigError, RunError):  # other settings, or a directory that is damaged
        return False
    start = wanted.theta.weights
    same_start = start == done.theta.weights or (start is not None and Path(start).parent == place.parent.absolute())
    return same_start and (_images(done), done.evaluation) == (_images(wanted), wanted.evaluation)


def _images(config: TrainConfig) -> DataSource:
    """Returns which images a run is trained on: its data, read from the same folder by whichever way it is named."""
    if not isinstance(config.data, FileSource):
        return config.data
    folder = named_folder(config.data.root)
    return replace(config.data, root=folder and folder.absolute())


def _planned(
    recipe: Recipe, path: Path, places: list[Path], changes: Mapping[str, Any], *, resume: bool
) -> list[TrainConfig]:
    """Returns the configurations of the stages, where the directory has no other run in it."""
    directory, first = RunDirectory(path), RunDirectory(places[0])
    if directory.holds_run():
        raise RunError(f"{path} holds a run, and not the stages of a recipe; give another --run-dir")
    if resume and first.holds_run():
        changes = differences(recipe.staged({})[0], read_config(first).config) | dict(changes)
    elif not (first.is_empty() and list(path.glob("*")) == [first.path]):
        check_directory(directory, recipe.config, resume=resume)
    configs = recipe.staged(changes)
    starts = [{}, *({"theta.weights": str(place.resolve())} for place in places)]
    return [changed(config, start) for config, start in zip(configs, starts, strict=False)]


def _finished(place: Path, config: TrainConfig) -> dict[str, Any] | None:
    """Returns the result of a stage that is finished, None of another."""
    directory = RunDirectory(place)
    result = read_result(directory)
    if result is not None:
        check_directory(directory, config, resume=True)
    return result
