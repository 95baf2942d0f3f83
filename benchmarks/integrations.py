"""Published examples of other libraries with one line changed: their own solver and ours, in one run.

python benchmarks/integrations.py [NAME ...] [--rounds 5] [--json FILE]

A NAME is a file of benchmarks/integration_examples. The solvers take turns, one thread. The results of the two must
agree within 1e-5, relative to the largest entry. The CPU time is that of the process inside the solves alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's, which reads it when it is imported

import torch
from integration_examples import Run
from measure import MismatchError, write_result

HERE = Path(__file__).resolve().parent
NAMES = sorted(p.stem for p in (HERE / "integration_examples").glob("*.py") if p.stem != "__init__")
TOLERANCE = 1e-5


def entry(name: str) -> ModuleType:
    """The module of an example, whose packages must be there."""
    module = import_module(f"integration_examples.{name}")
    for package in module.PACKAGES:
        try:
            version(package)
        except PackageNotFoundError:
            raise SystemExit(f"{name} needs {package}: pip install 'imaml-ext[integrations]'") from None
    return module


def difference(theirs: Run, ours: Run) -> float:
    """The largest difference of the results, relative to the largest entry of the library's own."""
    a, b = theirs.result.double(), ours.result.double()
    if a.shape != b.shape:
        raise MismatchError(f"the results must have one shape, got {list(a.shape)} and {list(b.shape)}")
    return float((a - b).abs().max() / a.abs().max())


def measured(name: str, rounds: int) -> dict[str, Any]:
    """One entry of the result file; the first round warms up, and is not counted."""
    module = entry(name)
    runs: dict[bool, list[Run]] = {False: [], True: []}
    for number in range(rounds + 1):
        for ours in (False, True) if number % 2 else (True, False):
            runs[ours].append(module.example(ours))
    pairs = list(zip(runs[False], runs[True], strict=True))
    apart = max(difference(*pair) for pair in pairs)
    if not apart <= TOLERANCE:
        raise MismatchError(f"{name}: the results must agree within {TOLERANCE:.0e}, they are apart by {apart:.1e}")
    ratios = [ours.solve_seconds / theirs.solve_seconds for theirs, ours in pairs[1:]]
    return {
        "example": module.EXAMPLE,
        "change": list(module.CHANGE),
        "reason": module.REASON,
        "versions": {package: version(package) for package in module.PACKAGES},
        "difference": apart,
        "library": _figures(runs[False][1:]),
        "ours": _figures(runs[True][1:]),
        "ours_to_library": {
            "median": round(statistics.median(ratios), 4),
            "min": round(min(ratios), 4),
            "max": round(max(ratios), 4),
        },
    }


def _figures(runs: list[Run]) -> dict[str, Any]:
    seconds = [run.solve_seconds for run in runs]
    return {
        "median_s": round(statistics.median(seconds), 6),
        "min_s": round(min(seconds), 6),
        "max_s": round(max(seconds), 6),
        "products": runs[-1].products,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all of them if none is given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="the result file; by default that of the repository, if all are run")
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"NAME must be one of {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    torch.set_num_threads(1)
    results = {}
    for name in options.names or NAMES:
        row = results[name] = measured(name, options.rounds)
        for who in ("library", "ours"):
            print(
                f"{name}, {who}: {row[who]['median_s']:.3f} s of CPU time, {row[who]['products']} products", flush=True
            )
        print(f"  ours ÷ library: {row['ours_to_library']['median']:.2f}; results apart by {row['difference']:.1e}")
    path = options.json or (None if options.names else HERE / "results" / "integrations.json")
    if path:
        write_result(path, script="integrations", device=torch.device("cpu"), rounds=options.rounds, results=results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
