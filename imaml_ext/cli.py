"""`imaml train | evaluate | export | reproduce | data | doctor`: the command line, made from the configuration classes.

Under torchrun, `imaml train` is one job of several processes, and rank 0 speaks for it.

Exit codes: 0 done; 1 an error that the message on stderr explains; 2 an unknown command, preset or knob; 130 and 143
stopped by Ctrl-C or SIGTERM, after saving.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import os
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from imaml_ext.errors import ConfigError, ImamlError, ReportedElsewhere, RunError
from imaml_ext.reproduce import EXPERIMENTS, ExperimentOptions
from imaml_ext.training.config import DatasetName, FromScratch, SourceConfig, TrainConfig
from imaml_ext.training.presets import PRESETS
from imaml_ext.training.ranks import Ranks, joined
from imaml_ext.training.run_directory import RecordedRun, RunDirectory, read_config

# torch, matplotlib and the data are imported by the command that needs them: `imaml --help` answers at once.


@dataclass(frozen=True)
class Train:
    """Meta-train as a preset says; every knob of it can be set."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]

    run_dir: Path | None = None
    """Where everything is written; unset: runs/PRESET."""

    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Continue the run in the run directory, or begin it where there is none."""

    checkpoint: Path | None = None
    """With --resume: continue from this checkpoint of the run instead of the newest."""

    debug: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the traceback of an error (as IMAML_DEBUG=1 does)."""


