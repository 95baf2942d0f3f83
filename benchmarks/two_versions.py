"""The meta-step of this version beside that of another checkout, in processes that take turns.

    python benchmarks/two_versions.py ../before 5w1s-1q 5w1s-1task --json result.json

Each visit runs `benchmarks/meta_step.py` of both checkouts, one after the other, the first of them in turn. A time is
the shortest of the rounds of a visit, which a disturbed machine changes least. A ratio is the median over the visits of
this version's time over the other's in the same visit. The extension of the other checkout must be built in place:
`python setup.py build_ext --inplace`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure
import torch
from meta_step import OURS, WORKLOADS

HERE = Path(__file__).resolve().parents[1]


def visit(checkout: Path, workloads: list[str], rounds: int) -> dict[str, Any]:
    """Returns the result file of the checkout's own meta_step.py."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "benchmarks/meta_step.py", *workloads, "--only", OURS, "--rounds", str(rounds)]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        run = subprocess.run([*command, "--json", str(file)], cwd=checkout, env=environment, capture_output=True)
        if run.returncode:
            raise SystemExit(f"{checkout}: meta_step.py exited with {run.returncode}\n{run.stderr.decode()}")
        return json.loads(file.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog=f"workloads: {', '.join(WORKLOADS)}", allow_abbrev=False
    )
    parser.add_argument("other", type=Path, help="a checkout of the version to compare with")
    parser.add_argument("workloads", nargs="*", default=["5w1s-1q", "5w1s-1task"], metavar="WORKLOAD")
    parser.add_argument("--visits", type=int, default=8, help="times that each version is measured")
    parser.add_argument("--rounds", type=int, default=15, help="meta-steps per visit")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    checkouts = {"this": HERE, "other": options.other.resolve()}
    if not (checkouts["other"] / "benchmarks" / "meta_step.py").is_file():
        parser.error(f"other must be a checkout with benchmarks/meta_step.py; got {options.other}")

    times: dict[str, dict[str, list[float]]] = {name: {"this": [], "other": []} for name in options.workloads}
    commits = {}
    for turn in range(options.visits):
        for version in ("this", "other") if turn % 2 else ("other", "this"):
            found = visit(checkouts[version], options.workloads, options.rounds)
            commits[version] = found["stamp"]["commit"]
            for run in found["runs"]:
                times[run["name"]][version].append(run["results"][OURS]["min_ms"])
    print(f"{'':12} {'other ms':>10} {'this ms':>10} {'this ÷ other':>13} {'min':>6} {'max':>6}")
    results = {}
    for name, by_version in times.items():
        ratios = [a / b for a, b in zip(by_version["this"], by_version["other"], strict=True)]
        results[name] = {version: measure.summary(values) for version, values in by_version.items()}
        results[name]["ratio"] = {
            key: round(f(ratios), 4) for key, f in (("median", statistics.median), ("min", min), ("max", max))
        }
        other, this = (results[name][version]["median_ms"] for version in ("other", "this"))
        ratio = results[name]["ratio"]
        print(f"{name:12} {other:10.1f} {this:10.1f} {ratio['median']:13.3f} {ratio['min']:6.3f} {ratio['max']:6.3f}")
    if options.json:
        device = torch.device("cpu")
        measure.write_result(options.json, script="two_versions", device=device, commits=commits, results=results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
