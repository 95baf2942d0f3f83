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
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from imaml_ext.errors import ConfigError, RunError
from imaml_ext.reproduce.cost_cell import CG_STEPS, LAM, SHOTS, WAYS, CostCell, measure
from imaml_ext.reproduce.options import Cost
from imaml_ext.reproduce.results import COLORS, LABELS, output_folder, read_results, write_results
from imaml_ext.training.config import SourceConfig
from imaml_ext.training.environment import environment
from imaml_ext.training.experiment import open_dataset, resolve_device
from imaml_ext.training.progress import ProgressBar, say
from imaml_ext.training.reports import write_figure

_GIB = 2**30
Cells = dict[str, dict[str, Any]]  # "method/steps" -> what was measured, or why nothing was


def run(options: Cost, *, command: str = "") -> None:
    open_dataset(
        SourceConfig(name=options.data, root=options.data_root)
    )  # what is missing is said before anything is measured
    device = resolve_device(options.device)
    path = output_folder(options.output_dir) / "cost.json"
    settings = _settings(options, device)
    cells = _known_cells(path, settings)
    wanted = [(method, steps) for method in options.methods for steps in sorted(set(options.steps))]
    with ProgressBar("cost", total=len(wanted)) as bar:
        for done, (method, steps) in enumerate(wanted):
            cell = CostCell(
                method=method,
                steps=steps,
                data_root=options.data_root,
                **{name: settings[name] for name in _OF_A_CELL},
            )
            bar.update(done, {"cell": cell.name})
            if cell.name in cells and "peak_bytes" in cells[cell.name]:
                continue
            cells[cell.name] = _measured(cell, cells, _limit(options, device))
            _write(path, options, device, command, settings, cells)
        bar.update(len(wanted), {"cell": "all done"})
    _write(path, options, device, command, settings, cells)
    for method in options.methods:
        say(_growth(method, cells))
    say(f"results are in {options.output_dir}")


_OF_A_CELL = ("meta_batch", "queries", "filters", "repeats", "device", "threads", "data")


def _settings(options: Cost, device: torch.device) -> dict[str, Any]:
    """What all cells of a cost.json share, the machine and the versions included."""
    machine = {name: value for name, value in environment(device).items() if name != "commit"}
    return {
        **{name: getattr(options, name) for name in ("meta_batch", "queries", "filters", "repeats", "data")},
        **{"ways": WAYS, "shots": SHOTS, "lam": LAM, "cg_steps": CG_STEPS},
        **{**machine, "device": str(device), "threads": options.threads or torch.get_num_threads()},
    }


def _known_cells(path: Path, settings: Mapping[str, Any]) -> Cells:
    """The cells of an earlier, perhaps interrupted, call.

    Raises:
        RunError: the file is damaged. ConfigError: its cells were measured with other settings, or elsewhere.
    """
    results = read_results(path)
    if results is None:
        return {}
    recorded, cells = results.get("settings"), results.get("cells")
    if not isinstance(recorded, dict) or not isinstance(cells, dict):
        raise RunError(f"{path} holds no results of this experiment: remove it, or give another --output-dir")
    for name in settings:
        if recorded.get(name) != settings[name]:
            raise ConfigError(
                f"{path} was measured with {name} {recorded.get(name)!r}, now {settings[name]!r}: its cells cannot be "
                "compared with new ones; remove it, or give another --output-dir"
            )
    return cells


def _measured(cell: CostCell, cells: Cells, limit: float) -> dict[str, Any]:
    """The cell in a process of its own, or why it was not measured."""
    estimate = _estimate(cell, cells)
    about = {"method": cell.method, "steps": cell.steps}
    if estimate is not None and estimate > limit:
        return {
            **about,
            "estimated_bytes": round(estimate),
            "left_out": f"more than the limit of {limit / _GIB:.1f} GiB",
        }
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


def _estimate(cell: CostCell, cells: Cells) -> float | None:
    """Bytes that a cell will need, on the line through the two cells of the method with the most steps below it."""
    known = sorted(
        (other["steps"], other["peak_bytes"])
        for other in cells.values()
        if other["method"] == cell.method and other["steps"] < cell.steps and "peak_bytes" in other
    )
    if len(known) < 2:
        return None
    (steps_before, before), (steps, last) = known[-2:]
    return last + (last - before) / (steps - steps_before) * (cell.steps - steps)


def _limit(options: Cost, device: torch.device) -> float:
    """Bytes that a cell may need."""
    if options.memory_limit is not None:
        return options.memory_limit * _GIB
    if device.type == "cuda":
        return 0.9 * torch.cuda.mem_get_info(device)[0]
    return 0.9 * _available_bytes()


def _available_bytes() -> float:
    """What the system can still give without swapping; no limit known where there is no /proc."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return float("inf")


def _write(
    path: Path,
    options: Cost,
    device: torch.device,
    command: str,
    settings: Mapping[str, Any],
    cells: Cells,
) -> None:
    write_results(path, options, device, command=command, settings=settings, cells=cells)
    write_figure(_draw(cells, settings), path.with_suffix(".png"))


def _growth(method: str, cells: Cells) -> str:
    """Peak memory at the most steps beside that at the fewest."""
    known = sorted(
        (cell["steps"], cell["peak_bytes"], cell["seconds"])
        for cell in cells.values()
        if cell["method"] == method and "peak_bytes" in cell
    )
    if not known:
        return f"{LABELS[method]}: nothing measured"
    (first, least, _), (last, most, seconds) = known[0], known[-1]
    return (
        f"{LABELS[method]}: {most / 2**20:.0f} MiB at {last} steps, {most / least:.2f} × that at {first}; "
        f"{seconds:.2f} s at {last} steps"
    )


def _draw(cells: Cells, settings: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    where = settings.get("gpu", settings["cpu"])
    figure.suptitle(
        f"One meta-gradient of {settings['meta_batch']} task(s), {WAYS}-way {SHOTS}-shot {settings['data']}, "
        f"Conv4 with {settings['filters']} filters; {where}, {settings['device']}"
    )
    memory, seconds = figure.subplots(1, 2)
    for method in LABELS:
        of_method = sorted((c for c in cells.values() if c["method"] == method), key=lambda c: c["steps"])
        _line(memory, method, [(c["steps"], c["peak_bytes"] / _GIB) for c in of_method if "peak_bytes" in c])
        _line(seconds, method, [(c["steps"], c["seconds"]) for c in of_method if "seconds" in c])
        left_out = [(c["steps"], c["estimated_bytes"] / _GIB) for c in of_method if "estimated_bytes" in c]
        if left_out:
            memory.scatter(*zip(*left_out, strict=True), facecolors="none", edgecolors=COLORS[method])
    memory.set(ylabel="peak memory (GiB); hollow: estimated, not run")
    seconds.set(ylabel="seconds (median)")
    for axis in (memory, seconds):
        axis.set(xlabel="inner steps", xscale="log", yscale="log")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    if memory.get_legend_handles_labels()[0]:
        memory.legend(frameon=False)
    return figure


def _line(axis: Axes, method: str, points: Sequence[tuple[float, float]]) -> None:
    if points:
        axis.plot(*zip(*points, strict=True), color=COLORS[method], marker="o", markersize=3, label=LABELS[method])
