"""`imaml export`: the meta-parameters of a run as a weights file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from imaml_ext.cli.parser import parse
from imaml_ext.train.ranks import Ranks


@dataclass(frozen=True)
class Options:
    """Write what a run has learnt, finished or not, as a safetensors file with a card beside it."""

    run: tyro.conf.Positional[Path]  # The run directory.
    output: tyro.conf.Positional[Path]  # The file, NAME.safetensors; the card is NAME.md.
    checkpoint: Path | None = None  # A checkpoint of the run; unset: the one that `imaml evaluate` takes.
    # Write the parameters of a Conv4 or MLP to this file too, as torch.nn layers name and shape them (torch.save).
    state_dict: Path | None = None
    commit: str = ""  # Commit of the sources that trained it, where the run does not say.
    # Folder of the data set's files; only older runs, which have not recorded what their data are, need it.
    data_root: Path | None = None


def run(arguments: list[str], ranks: Ranks) -> int:
    options = parse(Options, arguments, prog="imaml export")
    from imaml_ext.train.export import export_run

    weights = export_run(**vars(options))
    card, files = weights.card, [options.output, options.output.with_suffix(".md"), options.state_dict]
    print(f"{card.figure}, {card.steps:,} meta-steps: {', '.join(str(file) for file in files if file)}")
    return 0
