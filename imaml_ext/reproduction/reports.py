"""What every experiment leaves: NAME.json, stamped with what it comes from, and pictures and tables beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from imaml_ext.errors import RunError
from imaml_ext.files import atomic_write, json_bytes
from imaml_ext.reproduce.options import ExperimentOptions
from imaml_ext.training.config import to_json
from imaml_ext.training.environment import environment

# One name and one colour an algorithm, in every figure.
LABELS = {
    "maml": "MAML",
    "maml-checkpoint": "MAML, checkpointed",
    "fomaml": "first-order MAML",
    "reptile": "Reptile",
    "imaml-gd": "iMAML, gradient descent",
    "imaml-hf": "iMAML, Hessian-free",
}
COLORS = {
    "maml": "#d62728",
    "maml-checkpoint": "#ff7f0e",
    "fomaml": "#2ca02c",
    "reptile": "#8c564b",
    "imaml-gd": "#1f77b4",
    "imaml-hf": "#9467bd",
}


def output_folder(path: Path) -> Path:
    """The folder, made where it is missing.

    Raises:
        RunError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"output directory {path} cannot be used: {error.strerror or error}") from error
    return path


def write_results(path: Path, options: ExperimentOptions, device: torch.device, **content: Any) -> None:
    """NAME.json: configuration, versions and hardware, then the content."""
    configuration = to_json(options)
    for not_of_the_result in ("output_dir", "data_root", "debug", "draw_only"):
        configuration.pop(not_of_the_result, None)
    stamp = {"experiment": options.name, "configuration": configuration, "environment": environment(device)}
    atomic_write(path, json_bytes({**stamp, **content}))


def read_results(path: Path) -> dict[str, Any] | None:
    """What `write_results` wrote, None where there is nothing yet.

    Raises:
        RunError: the file is damaged.
    """
    try:
        results = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}): remove it, or give another --output-dir") from error
    if not isinstance(results, dict):
        raise RunError(f"{path} holds no results: remove it, or give another --output-dir")
    return results


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
