"""One cell of the cost experiment: time and peak memory of one meta-gradient, in a process of its own."""

from __future__ import annotations

import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from imaml_ext.inner import GradientDescent, NewtonCG
from imaml_ext.losses import TaskLoss
from imaml_ext.meta import FOMAML, IMAML, MAML, MetaAlgorithm
from imaml_ext.models import Conv4
from imaml_ext.reproduction.options import Cost
from imaml_ext.reproduction.results import data_source
from imaml_ext.solvers import CG

WAYS, SHOTS = 20, 5
LAM, LR, CG_STEPS = 2.0, 0.1, 5  # the paper's; time and memory do not depend on them
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes


@dataclass(frozen=True)
class CostCell:
    """Says what is measured; `options` name a device and a number of threads, and are common to all cells."""

    method: str
    steps: int
    options: Cost

    @property
    def name(self) -> str:
        return f"{self.method}/{self.steps}"

    def algorithm(self) -> MetaAlgorithm:
        descent, newton = GradientDescent(steps=self.steps, lr=LR), NewtonCG(steps=self.steps)
        if self.method == "fomaml":
            return FOMAML(inner=descent, lam=LAM)
        if self.method in ("maml", "maml-checkpoint"):
            return MAML(inner=descent, lam=LAM, checkpoint=self.method == "maml-checkpoint")
        solver = CG(max_iterations=CG_STEPS)
        return IMAML(inner=newton if self.method == "imaml-hf" else descent, lam=LAM, linear_solver=solver)


def measure(cell: CostCell) -> dict[str, Any]:
    """Measures the first meta-gradient's peak memory above what θ and the episodes hold, then times `repeats` more.

    Memory on a CPU is the most that torch's allocator has handed out at one time, exact to the byte; beside it stands
    the growth of the resident set, which knows of every other buffer too, the profiler's records among them. On CUDA
    it is `torch.cuda.max_memory_allocated`.
    """
    options, device = cell.options, torch.device(cell.options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    sizes: dict[str, Any] = {"ways": WAYS, "shots": SHOTS, "queries": options.queries, "meta_batch": options.meta_batch}
    sampler = data_source(options).load().sampler("train", **sizes, seed=0, device=device, dtype=torch.float32)
    model = Conv4(WAYS, filters=options.filters)
    # The native engine keeps no graph: MAML on it would be checkpointed already.
    engine = "torch" if cell.method == "maml" else "auto"
    algorithm = cell.algorithm().bound(TaskLoss(model, "cross_entropy", engine=engine))
    theta, episodes = model.init(seed=0, device=device), sampler.sample(0)

    def meta_gradient() -> None:
        algorithm.meta_gradient(theta, episodes)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    memory = _cuda_memory(meta_gradient, device) if device.type == "cuda" else _cpu_memory(meta_gradient)
    seconds = []
    for _ in range(options.repeats):
        began = time.perf_counter()
        meta_gradient()
        seconds.append(time.perf_counter() - began)
    return {**memory, "seconds": statistics.median(seconds), "seconds_each": seconds}


def _cuda_memory(call: Callable[[], None], device: torch.device) -> dict[str, int]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return {"peak_bytes": torch.cuda.max_memory_allocated(device) - before}


def _cpu_memory(call: Callable[[], None]) -> dict[str, int]:
    resident = _resident_bytes()
    # The first call of all: what is kept from one call to the next counts. The profiler's records are resident too.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        call()
    resident = max(0, _MAXRSS_UNIT * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident)
    allocated, peak = 0, 0
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()  # negative where memory is given back
        peak = max(peak, allocated)
    return {"peak_bytes": peak, "resident_bytes": resident}


def _resident_bytes() -> int:
    """Pages of this process in memory now; on a system without /proc, the most there ever were."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return _MAXRSS_UNIT * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages * os.sysconf("SC_PAGE_SIZE")
