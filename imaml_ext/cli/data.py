"""`imaml data`: a data set is rendered, downloaded or packed once, and described; `prune` clears the cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from imaml_ext.cli import chosen_name
from imaml_ext.cli.parser import parse, summary_of
from imaml_ext.data import DataSource, summary
from imaml_ext.data.prune import prune_cache
from imaml_ext.data.splits import write_split_file
from imaml_ext.train.ranks import Ranks


@dataclass(frozen=True)
class Options:
    """Prepare a data set (render, download or pack it, once) and describe it."""

    source: Annotated[DataSource, tyro.conf.arg(name="")]

    picture: Path | None = None  # Write a picture with samples of each split (PNG).
    # Write which class is in which split (CSV), a file for --data.splits of `folder`.
    write_splits: Path | None = None


@dataclass(frozen=True)
class PruneOptions:
    """Remove from the cache what nothing reads any more."""

    cache_dir: Path | None = None  # The cache; unset: the user's cache folder.
    dry_run: bool = False  # Show what would be removed, and remove nothing.


def run(arguments: list[str], ranks: Ranks) -> int:
    if arguments[:1] == ["prune"]:
        return _prune(parse(PruneOptions, arguments[1:], prog="imaml data prune"))
    kinds = {name: summary_of(DataSource.kind(name)) for name in DataSource.kinds}
    kinds["prune"] = summary_of(PruneOptions)
    name = chosen_name(arguments, kinds, prog="imaml data", what="data set")
    options = parse(Options, arguments[1:], prog=f"imaml data {name}", default=Options(DataSource.kind(name)()))
    dataset = options.source.load()
    print(summary(dataset))
    if options.write_splits is not None:
        write_split_file(options.write_splits, dataset)
    if options.picture is not None:
        from imaml_ext.train.reports import draw_samples

        draw_samples(options.picture, dataset)
    return 0


def _prune(options: PruneOptions) -> int:
    removed = prune_cache(options.cache_dir, dry_run=options.dry_run)
    for path, size in removed.items():
        print(f"{size / 1e6:10,.1f} MB  {path}")
    done = "to be freed" if options.dry_run else "freed"
    print(f"{sum(removed.values()) / 1e6:10,.1f} MB {done}, in {len(removed)} places of the cache")
    return 0
