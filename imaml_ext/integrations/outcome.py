"""What becomes of a solve that failed inside another library, which has no place for a status."""

from __future__ import annotations

import warnings
from typing import Literal, get_args

from imaml_ext.checks import check_choice
from imaml_ext.errors import SolveError, SolveWarning
from imaml_ext.solvers import Solution

Reaction = Literal["raise", "warn", "ignore"]


def check_reactions(**reactions: str) -> None:
    """Raises ValueError where an argument is no `Reaction`."""
    for name, value in reactions.items():
        check_choice(name, value, get_args(Reaction))


def report(solution: Solution, *, on_breakdown: Reaction, on_unfinished: Reaction, what: str) -> None:
    """Raises `SolveError` or gives a `SolveWarning` for systems that did not converge; waits for the device.

    Args:
        on_breakdown: what is done where the matrix is not what the solver needs, or a number is not finite.
        on_unfinished: what is done where the products are spent, or rounding lets the residual fall no further.
        what: the systems are, for the message.
    """
    broken, unfinished = solution.broke_down | solution.non_finite, solution.unfinished
    for failed, reaction in ((broken, on_breakdown), (unfinished, on_unfinished)):
        if reaction == "ignore" or not bool(failed.any()):
            continue
        try:
            solution.raise_if_failed(unfinished=failed is unfinished, what=what)
        except SolveError as error:
            if reaction == "raise":
                raise
            warnings.warn(str(error), SolveWarning, stacklevel=3)
