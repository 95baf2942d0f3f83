"""The paper's cost experiment: time and peak memory of one meta-gradient against the number of inner steps.

20-way 5-shot, Conv4. Each cell is measured in a fresh process, so that none inherits another's memory, and is kept in
cost.json as soon as it is known. Per method the cells come in the order of their steps; memory being at most linear in
the steps, a cell that would not fit is known by the two before it, and left out with its estimate.

Source: Rajeswaran et al., arXiv 1909.04630, section 4 ("computation and memory").
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from imaml_ext.errors import ConfigError, RunError
from imaml_ext.reproduction.cost_cell import CG_STEPS, LAM, SHOTS, WAYS, CostCell, measure
from imaml_ext.reproduction.figures import COLORS, LABELS, finish, panels, style
from imaml_ext.reproduction.options import Cost
from imaml_ext.reproduction.results import data_source, output_folder, read_json, write_results
from imaml_ext.train.environment import environment
from imaml_ext.train.experiment import resolve_device
from imaml_ext.train.progress import ProgressBar, say
from imaml_ext.train.reports import write_figure

_GIB = 2**30
Measured = dict[str, dict[str, Any]]  # "method/steps" -> what was measured, or why nothing was


def run(options: Cost, *, command: str = "") -> None:
    data_source(options).load()  # what is missing is said before anything is measured
    device = resolve_device(options.device)
    path = output_folder(options) / "cost.json"
    settings = _settings(options, device)
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
    return {**given, **task, **machine, "device": str(device), "threads": threads}


def _known_cells(path: Path, settings: Mapping[str, Any]) -> Measured:
    """The cells of an earlier, perhaps interrupted, call.

    Raises:
        RunError: the file is damaged. ConfigError: its cells were measured with other settings, or elsewhere.
    """
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
        reason = f"more than the limit of {limit / _GIB:.1f} GiB"
        return {**about, "estimated_bytes": round(estimate), "left_out": reason}
    return {**about, **_in_a_process(cell)}


def _in_a_process(cell: CostCell) -> dict[str, Any]:
    """`measure(cell)` in a fresh process, or why it could not be.

    Raises:
        RunError: it failed for another reason than memory.
    """
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
    """Bytes that a cell may need."""
    if options.memory_limit is not None:
        return options.memory_limit * _GIB
    return 0.9 * (torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _available_bytes())


def _available_bytes() -> float:
    """What the system can still give without swapping; no limit known where there is no /proc."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return float("inf")


def _growth(method: str, cells: Measured) -> str:
    """Peak memory at the most steps beside that at the fewest."""
    known = _points(method, cells)
    if not known:
        return f"{LABELS[method]}: nothing measured"
    (first, least), (last, most) = known[0], known[-1]
    seconds = cells[f"{method}/{last}"]["seconds"]
    growth = f"{most / 2**20:.0f} MiB at {last} steps, {most / least:.2f} × that at {first}"
    return f"{LABELS[method]}: {growth}; {seconds:.2f} s at {last} steps"


def _draw(cells: Measured, settings: Mapping[str, Any]) -> Figure:
    tasks = f"One meta-gradient of {settings['meta_batch']} task(s), {WAYS}-way {SHOTS}-shot {settings['data']}"
    network = f"Conv4 with {settings['filters']} filters"
    machine = f"{settings.get('gpu', settings['cpu'])}, {settings['device']}"
    figure, axes = panels(f"{tasks}, {network}; {machine}", 1, 2, size=(11, 4.6))
    memory, seconds = axes[0]
    for method in LABELS:
        for axis, quantity, unit in ((memory, "peak_bytes", _GIB), (seconds, "seconds", 1)):
            points = [(steps, value / unit) for steps, value in _points(method, cells, quantity)]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, **style(method))
        for steps, estimate in _points(method, cells, "estimated_bytes"):
            memory.scatter(steps, estimate / _GIB, facecolors="none", edgecolors=COLORS[method])
    for axis in axes[0]:
        axis.set_yscale("log")
        axis.set_xscale("log", base=2)
    finish(memory, xlabel="inner steps", ylabel="peak memory (GiB); hollow: estimated, not run")
    finish(seconds, legend=False, xlabel="inner steps", ylabel="seconds (median)")
    return figure