@dataclass(frozen=True)
class Evaluate:
    """Test the parameters of a run, or pretrained ones, on tasks that they were never trained on."""

    run: tyro.conf.Positional[Path | None] = None
    """The run directory."""

    pretrained: str | None = None
    """In place of a run: the name of weights that come with the package, or a file NAME.safetensors."""

    checkpoint: Path | None = None
    """A checkpoint file; unset: the run's newest."""

    tasks: int | None = None
    """Tasks; unset: as many as the run was configured to be tested on."""

    split: Literal["test", "val", "train"] = "test"
    """Classes that the tasks are made of."""

    seed: int | None = None
    """Seed of the tasks; unset: evaluation.seed of the run."""

    ways: int | None = None
    """Classes of a task, by a last layer that they share (with --pretrained); unset: as in training."""

    shots: int | None = None
    """Examples a class that are adapted to; unset: as in the run."""

    inner_steps: int | None = None
    """Inner steps of the adaptation; unset: as in the run."""

    meta_batch: int | None = None
    """Tasks at a time; unset: as in the run."""

    device: str | None = None
    """Device; unset: as in the run."""

    data_root: Path | None = None
    """Folder of the data set's files; unset: as in the run."""

    from_scratch: int | None = None
    """Beside it, on the same tasks: the network trained on each task alone, by so many steps of Adam."""

    scratch_lr: float = FromScratch.lr
    """Learning rate of these steps."""

    output: Path | None = None
    """Write the result to this JSON file too."""

    debug: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class Export:
    """Write the meta-parameters of a finished run as a safetensors file, and its card beside it."""

    run: tyro.conf.Positional[Path]
    """The run directory."""

    output: tyro.conf.Positional[Path]
    """The file, NAME.safetensors; the card is NAME.md."""

    commit: str = ""
    """Commit of the sources that trained it, where the run does not say."""

    debug: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class Data(SourceConfig):
    """Prepare a data set (render, download or pack it, once) and say what is in it."""

    name: tyro.conf.Positional[DatasetName] = dataclasses.field()  # required here
    """The data set."""

    picture: Path | None = None
    """Write a picture with samples of each split (PNG)."""

    debug: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class Doctor:
    """Print versions, how the extension was built, what it can use, and what to do about whatever is missing."""

    debug: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class _Command:
    """A parsed command line: what to do, and for training the preset that was named."""

    options: Train | Evaluate | Export | ExperimentOptions | Data | Doctor
    preset: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    debug = "--debug" in arguments or os.environ.get("IMAML_DEBUG", "") not in ("", "0")
    try:
        with joined() as ranks:
            return _dispatch(arguments, ranks)
    except KeyboardInterrupt:
        return 130
    except ReportedElsewhere as error:
        return error.exit_code
    except Exception as error:
        if debug or not isinstance(error, ImamlError):  # a defect of ours needs its traceback
            traceback.print_exc()
        else:
            print(f"imaml: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)


def _parse(arguments: list[str]) -> _Command:
    """The command line as one of the classes above; tyro ends the process with 2 where it cannot be understood."""
    if arguments[:1] == ["train"] and len(arguments) > 1 and arguments[1] in PRESETS:
        return _Command(_parse_train(arguments[1], arguments[2:]), arguments[1])
    if arguments[:1] == ["reproduce"] and len(arguments) > 1 and arguments[1] in EXPERIMENTS:
        kind = EXPERIMENTS[arguments[1]]
        return _Command(tyro.cli(kind, prog=f"imaml reproduce {kind.name}", args=arguments[2:]))
    presets: list[Any] = [
        Annotated[Train, tyro.conf.subcommand(name=name, default=Train(preset.config), description=preset.description)]
        for name, preset in PRESETS.items()
    ]
    train: Any = Annotated[_either(presets), tyro.conf.subcommand("train", description="Meta-train as a preset says.")]
    experiments: list[Any] = [Annotated[kind, tyro.conf.subcommand(name)] for name, kind in EXPERIMENTS.items()]
    reproduce: Any = Annotated[
        _either(experiments), tyro.conf.subcommand("reproduce", description="Repeat an experiment of the paper.")
    ]
    others = [Annotated[kind, tyro.conf.subcommand(kind.__name__.lower())] for kind in (Evaluate, Export, Data, Doctor)]
    commands = _either([train, reproduce, *others])
    options = tyro.cli(
        commands, prog="imaml", description="Few-shot meta-learning with implicit gradients.", args=arguments
    )
    return _Command(options)


def _either(kinds: list[Any]) -> Any:
    """A union made at run time."""
    return functools.reduce(operator.or_, kinds)


def _parse_train(name: str, arguments: list[str], config: TrainConfig | None = None) -> Train:
    """`imaml train PRESET …`, with `config` in place of the preset's where the command line gives none."""
    preset = PRESETS[name]
    options = tyro.cli(
        Train,
        prog=f"imaml train {name}",
        description=preset.description,
        default=Train(config or preset.config),
        args=arguments,
    )
    if options.checkpoint is not None and not options.resume:
        raise ConfigError("--checkpoint says where to continue from: it needs --resume")
    return dataclasses.replace(options, run_dir=options.run_dir or Path("runs") / name)


def _recorded(path: Path, preset: str) -> RecordedRun | None:
    """The run of this preset that is in a directory, None where there is no run yet."""
    directory = RunDirectory(path)
    if not directory.holds_run():
        return None
    recorded = read_config(directory)
    if recorded.preset != preset:
        raise RunError(f"{path} holds a run of the preset {recorded.preset!r}, not of {preset!r}")
    return recorded


def _dispatch(arguments: list[str], ranks: Ranks) -> int:
    with contextlib.nullcontext() if ranks.first else _unheard():
        command = ranks.together(_parse, arguments)
    match command.options:
        case Train() as options:
            return _train(options, command.preset, arguments, ranks)
        case _ if ranks.size > 1:
            raise ranks.once(RunError(f"imaml {arguments[0]} runs in one process: start it without torchrun"))
        case Evaluate() as options:
            return _evaluate(options, command=shlex.join(["imaml", *arguments]))
        case Export() as options:
            return _export(options)
        case ExperimentOptions() as options:
            from imaml_ext.reproduce import reproduce

            reproduce(options, command=shlex.join(["imaml", *arguments]))
            return 0
        case Data() as options:
            return _data(options)
        case Doctor():
            from imaml_ext.doctor import doctor

            return int(doctor() or 0)


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Where rank 0 says the same."""
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _train(options: Train, preset: str, arguments: list[str], ranks: Ranks) -> int:
    from imaml_ext.training.trainer import train

    run_dir = options.run_dir
    assert run_dir is not None
    if options.resume:  # a run keeps its own settings where the command line gives none
        recorded = ranks.on_first(_recorded, run_dir, preset)
        if recorded is not None:
            options = ranks.together(_parse_train, preset, arguments[2:], recorded.config)
    train(
        options.config,
        run_dir,
        preset=preset,
        command=shlex.join(["imaml", *arguments]),
        resume=options.resume,
        checkpoint=options.checkpoint,
    )
    return 0


def _evaluate(options: Evaluate, *, command: str) -> int:
    from imaml_ext.files import atomic_write, json_bytes
    from imaml_ext.pretrained import evaluate_pretrained
    from imaml_ext.training.environment import environment
    from imaml_ext.training.evaluation import EvaluationOverrides, evaluate_run

    if (options.run is None) == (options.pretrained is None):
        raise ConfigError("evaluate needs a run directory or --pretrained NAME, and not both")
    names = [item.name for item in dataclasses.fields(EvaluationOverrides)]
    overrides = EvaluationOverrides(**{name: getattr(options, name) for name in names})
    scratch = None if options.from_scratch is None else FromScratch(options.from_scratch, options.scratch_lr)
    if options.run is not None:
        result = evaluate_run(
            options.run, overrides, checkpoint=options.checkpoint, split=options.split, from_scratch=scratch
        )
    else:
        if options.checkpoint is not None:
            raise ConfigError("--checkpoint is of a run directory: it cannot be given with --pretrained")
        result = evaluate_pretrained(str(options.pretrained), overrides, split=options.split, from_scratch=scratch)
    if options.output is not None:
        stamp = {"command": command, "environment": environment(result.device)}
        atomic_write(options.output, json_bytes(result.to_json() | stamp))
    print(result)
    return 0


def _export(options: Export) -> int:
    from imaml_ext.pretrained import export_run

    weights = export_run(options.run, options.output, commit=options.commit)
    print(f"{weights.card.figure}: {options.output}, {options.output.with_suffix('.md')}")
    return 0


def _data(options: Data) -> int:
    from imaml_ext.data import summary
    from imaml_ext.training.experiment import open_dataset

    dataset = open_dataset(options)
    print(summary(dataset))
    if options.picture is not None:
        from imaml_ext.training.reports import draw_samples

        draw_samples(options.picture, dataset)
    return 0
