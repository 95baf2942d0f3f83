"""Checks of arguments: each error names the argument, what was expected, and what came."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from numbers import Real
from typing import Any


def check_int(name: str, value: object, *, minimum: int) -> int:
    """`value` as an int of at least `minimum`; integers of NumPy and torch count as integers.

    Raises:
        TypeError, ValueError: it is no integer, or is smaller.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


def check_number(name: str, value: Any, *, above: float | None = None, at_least: float | None = None) -> float:
    """`value` as a finite float, above or at least a bound; numbers of NumPy count as numbers.

    Raises:
        TypeError, ValueError: it is no number, not finite, or outside the bound.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value}")
    if above is not None and not number > above:
        raise ValueError(f"{name} must be above {above:g}, got {value}")
    if at_least is not None and not number >= at_least:
        raise ValueError(f"{name} must be at least {at_least:g}, got {value}")
    return number


def check_choice(name: str, value: str, choices: Iterable[str]) -> str:
    """`value`, which must be one of `choices`; a ValueError lists them otherwise."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value
