"""The command `imaml`: a table of commands, each a module here that is imported only when its command is used.

Under torchrun, `imaml train` is one job of several processes, and rank 0 speaks for it.

Exit codes: 0 done; 1 an error that the message on stderr explains; 2 an unknown command, recipe or option; 130 and 143
stopped by Ctrl-C or SIGTERM, after saving.
"""

from __future__ import annotations

import codecs
import contextlib
import importlib
import io
import os
import sys
import traceback
from collections.abc import Mapping, Sequence

from imaml_ext._record import local_version
from imaml_ext._version import __version__
from imaml_ext.errors import ImamlError, ReportedElsewhere, RunError, option_prefix

# Another command is a module of this name, with `run(arguments, ranks) -> exit code`, and a line here.
COMMANDS = {
    "train": "Train on few-shot tasks, as a recipe says.",
    "evaluate": "Test a trained run, or pretrained weights, on new tasks.",
    "predict": "Learn classes of pictures from a few examples of each, and name new pictures.",
    "runs": "List, compare and plot runs.",
    "export": "Write what a run has learnt as a weights file.",
    "reproduce": "Repeat an experiment of the paper.",
    "data": "Prepare a data set, and describe it.",
    "doctor": "Show versions and what this installation can use.",
}
_USAGE = "usage: imaml COMMAND [OPTIONS]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _write_any_character()
    try:
        try:
            return _explained(arguments)
        finally:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()
    except BrokenPipeError:  # whoever read the output has seen enough of it, as in `imaml … | head`
        for stream in filter(None, (sys.stdout, sys.stderr)):  # the interpreter flushes them once more at its end
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 0


def _explained(arguments: list[str]) -> int:
    """The exit code of a command, whose errors are explained on stderr."""
    debug = "--debug" in arguments or os.environ.get("IMAML_DEBUG", "") not in ("", "0")
    try:
        return _dispatch([word for word in arguments if word != "--debug"])
    except BrokenPipeError:
        raise
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


def _write_any_character() -> None:
    """Lets stdout and stderr write what their encoding lacks: our signs in ASCII, the rest as `\\u2026`."""
    signs = {"±": "+/-", "×": "x", "λ": "lambda", "−": "-", "…": "...", "→": "->", "°": " deg"}

    def spelled(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        wrong = error.object[error.start]
        return signs.get(wrong) or wrong.encode("ascii", "backslashreplace").decode(), error.start + 1

    codecs.register_error("imaml", spelled)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="imaml")


def _dispatch(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    first = os.environ.get("RANK", "0") == "0"
    if name in ("--help", "-h"):
        if first:
            print(_help())
        return 0
    if name == "--version":
        if first:
            print(f"imaml_ext {__version__}{local_version()}")
        return 0
    if name not in COMMANDS:
        if first:
            print(f"{_USAGE}\nimaml: there is no command {name!r}; there are: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    from imaml_ext.train.job import joined

    python = option_prefix.set("--" if name == "data" else "--data.")
    try:
        with joined() as ranks:
            if ranks.size > 1 and name != "train":
                raise ranks.reported_once(RunError(f"imaml {name} runs in one process: start it without torchrun"))
            return int(importlib.import_module(f"imaml_ext.cli.{name}").run(arguments[1:], ranks))
    finally:
        option_prefix.reset(python)


def _help() -> str:
    commands = [f"  {name:<11}{summary}" for name, summary in COMMANDS.items()]
    end = "`imaml COMMAND --help` shows the options of a command. With --debug, or IMAML_DEBUG=1 in the environment,\n"
    end = "`imaml --version` shows the version, and the torch that it was built for.\n" + end
    lines = [_USAGE, "", "Few-shot meta-learning with implicit gradients.", "", "commands:", *commands, ""]
    return "\n".join([*lines, end + "errors show their traceback."])


def chosen_name(arguments: Sequence[str], summaries: Mapping[str, str], *, prog: str, what: str, note: str = "") -> str:
    """The name that a command line begins with; where it is none of them, their list is shown and the process ends."""
    name = arguments[0] if arguments else ""
    if name in summaries:
        return name
    word, width = what.upper().replace(" ", "_"), max(map(len, summaries)) + 2
    lines = [f"  {known:<{width}}{summary}" for known, summary in summaries.items()]
    text = "\n".join(
        [f"usage: {prog} {word} [OPTIONS]", "", *lines, "", f"{note}`{prog} {word} --help` shows the options."]
    )
    if name in ("--help", "-h"):
        print(text)
        raise SystemExit(0)
    problem = f"there is no {what} {name!r}" if name else f"name one of these, a {what}"
    print(f"{text}\n{prog}: {problem}", file=sys.stderr)
    raise SystemExit(2)
