"""`imaml reproduce`: the experiments of the paper."""

from __future__ import annotations

import shlex

from imaml_ext.cli import chosen_name
from imaml_ext.cli.parser import parse, summary_of
from imaml_ext.reproduction import EXPERIMENTS
from imaml_ext.train.ranks import Ranks


def run(arguments: list[str], ranks: Ranks) -> int:
    summaries = {name: summary_of(kind) for name, kind in EXPERIMENTS.items()}
    name = chosen_name(arguments, summaries, prog="imaml reproduce", what="experiment")
    options = parse(EXPERIMENTS[name], arguments[1:], prog=f"imaml reproduce {name}")
    from imaml_ext.reproduction import reproduce

    reproduce(options, command=shlex.join(["imaml", "reproduce", *arguments]))
    return 0
