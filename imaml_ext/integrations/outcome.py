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


def report(
    solution: Solution,
    *,
    on_breakdown: Reaction,
    on_unfinished: Reaction,
    what: str,
    unfinished_as: type[Warning] = SolveWarning,
) -> None:
    """Raises `SolveError` or gives a warning for systems that did not converge; waits for the device.

    Args:
        on_breakdown: what is done where the matrix is not what the solver needs, or a number is not finite.
        on_unfinished: what is done where the products are spent, or rounding lets the residual fall no further.
        what: the systems are, for the message.
        unfinished_as: the class of a warning of the second kind.
    """
    if not bool(solution.status.any()):
        return
    broken, unfinished = solution.broke_down | solution.non_finite, solution.unfinished
    cases = (broken, on_breakdown, SolveWarning), (unfinished, on_unfinished, unfinished_as)
    for failed, reaction, category in cases:
        if reaction == "ignore" or not bool(failed.any()):
            continue
        try:
            solution.raise_if_failed(unfinished=failed is unfinished, what=what)
        except SolveError as error:
            if reaction == "raise":
                raise
            warnings.warn(str(error), category, stacklevel=3)
