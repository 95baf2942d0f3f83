"""The paper's cost experiment: time and peak memory of one meta-gradient against the number of inner steps.

20-way 5-shot, Conv4. Each cell is measured in a fresh process, so that none inherits another's memory, and is kept in
cost.json as soon as it is known. Per method the cells come in the order of their steps; memory being at most linear in
the steps, a cell that would not fit is known by the two before it, and left out with its estimate.

Source: Rajeswaran et al., arXiv 1909.04630, section 4 ("computation and memory").
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, profile

from imaml_ext.errors import ConfigError, RunError
from imaml_ext.inner import GradientDescent, NewtonCG
from imaml_ext.losses import TaskLoss
from imaml_ext.meta import FOMAML, IMAML, MAML, MetaAlgorithm
from imaml_ext.models import Conv4
from imaml_ext.progress import ProgressBar, say
from imaml_ext.reproduction.figures import LABELS, STYLES, finish, panels
from imaml_ext.reproduction.options import Cost
from imaml_ext.reproduction.results import data_source, output_folder, read_json, write_results
from imaml_ext.solvers import CG
from imaml_ext.train.environment import environment
from imaml_ext.train.experiment import resolve_device
from imaml_ext.train.reports import write_figure

WAYS, SHOTS = 20, 5
LAM, LR, CG_STEPS = 2.0, 0.1, 5  # the paper's; time and memory do not depend on them
_GIB = 2**30
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes
Measured = dict[str, dict[str, Any]]  # "method/steps" -> what was measured, or why nothing was


def run(options: Cost, *, command: str = "") -> None:
    data_source(options).load()  # what is missing is said before anything is measured
    device = resolve_device(options.device)
    path, settings = output_folder(options) / "cost.json", _settings(options, device)
    resolved = replace(options, device=settings["device"], threads=settings["threads"])
    cells = _known_cells(path, settings)
    wanted = [CostCell(method, steps, resolved) for method in options.methods for steps in sorted(set(options.steps))]

    def write() -> None:
        write_results(options, device, command=command, settings=settings, cells=cells)
        write_figure(_draw(cells, settings), path.with_suffix(".png"))

    with ProgressBar("cost", total=len(wanted)) as bar:
        for done, cell in enumerate(wanted):
            bar.update(done, {"cell": cell.name})
            if "peak_bytes" not in cells.get(cell.name, {}):
                cells[cell.name] = _measured(cell, cells, _limit(options, device))
                write()
        bar.update(len(wanted), {"cell": "all done"})
    write()
    for method in options.methods:
        say(_growth(method, cells))
    say(f"results are in {options.folder}")


def _settings(options: Cost, device: torch.device) -> dict[str, Any]:
    """What all cells of a cost.json share, the machine and the versions included."""
    machine = {name: value for name, value in environment(device).items() if name != "commit"}
    given = {name: getattr(options, name) for name in ("meta_batch", "queries", "filters", "repeats", "data")}
    task = {"ways": WAYS, "shots": SHOTS, "lam": LAM, "cg_steps": CG_STEPS}
    threads = options.threads or torch.get_num_threads()
    return given | task | machine | {"device": str(device), "threads": threads}


def _known_cells(path: Path, settings: Mapping[str, Any]) -> Measured:
    """The cells of an earlier, perhaps interrupted, call, which were measured with the same settings."""
    results = read_json(path) or {"settings": settings, "cells": {}}
    recorded, cells = results.get("settings"), results.get("cells")
    if not isinstance(recorded, dict) or not isinstance(cells, dict):
        raise RunError(f"{path} holds no results of this experiment: remove it, or give another --output-dir")
    for name in (name for name in settings if recorded.get(name) != settings[name]):
        raise ConfigError(
            f"{path} was measured with {name} {recorded.get(name)!r}, now {settings[name]!r}: its cells cannot be "
            "compared with new ones; remove it, or give another --output-dir"
        )
    return cells


def _measured(cell: CostCell, cells: Measured, limit: float) -> dict[str, Any]:
    """The cell in a process of its own, or why it was not measured."""
    about, estimate = {"method": cell.method, "steps": cell.steps}, _estimate(cell, cells)
    if estimate is not None and estimate > limit:
        about["left_out"] = f"more than the limit of {limit / _GIB:.1f} GiB"
        return {**about, "estimated_bytes": round(estimate)}
    return {**about, **_in_a_process(cell)}


def _in_a_process(cell: CostCell) -> dict[str, Any]:
    """`measure(cell)` in a fresh process, or why there was not memory enough."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_send_measured, args=(cell, sender))
    process.start()
    sender.close()
    try:
        measured: dict[str, Any] = receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGKILL:
            return {"left_out": "its process was killed, as a system does that runs out of memory"}
        raise RunError(f"measuring {cell.name} failed with exit code {process.exitcode}; it has said why") from None
    finally:
        process.kill()
        process.join()
    return measured


