"""What the benchmarks share: alternating timings, the machine's own rates, comparison of results, the result file."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imaml_ext.train.environment import environment

Times = dict[str, list[float]]  # milliseconds of every round, by name


class MismatchError(AssertionError):
    """Implementations that are to compute the same do not."""


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds; on a GPU between two events, the first of which is recorded when nothing is under way."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def alternate(calls: Mapping[str, Callable[[], object]], *, rounds: int, device: torch.device) -> Times:
    """Every call once a round, so that what disturbs the machine disturbs all; one round before, to warm up."""
    for call in calls.values():
        timed(call, device)
    times: Times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timed(call, device))
    return times


def ratio(times: Times, name: str, to: str) -> float:
    """How many times as long as `to` the call `name` takes: the median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(times[name], times[to], strict=True))


def summary(values: list[float]) -> dict[str, Any]:
    return {
        "median_ms": round(statistics.median(values), 4),
        "min_ms": round(min(values), 4),
        "max_ms": round(max(values), 4),
        "rounds": len(values),
    }


class Machine:
    """What the machine itself reaches, as calls that take their turn among the others.

    sgemm: a square float32 `torch.mm`. copy: `Tensor.copy_` of a vector far larger than any cache, read and written.
    """

    SGEMM, COPY = "torch.mm", "copy"

    def __init__(self, device: torch.device, *, size: int | None = None) -> None:
        size = size or (8192 if device.type == "cuda" else 2048)
        self.a, self.b, self.c = (torch.rand(size, size, device=device) for _ in range(3))
        self.source = torch.rand(16 * size * size, device=device)
        self.target = torch.empty_like(self.source)
        self.flop = 2 * size**3
        self.bytes = 2 * self.source.numel() * self.source.element_size()

    def calls(self) -> dict[str, Callable[[], object]]:
        return {
            self.SGEMM: lambda: torch.mm(self.a, self.b, out=self.c),
            self.COPY: lambda: self.target.copy_(self.source),
        }

    def rates(self, times: Times) -> dict[str, float]:
        """Medians of the run."""
        return {
            "sgemm_gflops": round(self.flop / statistics.median(times[self.SGEMM]) / 1e6, 1),
            "copy_gbytes": round(self.bytes / statistics.median(times[self.COPY]) / 1e6, 1),
        }

    def share_of_sgemm(self, times: Times, name: str, flop: int) -> float:
        """The rate at which `name` does its `flop`, as a fraction of the rate of sgemm in the same round."""
        return statistics.median(
            flop / own / (self.flop / mm) for own, mm in zip(times[name], times[self.SGEMM], strict=True)
        )


def distances(results: Mapping[str, Tensor], truth: Tensor) -> dict[str, float]:
    """‖result − truth‖ / ‖truth‖ of every result, in float64."""
    truth = truth.double()
    return {name: float((result.double() - truth).norm() / truth.norm()) for name, result in results.items()}


def check_equal(apart: Mapping[str, float], tolerance: float, what: str) -> None:
    """Raises MismatchError where a distance is above the tolerance, or not a number."""
    wrong = [f"{name} by {distance:.1e}" for name, distance in apart.items() if not distance <= tolerance]
    if wrong:
        raise MismatchError(f"{what} must agree within {tolerance:.0e}; off are {', '.join(wrong)}")


def judge(
    found: Mapping[str, Callable[[], float]], tolerance: float, *, ours: str
) -> tuple[dict[str, float], dict[str, str]]:
    """How far each implementation is from the truth; and of those to leave out, what is wrong.

    Args:
        found: calls that return the distance.
        ours: this one, with which all are compared, has to be right.

    Raises MismatchError where `ours` is further than the tolerance, and whatever else it raises.
    """
    apart: dict[str, float] = {}
    wrong: dict[str, str] = {}
    for name, distance in found.items():
        try:
            apart[name] = distance()
        except Exception as error:  # of whatever kind: the others are other people's code
            if name == ours:
                raise
            wrong[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if not apart[name] <= tolerance:
            wrong[name] = f"off by {apart[name]:.2g}, more than {tolerance:.0e}"
    if ours in wrong:
        raise MismatchError(f"{ours} is {wrong[ours]}")
    for name, what in wrong.items():
        print(f"{name} is left out of the timing: {what}", file=sys.stderr)
    return apart, wrong


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that PyTorch had allocated at most during the call, beyond what was there before; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def full_precision() -> None:
    """float32 means float32, on GPUs too: no TF32 in matrix products and convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def write_result(
    path: Path, *, script: str, device: torch.device, packages: Iterable[str] = (), program: str = "", **body: Any
) -> None:
    """The result file: command, stamp with the versions of `packages` (None where not installed), then `body`.

    Args:
        program: what follows `python` in the command, unless that is the script's file.
    """
    stamp: dict[str, Any] = environment(device)
    for package in packages:
        try:
            stamp[package] = version(package)
        except PackageNotFoundError:
            stamp[package] = None
    arguments = [Path(argument).name if Path(argument).is_dir() else argument for argument in sys.argv[1:]]
    arguments = [argument.removeprefix(f"{Path(__file__).parents[1]}/") for argument in arguments]
    command = shlex.join(["python", *(program or f"benchmarks/{script}.py").split(), *arguments])
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"benchmark": script, "command": command, "stamp": stamp, **body}, indent=2, ensure_ascii=False)
    path.write_text(text + "\n")
