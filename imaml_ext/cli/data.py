"""`imaml data`: a data set is rendered, downloaded or packed once, and described."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from imaml_ext.cli import chosen_name
from imaml_ext.cli.parser import parse, summary_of
from imaml_ext.data import DataSource, summary
from imaml_ext.train.ranks import Ranks


@dataclass(frozen=True)
class Options:
    """Prepare a data set (render, download or pack it, once) and describe it."""

    source: Annotated[DataSource, tyro.conf.arg(name="")]

    picture: Path | None = None  # Write a picture with samples of each split (PNG).


def run(arguments: list[str], ranks: Ranks) -> int:
    kinds = {name: summary_of(DataSource.kind(name)) for name in DataSource.kinds}
    name = chosen_name(arguments, kinds, prog="imaml data", what="data set")
    options = parse(Options, arguments[1:], prog=f"imaml data {name}", default=Options(DataSource.kind(name)()))
    dataset = options.source.load()
    print(summary(dataset))
    if options.picture is not None:
        from imaml_ext.train.reports import draw_samples

        draw_samples(options.picture, dataset)
    return 0
