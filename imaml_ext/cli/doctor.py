"""`imaml doctor`: what this installation has and can use."""

from __future__ import annotations

from dataclasses import dataclass

from imaml_ext.cli.parser import parse
from imaml_ext.train.ranks import Ranks


@dataclass(frozen=True)
class Options:
    """Show versions, how the extension was built, what it can use, and what to do about whatever is missing."""


def run(arguments: list[str], ranks: Ranks) -> int:
    parse(Options, arguments, prog="imaml doctor")
    from imaml_ext.doctor import doctor

    return doctor()
