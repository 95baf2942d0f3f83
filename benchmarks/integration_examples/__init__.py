"""Published examples of other libraries, each run by the library's own solver and by ours: one file per library.

A file NAME.py of this folder is an entry of `benchmarks/integrations.py`, and has

    PACKAGES: tuple[str, ...]       what pip installs, whose versions the result file states
    EXAMPLE: str                    which published example it is, and how it was reduced
    CHANGE: tuple[str, str]         the one line, the library's own and ours
    REASON: str                     what makes the difference in time, in a sentence
    def example(ours: bool) -> Run

`example` computes the same from the same seeds at every call. It imports its library inside.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

C = TypeVar("C", bound=Callable[..., Any])


@dataclass(frozen=True)
class Run:
    """What an example has computed, and what its linear solves took.

    Attributes:
        result: what the two solvers have to agree on, of any shape.
        solve_seconds: CPU time of this process inside the solves, products included.
        products: of the matrix with one vector, all solves together.
    """

    result: Tensor
    solve_seconds: float
    products: int


class Meter:
    """Adds up the CPU time spent inside some functions and counts the calls of others.

    meter = Meter()
    solve = meter.timed(solve)        # all that happens within it is time of the solve
    product = meter.counted(product)  # a call is one product
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.products = 0

    def timed(self, function: C) -> C:
        """`function`, whose CPU time is added to `seconds`; it must not call another function that is timed."""

        def call(*arguments: Any, **options: Any) -> Any:
            begin = time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += time.process_time() - begin

        return call  # type: ignore[return-value]

    def counted(self, function: C, vectors: Callable[..., int] = lambda *arguments: 1) -> C:
        """`function`, whose calls are added to `products`; `vectors` of its arguments is how many a call has."""

        def call(*arguments: Any, **options: Any) -> Any:
            self.products += vectors(*arguments)
            return function(*arguments, **options)

        return call  # type: ignore[return-value]

    def run(self, result: Tensor) -> Run:
        return Run(result.detach(), self.seconds, self.products)
