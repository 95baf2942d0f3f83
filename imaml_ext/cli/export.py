"""`imaml export`: the meta-parameters of a finished run as a weights file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from imaml_ext.cli.parser import parse
from imaml_ext.train.ranks import Ranks


@dataclass(frozen=True)
class Options:
    """Write what a finished run has learnt as a safetensors file, with a card beside it."""

    run: tyro.conf.Positional[Path]  # The run directory.
    output: tyro.conf.Positional[Path]  # The file, NAME.safetensors; the card is NAME.md.
    commit: str = ""  # Commit of the sources that trained it, where the run does not say.


def run(arguments: list[str], ranks: Ranks) -> int:
    options = parse(Options, arguments, prog="imaml export")
    from imaml_ext.train.export import export_run

    weights = export_run(options.run, options.output, commit=options.commit)
    print(f"{weights.card.figure}: {options.output}, {options.output.with_suffix('.md')}")
    return 0
