"""docs/conformance.md from the result file.

python -m benchmarks.conformance.page            # writes docs/conformance.md
python -m benchmarks.conformance.page --check    # exit code 1 where it is not what the result file says
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "conformance.json"
PAGE = ROOT / "docs" / "conformance.md"

INTRODUCTION = """\
# Conformance of batched conjugate gradients

This page says what solvers by conjugate gradients do with systems that are easy to get wrong. It is for those who
write such a solver, or choose one. Three commands make it again:

    pip install --no-build-isolation -e '.[conformance]'
    python -m benchmarks.conformance --json benchmarks/results/conformance.json
    python -m benchmarks.conformance.page

`python -m benchmarks.conformance --help` says how to choose solvers, cases and the seed. A solver that is not installed
is left out, and named. Two are not in the extra. hypertorch is not on PyPI, where another package has its name. pyDVL
asks for an older NumPy than JAX does, and works with the newer one.

    pip install git+https://github.com/prolearner/hypertorch@6241dfafcf37ddaf14e152ba5e5a3aa7165396d3
    pip install --no-deps pyDVL==0.10.0 && pip install distributed zarr

## What is judged

- Every solver gets the same function for the products. It computes in float64 and rounds to the type of b, so that the
  solver is judged and not the product. It counts the products of every row. dattri takes no products: it is given
  ½ xᵀA x, also in float64, and its count follows from its source.
- Residuals ‖b − A x‖ / ‖b‖ are computed afterwards in float64, for any magnitude. What rounding alone can add is
  allowed: 4 u, and 4 √N u₆₄ ‖A‖ ‖x‖ / ‖b‖.
- A row is right where its residual is at most ten times the tolerance. In the cases that say "within its tolerance",
  it must be within the tolerance itself. The tolerance is 1e-8, unless the case's code says otherwise.
- A failure is reported where a status, an `info` or a warning says so, or where x is not finite. A warning for the
  whole call counts for all of its rows. Exceptions count for the rows of their call.
- In every case, b must be as it was.

| verdict | what it means |
|---|---|
| pass | the case's criterion is met |
| right, but | every x is right, and the case asks for more |
| reported | a row that has a solution was not solved, and the outputs say so |
| raises | an exception ended the call for a row that has a solution |
| **silent** | a wrong x that nothing in the outputs tells from a right one |
| – | the interface has no such option |

Every solver is called by its own interface, with the tolerance that is asked and enough iterations. Where its default
for another option keeps it from the tolerance, the option is set:

"""

CAUSES = """\
## Causes

What the sources of these versions say:

- linear_operator stops where the mean residual of the batch is within the tolerance, whose default is 1. Its other
  defaults, 1e-10 for `eps` and `stop_updating_after`, end a solve at residuals of about 1e-5. curvlinops calls it.
- SciPy, JAX, TorchOpt and linear_operator trust the residual by recurrence, which rounding drives away from b − A x.
  lineax computes the residual anew in every tenth step.
- JAX, lineax and TorchOpt begin with x = 0 and stop where a comparison with NaN is false, so that x = 0 comes back.
- Squares of norms underflow where b is tiny. The solvers then take b for 0, or end with a residual of 0.
- TorchOpt's normal equations have the square of the condition number, and the tolerance is that of their residual.
- hypertorch returns the iterate before the one whose residual it has measured.
- dattri documents `tol` and does not use it: all `max_iter` steps are made, and end in 0/0 after convergence.
- pyDVL compares ‖r‖ with rtol² |b₀|, b₀ being the first entry of b, and so makes more steps than the tolerance needs.
"""

WORDS = {
    "pass": "pass",
    "right_but": "right, but",
    "reported": "reported",
    "raises": "raises",
    "silent": "**silent**",
    "not_offered": "–",
}


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def render(result: dict[str, Any]) -> str:
    """The document."""
    stamp, cells, solvers = result["stamp"], result["cells"], result["solvers"]
    calls = [[name, str(solver["version"]), solver["call"]] for name, solver in solvers.items()]
    verdicts = [[f"`{case}`", *(WORDS[row[name]["verdict"]] for name in solvers)] for case, row in cells.items()]
    passed = [sum(row[name]["verdict"] == "pass" for row in cells.values()) for name in solvers]
    silent = [sum(row[name]["verdict"] == "silent" for row in cells.values()) for name in solvers]
    versions = f"torch {stamp['torch']}, NumPy {stamp['numpy']}, Python {stamp['python']}"
    parts = [
        INTRODUCTION + _table(["solver", "version", "called as; what it reports"], calls),
        *(f"Left out of this run: {name} ({why}).\n" for name, why in result["left_out"].items()),
        "## Results\n",
        f"`{result['command']}`\n",
        f"Seed {result['seed']}, on the CPU; {versions}.\n",
        _table(
            ["case", *solvers],
            [
                *verdicts,
                [f"passed, of {len(cells)}", *map(str, passed)],
                ["silently wrong", *map(str, silent)],
            ],
        ),
        "## The cases\n",
        _table(["case", "criterion"], [[f"`{name}`", asks] for name, asks in result["cases"].items()]),
        "## Cost\n",
        "Products with A per row in the case `products`, the most of its rows:\n",
        _table(["solver", "products"], [[name, str(cells["products"][name]["products"])] for name in solvers]),
        CAUSES,
        "## What was not a pass\n",
        "The first row of the worst verdict of a cell is named.\n",
        *(_failures(name, cells) for name in solvers),
    ]
    return "\n".join(parts)


def _failures(name: str, cells: dict[str, Any]) -> str:
    failed = {case: row[name] for case, row in cells.items() if row[name]["verdict"] != "pass"}
    if not failed:
        return f"**{name}**: nothing.\n"
    lines = [f"- `{case}`: {WORDS[cell['verdict']]}: {cell['message']}" for case, cell in failed.items()]
    return "\n".join([f"**{name}**:\n", *lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    document = render(json.loads(RESULT.read_text()))
    if parser.parse_args().check:
        return int(not PAGE.exists() or PAGE.read_text() != document)
    PAGE.write_text(document)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
