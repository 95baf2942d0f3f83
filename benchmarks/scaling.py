"""How the cost of a meta-step grows, and what training spends outside of it.

    python benchmarks/scaling.py --json result.json        # every axis, then the shares of a short training run
    python benchmarks/scaling.py tasks filters             # some axes
    python benchmarks/scaling.py training --data omniglot

An axis varies one number of the workload (5-way 1-shot, 8 tasks, 16 inner steps, 5 CG steps, 64 filters) and leaves the
others. All points of an axis take turns. `ms / GFLOP` would be level if time were arithmetic (as counted in
meta_step.py); the axis of the tasks also says how far the time per task is from that at the most tasks.

Training: `imaml_ext.train.train`, with clocks around the sampler, the meta-gradient and the outer update; what is
left of its training time is everything else (logging, statistics). Checkpoints and tests are no part of that time.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import measure
import peers
import torch
from measure import Machine, alternate
from meta_step import Workload, add_arguments, make_problem
from peers import Algorithm

from imaml_ext import IMAML
from imaml_ext.data import EpisodeSampler
from imaml_ext.settings import changed
from imaml_ext.train import load_recipe, train

AXES: dict[str, tuple[int, ...]] = {
    "tasks": (1, 2, 4, 8, 16, 32, 64),
    "ways": (2, 5, 10, 20),
    "shots": (1, 2, 5, 10),
    "inner_steps": (1, 4, 16, 64),
    "cg_steps": (1, 5, 20),
    "filters": (16, 32, 64, 128),
}


def measure_axis(axis: str, values: tuple[int, ...], base: Workload, options: argparse.Namespace) -> dict[str, Any]:
    """Times and prints one axis."""
    device = torch.device(options.device)
    workloads = [replace(base, **{axis: value}) for value in values]
    steps, parameters = {}, []
    for value, workload in zip(values, workloads, strict=True):
        algorithm = Algorithm(options.proximal, workload.inner_steps, workload.cg_steps, damping=options.damping)
        problem = make_problem(workload, algorithm, data=options.data, device=device, seed=options.seed)
        steps[str(value)] = peers.imaml_ext(problem).step
        parameters.append(sum(p.numel() for p in problem.network.parameters()))
    machine = Machine(device)
    times = alternate({**steps, **machine.calls()}, rounds=options.rounds, device=device)
    print(
        f"\n{axis:>12} {'N':>9} {'GFLOP':>8} {'median ms':>10} {'min':>9} {'max':>9} {'ms / GFLOP':>11} {'of sgemm':>9}"
    )
    points = []
    for value, workload, size in zip(values, workloads, parameters, strict=True):
        row = measure.summary(times[str(value)])
        flop = workload.flop()
        row["share_of_sgemm"] = round(machine.share_of_sgemm(times, str(value), flop), 4)
        row["peak_bytes"] = measure.peak_memory(steps[str(value)], device)
        points.append({"value": value, "parameters": size, "flop": flop, **row})
        spread = f"{row['median_ms']:10.1f} {row['min_ms']:9.1f} {row['max_ms']:9.1f}"
        rate = f"{row['median_ms'] / (flop / 1e9):11.2f} {row['share_of_sgemm']:9.0%}"
        print(f"{value:12} {size:9,} {flop / 1e9:8.2f} {spread} {rate}")
    result: dict[str, Any] = {"points": points, "machine": machine.rates(times)}
    if axis == "tasks":
        result["deviation_from_linear"] = deviation_from_linear({p["value"]: p["median_ms"] for p in points})
        print(f"time per task, from 4 tasks on: within {result['deviation_from_linear']:.1%} of that at {max(values)}")
    return result


def deviation_from_linear(times: dict[int, float], *, smallest: int = 4) -> float:
    """How far the time per task, from `smallest` tasks on, is at most from that at the most tasks, relative to that."""
    most = max(times)
    return round(max(abs(times[n] / n * most / times[most] - 1) for n in times if n >= min(smallest, most)), 4)


class Clock:
    """The seconds that each call of a method takes, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._device = device

    @contextlib.contextmanager
    def around(self, owner: type, method: str, name: str) -> Iterator[None]:
        """Within the block, calls of owner.method count as `name`."""
        original = getattr(owner, method)
        self.seconds[name] = []

        def measured(*args: Any, **kwargs: Any) -> Any:
            began = self._now()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[name].append(self._now() - began)

        setattr(owner, method, measured)
        try:
            yield
        finally:
            setattr(owner, method, original)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def measure_training(options: argparse.Namespace) -> dict[str, Any]:
    """Trains a recipe for some steps and prints where the time goes."""
    recipe = "omniglot-5w1s" if options.data == "omniglot" else "glyphs-5w1s"
    changes = {
        "outer.steps": options.training_steps,
        "evaluation.every": 0,
        "evaluation.tasks": 25,
        "run.device": options.device,
        "run.checkpoint_every": options.training_steps,
    }
    config = changed(load_recipe(recipe).config, changes)
    clock = Clock(torch.device(options.device))
    with contextlib.ExitStack() as stack:
        stack.enter_context(clock.around(IMAML, "meta_gradient", "meta-gradient"))
        stack.enter_context(clock.around(torch.optim.Adam, "step", "outer update"))
        stack.enter_context(clock.around(EpisodeSampler, "sample", "sampler"))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        result = train(config, Path(folder) / "run", recipe=recipe)
    total = result["train_seconds"]
    # What is called after the last step belongs to the test.
    shares = {name: sum(calls[: options.training_steps]) / total for name, calls in clock.seconds.items()}
    outside = 1 - shares["meta-gradient"] - shares["outer update"]
    print(f"\n{recipe}, {options.training_steps} meta-steps in {total:.1f} s: outside the meta-step {outside:.1%}")
    print("  " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    return {
        "recipe": recipe,
        "steps": options.training_steps,
        "seconds": round(total, 3),
        "shares": {name: round(share, 4) for name, share in shares.items()},
        "outside": round(outside, 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("axes", nargs="*", metavar="AXIS", help=f"{', '.join(AXES)}, training; all by default")
    add_arguments(parser)
    parser.add_argument("--largest", type=int, help="leave out larger values than this on every axis")
    parser.add_argument("--training-steps", type=int, default=30, help="meta-steps of the training run")
    options = parser.parse_args()
    known = [*AXES, "training"]
    unknown = [axis for axis in options.axes if axis not in known]
    if unknown:
        parser.error(f"axes must be some of {', '.join(known)}; got {', '.join(unknown)}")
    chosen = options.axes or known

    measure.full_precision()
    base = Workload(tasks=8)
    body: dict[str, Any] = {"base": asdict(base), "data": options.data, "proximal": options.proximal, "axes": {}}
    for axis in chosen:
        if axis == "training":
            body["training"] = measure_training(options)
        else:
            values = tuple(v for v in AXES[axis] if options.largest is None or v <= options.largest)
            body["axes"][axis] = measure_axis(axis, values, base, options)
        if options.json:
            measure.write_result(options.json, script="scaling", device=torch.device(options.device), **body)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
