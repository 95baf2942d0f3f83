"""Where the time of a meta-step goes: its kernels by name and grid, and how many launches it is.

    python benchmarks/profile_step.py --device cuda --json result.json
    python benchmarks/profile_step.py --tasks 2 --filters 3         # a rehearsal: torch's operators on the CPU

The workload is 5w1s-1q of meta_step.py. On a GPU a step is profiled eager, and replayed from a CUDA graph; `busy` is
the time within kernels, `span` from the beginning of the first to the end of the last. On a CPU the times and counts
of an operator are in those of its callers too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import measure
import peers
import torch
from meta_step import WORKLOADS, Workload, make_problem
from peers import Algorithm
from torch.profiler import ProfilerActivity, profile

OF_A_LAUNCH = {"registers": "registers per thread", "shared": "shared memory", "block": "block"}


def trace(call: Callable[[], object], device: torch.device) -> list[dict[str, Any]]:
    """What one call does, in the events of torch.profiler: kernels, copies and fills, or on a CPU operators."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    for _ in range(2):  # the first time, the profiler itself is set up
        with profile(activities=activities) as profiler:
            call()
            if on_gpu:
                torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if on_gpu else ("cpu_op",)
    return sorted((event for event in events if event.get("cat") in kinds), key=lambda event: event["ts"])


def table(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The events by name and grid, those that take longest first; times in microseconds."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for event in events:
        grid = "×".join(map(str, event["args"].get("grid", [])))
        groups.setdefault((event["name"], grid), []).append(event)
    rows = []
    for (name, grid), members in groups.items():
        times = [event["dur"] for event in members]
        row = {"name": name, "grid": grid, "count": len(members), "total_us": round(sum(times), 2)}
        row |= {"min_us": round(min(times), 2), "max_us": round(max(times), 2)}
        rows.append(row | {word: members[0]["args"].get(key) for word, key in OF_A_LAUNCH.items()})
    rows.sort(key=lambda row: -row["total_us"])
    span = max(event["ts"] + event["dur"] for event in events) - events[0]["ts"]
    busy = sum(row["total_us"] for row in rows)
    return {"launches": len(events), "busy_us": round(busy, 2), "span_us": round(span, 2), "by_kernel": rows}


def show(title: str, result: dict[str, Any]) -> None:
    print(
        f"\n{title}: {result['launches']} launches, {result['busy_us'] / 1e3:.3f} ms busy of a span of "
        f"{result['span_us'] / 1e3:.3f} ms\n{'total us':>10} {'count':>6} {'each us':>9} {'grid':>14}  kernel"
    )
    for row in result["by_kernel"][:40]:
        each = row["total_us"] / row["count"]
        print(f"{row['total_us']:10.1f} {row['count']:6} {each:9.2f} {row['grid']:>14}  {row['name'][:110]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    for field in fields(Workload):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, help="instead of the workload's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    changed = {f.name: getattr(options, f.name) for f in fields(Workload) if getattr(options, f.name) is not None}
    workload = replace(WORKLOADS["5w1s-1q"], **changed)
    device = torch.device(options.device)
    measure.full_precision()
    problem = make_problem(
        workload, Algorithm("after", workload.inner_steps, workload.cg_steps), data="glyphs", device=device
    )
    ways = {"eager": peers.imaml_ext}
    if device.type == "cuda":
        ways["replayed"] = peers.imaml_ext_replayed
    results = {}
    for name, make in ways.items():
        step = make(problem).step
        step()
        events = trace(step, device)
        if not events:
            raise SystemExit(f"the profiler saw nothing of the {name} step")
        results[name] = table(events)
        show(f"{name} meta-step, {workload.tasks} tasks", results[name])
    if options.json:
        measure.write_result(
            options.json, script="profile_step", device=device, workload=vars(workload), results=results
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
