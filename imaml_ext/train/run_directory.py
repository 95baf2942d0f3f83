"""The files of a run directory, each whole or absent whatever happens while it is written.

config.json           recipe, resolved configuration, versions and hardware; written first
classes.json          the data set, and the classes of each split
metrics.jsonl         one line per logged meta-step
checkpoints/          step-00000200.pt, …
tensorboard/          events, where tensorboard is installed
learning_curve.png    episodes.png    result.json
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imaml_ext.data import Dataset, RecordedClasses
from imaml_ext.data.listing import named
from imaml_ext.errors import ConfigError, RunError
from imaml_ext.files import atomic_write, json_bytes
from imaml_ext.progress import say
from imaml_ext.settings import changed, from_json, leaves
from imaml_ext.train.config import TrainConfig
from imaml_ext.train.legacy import config_from_old


class RunDirectory:
    """Names the files in the directory of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.classes = path / "classes.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.learning_curve = path / "learning_curve.png"
        self.episodes = path / "episodes.png"
        self.result = path / "result.json"

    @classmethod
    def of_last_stage(cls, path: Path) -> RunDirectory:
        """Returns the run in a directory or, where the stages of a recipe lie in it, that of the last stage so far."""
        return cls.stages_in(path)[-1]

    @classmethod
    def stages_in(cls, path: Path) -> list[RunDirectory]:
        """Returns the runs of the stages that lie in a directory, in their order; itself where it has none."""
        numbered = ((entry.name.partition("-")[0], cls(entry)) for entry in path.glob("*-*"))
        stages = {int(number): each for number, each in numbered if number.isdecimal() and each.holds_run()}
        return [stages[number] for number in sorted(stages)] if stages and not cls(path).holds_run() else [cls(path)]

    def is_empty(self) -> bool:
        """Tells whether nothing is there yet, or nothing but the lock of a run that ended before it wrote anything."""
        with explained(f"run directory {self.path} cannot be used"):
            if not self.path.exists():
                return True
            rest = [entry for entry in self.path.iterdir() if entry.name != "lock" and entry.suffix != ".tmp"]
            return not rest or (rest == [self.checkpoints] and not any(self.checkpoints.iterdir()))

    def holds_run(self) -> bool:
        return self.config.is_file()

    def forget_result(self) -> None:
        """Removes the result of a run that is about to go on; RunError where that is not possible."""
        with explained(f"cannot remove {self.result}"):
            self.result.unlink(missing_ok=True)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Creates the directory and holds it for this process alone; RunError where another is training in it."""
        with explained(f"cannot write to run directory {self.path}"):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "lock").open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise RunError(f"another process is training in {self.path}") from error
                # Some network file systems have no locks; the run itself does not need one.
            for leftover in (*self.path.glob(".*.tmp"), *self.checkpoints.glob(".*.tmp")):
                leftover.unlink(missing_ok=True)  # of a process that was killed while writing
            yield

    def is_held(self) -> bool:
        """Tells whether a process is training in the directory, as far as its file system has locks."""
        try:
            with (self.path / "lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno == errno.EWOULDBLOCK
        return False


@dataclass(frozen=True)
class RecordedRun:
    """Holds what config.json says of a run; older ones say nothing of `command` and `dataset`."""

    recipe: str
    config: TrainConfig
    environment: dict[str, Any]
    command: str = ""
    dataset: dict[str, Any] | None = None  # description, input_shape and reading


def read_config(directory: RunDirectory) -> RecordedRun:
    """Reads the configuration of a run; RunError where there is none, or it is damaged."""
    return read_recorded(directory.config)


def read_recorded(path: Path) -> RecordedRun:
    """Reads what a file `config.json` says of a run, wherever it lies; errors as of `read_config`."""
    try:
        recorded = json.loads(path.read_text())
        here = recorded.get("environment", {})
        if "preset" in recorded:
            return RecordedRun(str(recorded["preset"]), config_from_old(recorded["config"]), here)
        recipe, config = str(recorded["recipe"]), from_json(TrainConfig, recorded["config"])
        return RecordedRun(recipe, config, here, recorded.get("command", ""), recorded.get("dataset"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RunError(f"{path.parent} holds no run: there is no {path.name}") from error
    except KeyError as error:
        raise RunError(f"{path} cannot be read: it has no {error.args[0]!r}, as that of a run has") from error
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def record_config(directory: RunDirectory, stamp: Mapping[str, Any]) -> None:
    """Writes config.json; of a run that is there already, the settings alone, and what it began with stays recorded."""
    begun = json.loads(directory.config.read_text()) if directory.holds_run() else {}
    kept = {} if "preset" in begun else begun  # an older form
    atomic_write(directory.config, json_bytes({**stamp, **kept, "config": stamp["config"]}))


# Settings that a resumed run may set anew: they change where and how it runs, not what comes out.
_FREE_ON_RESUME = ("data.root", "data.cache_dir", "data.download", "data.splits", "evaluation.", "run.")
_FIXED_OF_RUN = ("run.seed", "run.dtype")


def absolute(config: TrainConfig) -> TrainConfig:
    """Returns the configuration as it means the same wherever it is read: with absolute paths of data and weights."""
    paths = {name: path for name, path in leaves(config.data, "data.") if isinstance(path, Path)}
    places: dict[str, Any] = {name: path.expanduser().absolute() for name, path in paths.items()}
    source = config.theta.weights
    if source is not None and (source.endswith(".safetensors") or RunDirectory.of_last_stage(Path(source)).holds_run()):
        places["theta.weights"] = str(Path(source).absolute())
    return changed(config, places)


def check_directory(directory: RunDirectory, config: TrainConfig, *, resume: bool, more_steps: bool = False) -> None:
    """Checks that a run writes over no other one, and continues none under other settings.

    With `more_steps`, `outer.steps` may be larger than it was, where the schedule does not depend on it.

    Raises:
        RunError: the directory is not empty, or with `resume` holds something other than a run.
        ConfigError: with `resume`, its run has other settings.
    """
    if directory.is_empty():
        return
    if not resume:
        raise RunError(f"{directory.path} is not empty: continue its run with --resume, or give another --run-dir")
    if not directory.holds_run():
        raise RunError(f"{directory.path} holds no run to resume (it has no config.json); give another --run-dir")
    before = read_config(directory).config
    grown = more_steps and config.outer.steps > before.outer.steps
    if grown and before.outer.schedule != "constant":
        raise ConfigError(
            f"a run of outer.schedule {before.outer.schedule!r} takes no more than its {before.outer.steps} steps, on "
            f"which its rates depend; a new run begins where it has ended with --theta.weights {directory.path}"
        )
    recorded, now = (dict(leaves(each)) for each in (before, config))
    for name in now | recorded:
        was, value = recorded.get(name), now.get(name)
        free = name.startswith(_FREE_ON_RESUME) and name not in _FIXED_OF_RUN
        if name == "theta.weights" and was and value:  # the same ones, wherever they lie now
            free = Path(was).name == Path(value).name
        if value != was and not free and not (grown and name == "outer.steps"):
            where = f"{name} was {was!r} in {directory.path}, now {value!r}"
            raise ConfigError(f"a resumed run keeps its settings: {where}")


def record_classes(directory: RunDirectory, dataset: Dataset) -> None:
    """Writes which classes are in which split, where the run has no such file yet."""
    if dataset.classes() and not directory.classes.exists():
        atomic_write(directory.classes, json_bytes({"data": dataset.name, "classes": dataset.classes()}))


def read_classes(directory: RunDirectory) -> RecordedClasses | None:
    """Returns the classes that a run was trained with; None where it does not say."""
    try:
        recorded = json.loads(directory.classes.read_text())
        return RecordedClasses(recorded["data"], recorded["classes"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{directory.classes} cannot be read: {error}") from error


def check_recorded_classes(directory: RunDirectory, dataset: Dataset) -> None:
    """Checks that a run is continued or judged on classes that it has not learnt from, and tells of new ones.

    Raises:
        DataError: classes have moved to another split.
    """
    recorded = read_classes(directory)
    new = recorded.check(dataset, what=f"the run {directory.path}") if recorded is not None else []
    if new:
        say(f"{len(new)} classes are new since {directory.path} began: {named(new)}")


class MetricsLog:
    """Appends to `metrics.jsonl`, one JSON object per line, each whole or not at all."""

    def __init__(self, path: Path, *, keep_until_step: int) -> None:
        """Opens the file and drops what lies behind `keep_until_step`, the step that the run continues from."""
        self.path = path
        with explained(f"cannot write {path}"):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._size = _bytes_until(path, keep_until_step)
            os.ftruncate(self._descriptor, self._size)

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a line; where it cannot be written, the file is as it was before."""
        line, written = json_bytes(row, indent=None), 0
        with explained(f"cannot write {self.path}"):
            try:
                while written < len(line):  # a disk that is almost full takes a part, and says at the next write why
                    written += os.pwrite(self._descriptor, line[written:], self._size + written)
            except OSError:
                os.ftruncate(self._descriptor, self._size)
                raise
        self._size += len(line)

    def sync(self) -> None:
        """Puts the lines on the disk: before a checkpoint that a resumed run would continue them from."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def _bytes_until(path: Path, step: int) -> int:
    """Returns the length of the part of a metrics file whose lines are at or before `step`."""
    length = 0
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n") or _row(path, number, line)["step"] > step:  # torn by a crash, or behind the step
            break
        length += len(line)
    return length


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """Reads a line of a metrics file."""
    try:
        row = json.loads(line)
        return {"step": row["step"], **row}
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged: line {number} is not a metrics line") from error


def read_result(directory: RunDirectory) -> dict[str, Any] | None:
    """Returns the content of result.json, None where there is none: the run is not finished."""
    if not directory.result.is_file():
        return None
    try:
        result = json.loads(directory.result.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{directory.result} cannot be read: {error}") from error
    missing = {"steps", "command", "test", "train_seconds", "environment"} - set(result)
    if missing:
        raise RunError(f"{directory.result} lacks {', '.join(sorted(missing))}")
    return result


def tested_step(result: Mapping[str, Any]) -> int:
    """Returns the step whose parameters a result.json is about: the best one where it was chosen, else the last."""
    return result.get("best", {}).get("step", result["steps"])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics file, without one that is not whole yet; RunError where another one is damaged."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return [_row(path, number, line) for number, line in enumerate(lines, start=1) if line.endswith(b"\n")]


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Makes a RunError of what the operating system cannot do."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{what}: {error.strerror or error}") from error


def stage_summary(directory: RunDirectory) -> dict[str, Any]:
    """Says of a finished stage what it trained on, and how long; RunError where it is not finished, or damaged."""
    config, result = read_config(directory).config, read_result(directory)
    if result is None:
        raise RunError(f"{directory.path} is not finished")
    return {
        "name": directory.path.name,
        "tasks": f"{config.tasks.ways}-way {config.tasks.shots}-shot" if config.classification else "regression",
        "meta_steps": result["steps"],
        "meta_batch": config.outer.meta_batch,
        "train_seconds": result["train_seconds"],
    }
