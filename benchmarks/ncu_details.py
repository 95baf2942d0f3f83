"""What Nsight Compute says of a few launches of a gradient, a product with the Hessian, and a step of a solve.

    python benchmarks/ncu_details.py --details ncu.csv            # needs a GPU and ncu
    python benchmarks/ncu_details.py --device cpu --tasks 2       # a rehearsal: the calls alone

Each part is a process of its own under `ncu --set full`, and its pages are appended to the file as soon as it ends. A
gradient and a product are called twice, and the last three launches of the first call are measured with the first three
of the second: the first and second layer, back and forth, which take most of the time. Of a solve of systems of 112,005
unknowns, the callback and the step after it are measured.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from profile_step import trace

import imaml_ext
from imaml_ext import TaskLoss
from imaml_ext.data import load_dataset
from imaml_ext.models import Conv4

METRICS = {  # beside the full set: how many sectors of 32 bytes a request of a warp takes
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio": "sectors/load",
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_st.ratio": "sectors/store",
}
SHOWN = {
    "Duration": "time",
    "Compute (SM) Throughput": "compute",
    "DRAM Throughput": "memory",
    "Issue Slots Busy": "issue",
    "Achieved Occupancy": "occupancy",
    "Registers Per Thread": "registers",
    **METRICS,
}


def parts(tasks: int, device: torch.device) -> dict[str, tuple[Callable[[], object], int, int]]:
    """By name: a call, how many times it is made, and how many launches are measured."""
    sampler = load_dataset("glyphs").sampler(
        "train", ways=5, shots=1, queries=1, meta_batch=tasks, seed=0, device=device
    )
    support = sampler.sample(0).support
    model = Conv4(5)
    loss = TaskLoss(model, "cross_entropy", engine="native")
    phi = model.init(seed=0, device=device).expand(tasks, -1).contiguous()
    p = torch.randn_like(phi)
    operator = loss.linearize(phi, support, "hessian")
    d, product = torch.rand_like(phi) + 1, torch.empty_like(phi)

    def solve() -> object:
        return imaml_ext.cg(lambda p: torch.mul(d, p, out=product), phi, shift=2.0, max_iterations=5, rtol=0.0)

    return {
        "step": (solve, 1, 2),
        "product": (lambda: operator(p), 2, 6),
        "gradient": (lambda: loss.gradient(phi, support), 2, 6),
    }


def first_launch(part: str, call: Callable[[], object], count: int, device: torch.device) -> int:
    """How many launches go before those to measure."""
    launches = [event for event in trace(call, device) if event["cat"] == "kernel"]
    if part == "step":  # the third callback, and the step after it
        callbacks = [place for place, event in enumerate(launches) if "MulFunctor" in event["name"]]
        return callbacks[2] if len(callbacks) > 2 else 0
    return len(launches) - count // 2


def summary(text: str) -> Iterator[str]:
    """A line for each launch, from the details page in CSV."""
    lines = text.splitlines()
    begin = next((place for place, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines[begin:]):
        launch = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"], "grid": row.get("Grid Size") or ""})
        if (word := SHOWN.get(row["Metric Name"])) is not None:
            launch[word] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    for launch in launches.values():
        figures = ", ".join(f"{word} {launch[word]}" for word in SHOWN.values() if word in launch)
        yield f"{launch['kernel'][:60]} {launch['grid']}: {figures}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--details", type=Path, metavar="FILE", help="for the pages, as CSV")
    parser.add_argument("--tasks", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ncu", default=shutil.which("ncu"), metavar="FILE")
    parser.add_argument("--part", help="calls this part between cudaProfilerStart and Stop, and ends: what ncu runs")
    options = parser.parse_args()
    device = torch.device(options.device)
    calls = parts(options.tasks, device)
    if options.part:
        call, times, _ = calls[options.part]
        call()
        torch.cuda.synchronize(device)
        torch.cuda.profiler.start()
        for _ in range(times):
            call()
        torch.cuda.synchronize(device)
        torch.cuda.profiler.stop()
        return 0
    if device.type != "cuda":
        for part, (call, _, _) in calls.items():
            call()
            print(f"{part}: called on {device}; ncu measures launches on a GPU")
        return 0
    if options.ncu is None:
        parser.error("no ncu: it is neither on the PATH nor given by --ncu")
    if options.details:
        options.details.write_text("")
    failed = False
    for part, (call, _, count) in calls.items():
        call()
        skip = first_launch(part, call, count, device)
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            command = [options.ncu, "--clock-control", "none", "--set", "full", "--metrics", ",".join(METRICS)]
            command += ["--profile-from-start", "off", "--launch-skip", str(skip), "--launch-count", str(count)]
            command += ["--csv", "--page", "details", "--log-file", str(log), sys.executable, os.path.abspath(__file__)]
            done = subprocess.run([*command, "--part", part, "--tasks", str(options.tasks)])
            text = log.read_text() if log.exists() else ""
        failed |= done.returncode != 0
        print(f"{part}, {count} launches from number {skip} on: ncu's exit code is {done.returncode}")
        for line in summary(text):
            print(f"  {line}", flush=True)
        if options.details:
            with options.details.open("a") as file:
                file.write(f"# {part}\n{text}\n")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
