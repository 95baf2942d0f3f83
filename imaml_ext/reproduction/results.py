"""The files that every experiment leaves: NAME.json, stamped with what it comes from, and tables beside it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from imaml_ext.data import DataSource
from imaml_ext.errors import RunError
from imaml_ext.files import atomic_write, json_bytes
from imaml_ext.reproduction.options import ExperimentOptions, ImageOptions
from imaml_ext.settings import to_json
from imaml_ext.train.environment import environment

_NOT_OF_THE_RESULT = ("output_dir", "data_root", "draw_only")


def output_folder(options: ExperimentOptions) -> Path:
    """Returns the folder of the results, made where it is missing.

    Raises:
        RunError: it cannot be made.
    """
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"output directory {options.folder} cannot be used: {error.strerror or error}") from error
    return options.folder


def write_results(options: ExperimentOptions, device: torch.device, **content: Any) -> None:
    """Writes NAME.json: configuration, versions and hardware, then the content."""
    configuration = {name: value for name, value in to_json(options).items() if name not in _NOT_OF_THE_RESULT}
    stamp = {"experiment": options.name, "configuration": configuration, "environment": environment(device)}
    atomic_write(options.folder / f"{options.name}.json", json_bytes(stamp | content))


def read_json(path: Path, advice: str = "remove it, or give another --output-dir") -> dict[str, Any] | None:
    """Returns the JSON object in a file, None where there is no file.

    Raises:
        RunError: the file is damaged; the message ends with the advice.
    """
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError("it holds no results")
        return values
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}): {advice}") from error


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rows))


def data_source(options: ImageOptions) -> DataSource:
    """Returns the data set that the options name; every orientation of a character is a class of its own."""
    given: dict[str, Any] = {} if options.data_root is None else {"root": options.data_root}
    return DataSource.kind(options.data)(**given, **({"orientations": "classes"} if options.data == "omniglot" else {}))
