"""The conformance suite for batched conjugate gradients: python -m benchmarks.conformance

    python -m benchmarks.conformance                                    # every solver that is installed, every case
    python -m benchmarks.conformance --solvers imaml_ext SciPy --cases drift nan_row
    python -m benchmarks.conformance --json benchmarks/results/conformance.json
    python -m benchmarks.conformance.page                               # docs/conformance.md from that file

A solver that is not installed is left out, and named.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import write_result

from .cases import CASES
from .suite import SOLVERS, run
from .system import Cell, Verdict


def plain(cell: Cell) -> dict[str, Any]:
    """A cell as JSON values."""
    residual = cell.residual if cell.residual is not None and math.isfinite(cell.residual) else None
    return {
        "verdict": cell.verdict.name.lower(),
        "products": cell.products,
        "residual": None if residual is None else float(f"{residual:.3g}"),
        "message": cell.message,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conformance", description=__doc__.split("\n")[0])
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS), metavar="NAME", help="all")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help="all")
    parser.add_argument("--seed", type=int, default=0, help="of the random systems")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    missing = {name: why for name in options.solvers if (why := SOLVERS[name].missing())}
    solvers = {name: SOLVERS[name] for name in options.solvers if name not in missing}
    for name, why in missing.items():
        print(f"{name} is left out: {why}", file=sys.stderr)
    width = max(map(len, CASES))
    cells: dict[str, dict[str, Any]] = {}
    for name in options.cases:
        print(name)
        cells[name] = {}
        for solver in solvers.values():
            cell = run(solver, CASES[name], options.seed)
            cells[name][solver.name] = plain(cell)
            print(f"    {solver.name:{width}} {cell.verdict.name.lower():12} {cell.message}")
    if options.json:
        write_result(
            options.json,
            script="conformance",
            program="-m benchmarks.conformance",
            device=torch.device("cpu"),
            seed=options.seed,
            left_out=missing,
            solvers={
                solver.name: {"package": solver.package, "version": solver.version(), "call": solver.call}
                for solver in solvers.values()
            },
            cases={name: CASES[name].asks for name in options.cases},
            cells=cells,
        )
    failures = sum(cell["verdict"] != Verdict.PASS.name.lower() for row in cells.values() for cell in row.values())
    count = sum(map(len, cells.values()))
    print(f"{count - failures} of {count} cells pass")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