def _send_measured(cell: CostCell, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends this process
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says when it starts and stops
    try:
        sender.send(measure(cell))
    except RuntimeError as error:  # torch.OutOfMemoryError of a GPU is one too
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        sender.send({"left_out": "the device ran out of memory"})


def _points(method: str, cells: Measured, quantity: str = "peak_bytes") -> list[tuple[int, float]]:
    """Steps and what was measured of a method's cells, in the order of their steps."""
    of_method = [cell for cell in cells.values() if cell["method"] == method and quantity in cell]
    return sorted((cell["steps"], cell[quantity]) for cell in of_method)


def _estimate(cell: CostCell, cells: Measured) -> float | None:
    """Bytes that a cell will need, on the line through the two cells of the method with the most steps below it."""
    known = [point for point in _points(cell.method, cells) if point[0] < cell.steps]
    if len(known) < 2:
        return None
    (steps_before, before), (steps, last) = known[-2:]
    return last + (last - before) / (steps - steps_before) * (cell.steps - steps)


def _limit(options: Cost, device: torch.device) -> float:
    """Bytes that a cell may need; without a limit given, nine tenths of what the device can give without swapping."""
    if options.memory_limit is not None:
        return options.memory_limit * _GIB
    if device.type == "cuda":
        return 0.9 * torch.cuda.mem_get_info(device)[0]
    path = Path("/proc/meminfo")  # no limit is known where there is none
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return 0.9 * next((1024 * int(words[1]) for words in lines if words[0] == "MemAvailable:"), float("inf"))


def _growth(method: str, cells: Measured) -> str:
    """Peak memory at the most steps beside that at the fewest."""
    known, seconds = _points(method, cells), _points(method, cells, "seconds")
    if not known:
        return f"{LABELS[method]}: nothing measured"
    (first, least), (last, most) = known[0], known[-1]
    growth = f"{most / 2**20:.0f} MiB at {last} steps, {most / least:.2f} × that at {first}"
    return f"{LABELS[method]}: {growth}; {seconds[-1][1]:.2f} s at {last} steps"


def _draw(cells: Measured, settings: Mapping[str, Any]) -> Figure:
    title = "One meta-gradient of {meta_batch} task(s), {ways}-way {shots}-shot {data}, Conv4 with {filters} filters"
    machine = f"{settings.get('gpu', settings['cpu'])}, {settings['device']}"
    figure, [(memory, seconds)] = panels(f"{title.format(**settings)}; {machine}", 1, 2, size=(11, 4.6))
    for method in LABELS:
        for axis, quantity, unit in ((memory, "peak_bytes", _GIB), (seconds, "seconds", 1)):
            points = [(steps, value / unit) for steps, value in _points(method, cells, quantity)]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, **STYLES[method])
        for steps, estimate in _points(method, cells, "estimated_bytes"):
            memory.scatter(steps, estimate / _GIB, facecolors="none", edgecolors=STYLES[method]["color"])
    for axis in (memory, seconds):
        axis.set_yscale("log")
        axis.set_xscale("log", base=2)
    finish(memory, xlabel="inner steps", ylabel="peak memory (GiB); hollow: estimated, not run")
    finish(seconds, legend=False, xlabel="inner steps", ylabel="seconds (median)")
    return figure


# --- one cell, in a process of its own ------------------------------------------------------------------------------


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

    Memory on CUDA is `torch.cuda.max_memory_allocated`; on a CPU, the most that torch's allocator has handed out at one
    time, exact to the byte, and the growth of the resident set, which knows of all buffers and the profiler's records.
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
