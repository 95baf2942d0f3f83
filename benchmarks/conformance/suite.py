"""Every solver in every case."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Generator

from .cases import Case
from .jax_solvers import Jax, Lineax
from .solvers import (
    CuPy,
    Curvlinops,
    Dattri,
    Hypergrad,
    LinearOperator,
    NotOfferedError,
    Ours,
    PyDVL,
    SciPy,
    Solver,
    TorchOpt,
    TorchOptNormal,
)
from .system import Cell, Products, System, Verdict, judge

KINDS = (
    Ours,
    SciPy,
    Jax,
    Lineax,
    LinearOperator,
    Curvlinops,
    TorchOpt,
    TorchOptNormal,
    Hypergrad,
    Dattri,
    PyDVL,
    CuPy,
)
SOLVERS: dict[str, Solver] = {kind.name: kind() for kind in KINDS}


def run(solver: Solver, case: Case, seed: int) -> Cell:
    """The cell of a solver in a case: of its parts, the one that went worst."""
    cells = []
    for part in case.parts(Generator().manual_seed(seed)):
        lacking = sorted(part.needs - solver.offers)
        if lacking and part.optional:
            continue
        if lacking:
            return Cell(Verdict.NOT_OFFERED, message=f"without {', '.join(lacking)}")
        try:
            cells.append(_run_part(solver, part))
        except NotOfferedError as error:
            return Cell(Verdict.NOT_OFFERED, message=str(error))
    return max(cells, key=lambda cell: cell.verdict)


def _run_part(solver: Solver, system: System) -> Cell:
    batches = [system] if system.twin is None else [system, system.twin]
    cells, solutions = [], []
    for batch in batches:
        products, b = Products(batch), batch.b.clone()
        try:
            outcome = solver.solve(batch, products)
        except NotOfferedError:
            raise
        except Exception as error:  # of whatever kind: this is other people's code
            message = f"{type(error).__name__}: {error}".splitlines()[0]
            return Cell(Verdict.RAISES, int(products.count.max()), message=message)
        cells.append(judge(replace(batch, b=b), outcome, products))
        solutions.append(outcome.x[list(system.shared)])
        if not torch.equal(batch.b.nan_to_num(), b.nan_to_num()):
            cells.append(replace(cells[-1], verdict=Verdict.RIGHT_BUT, message="b was overwritten"))
    if not all(torch.equal(x, solutions[0]) for x in solutions):
        message = "the x of a row hangs on the rows beside it"
        cells.append(replace(cells[-1], verdict=Verdict.RIGHT_BUT, message=message))
    return max(cells, key=lambda cell: cell.verdict)
