"""MINRES alone: the native loop against the same algorithm in torch operations, alternating in one process.

    python benchmarks/minres.py                      # 32 systems of 112,005 unknowns; 5 products, float32
    python benchmarks/minres.py --device cuda --json result.json

The operator is diagonal, indefinite, and writes into a buffer of its own; its time alone is printed too. Solutions are
compared before anything is timed, and one that is off is not timed.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from measure import alternate, judge, ratio, summary, write_result
from torch import Tensor

from imaml_ext.solvers import minres

sys.path.append(str(Path(__file__).parents[1] / "python_tests"))
import reference_minres  # the tests' oracle

OURS = "imaml_ext.solvers.minres"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--cols", type=int, default=112_005)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(0)
    shape = (options.rows, options.cols)
    d = (0.1 + 3 * torch.rand(shape, dtype=torch.float64)) * torch.randn(shape, dtype=torch.float64).sign()
    d, b = d.to(device, dtype), torch.randn(shape, dtype=torch.float64).to(device, dtype)
    buffer = torch.empty_like(b)

    def hvp(p: Tensor) -> Tensor:
        return torch.mul(d, p, out=buffer)

    limits = {"max_iterations": options.iterations, "rtol": 0.0}
    solvers = {
        OURS: lambda: minres(hvp, b, **limits).x,
        "in torch operations": lambda: reference_minres.minres(hvp, b, **limits).x,
    }
    exact = reference_minres.minres(lambda p: d.double() * p, b.double(), **limits).x

    def distance(name: str) -> float:
        return float(((solvers[name]().double() - exact).norm(dim=1) / exact.norm(dim=1)).max())

    errors, wrong = judge({name: partial(distance, name) for name in solvers}, 1e-3, ours=OURS)
    calls = {name: solve for name, solve in solvers.items() if name not in wrong}
    calls["operator alone"] = lambda: [hvp(b) for _ in range(options.iterations)]
    times = alternate(calls, rounds=options.rounds, device=device)
    print(f"{options.rows} systems of {options.cols:,} unknowns, {options.iterations} products, {dtype}, {device}")
    print(f"{'':28} {'median ms':>10} {'min':>8} {'max':>8}  {'÷ ours':>7}")
    results = {}
    for name, values in times.items():
        row = results[name] = {**summary(values), "ratio_to_ours": ratio(times, name, OURS)}
        print(
            f"{name:28} {row['median_ms']:10.3f} {row['min_ms']:8.3f} {row['max_ms']:8.3f}  {row['ratio_to_ours']:7.2f}"
        )
    if options.json:
        write_result(
            options.json,
            script="minres",
            device=device,
            packages=[],
            systems={"rows": options.rows, "cols": options.cols, "iterations": options.iterations},
            dtype=options.dtype,
            wrong=wrong,
            errors=errors,
            results=results,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
