"""`imaml doctor`: what this installation has and can use."""

from __future__ import annotations

from imaml_ext.cli.parser import parse
from imaml_ext.doctor import doctor
from imaml_ext.train.ranks import Ranks


def run(arguments: list[str], ranks: Ranks) -> int:
    return parse(doctor, arguments, prog="imaml doctor")
